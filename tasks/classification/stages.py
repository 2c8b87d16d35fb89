"""DATA.TRAIN_SIZES: training begins with small images, in larger batches."""

from math import prod
from typing import Any

from yacs.config import CfgNode

from configs import edges, image_size, with_values


def training_stages(config: CfgNode) -> Any:
    """The configuration that training images and batches follow; by epoch (`data.stages`) with DATA.TRAIN_SIZES.

    With DATA.SCALE_BATCH, a batch of smaller images has about as many pixels as DATA.BATCH_SIZE images of
    DATA.IMG_SIZE. Its images are rounded down to whole eighths of DATA.BATCH_SIZE, so that a run whose images are
    spread over 2, 4, 8 ... times as many processes has the same global batch; and to an even number where that is one,
    because mixup pairs images.
    """
    if not config.DATA.TRAIN_SIZES:
        return config
    batch, pixels = config.DATA.BATCH_SIZE, prod(image_size(config))
    stages = []
    for size, epoch in config.DATA.TRAIN_SIZES:
        eighths = 8 * pixels // prod(edges(size)) if config.DATA.SCALE_BATCH else 8
        step = 1 if batch % 2 else 2
        values = {"DATA.IMG_SIZE": size, "DATA.BATCH_SIZE": batch * eighths // 8 // step * step}
        stages.append([epoch, with_values(config, values)])
    return stages
