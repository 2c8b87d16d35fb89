"""A segmenter in other code."""

import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from configs import with_num_classes
from data.decoding import to_rgb, upright
from utils.precision import Precision

from ..trained import TrainedModel
from .inference import predict_classes
from .transforms import evaluation_views
from .weights import load_segmenter


def load(config: CfgNode, path: str, device: torch.device) -> TrainedModel:
    """The segmenter of a checkpoint; `predict` gives the class index of each pixel, int64 (H, W) on the CPU.

    The picture is turned upright as its EXIF says.
    """
    network, classes, _ = load_segmenter(config, path)
    network.to(device)
    config = with_num_classes(config, len(classes))
    precision = Precision(device.type, torch.bfloat16, enabled=False)

    def predict(picture: Image.Image) -> Tensor:
        picture = upright(to_rgb(picture))
        views = evaluation_views(config, picture, list(config.TEST.SCALES))
        size = (picture.height, picture.width)
        return predict_classes(config, network, [view.to(device) for view in views], size, precision).cpu()

    return TrainedModel(network, classes, predict, config)
