"""Segmentation as a run sees it: images and masks, network, loss, validation."""

import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from configs import with_num_classes, with_values
from data import TrainingData, normalize, usable_workers
from models.cpu.depthwise import use_fast_gradients
from utils.precision import build_precision
from utils.session import Session
from utils.task import Task

from ..backbone import check_frozen_norms
from .folders import IGNORED, check_first_masks, fingerprint, open_masks
from .inference import confusion_of, evaluation_loader
from .metrics import summarize
from .network import Segmenter, check_one_step
from .transforms import TrainingImages


def build(session: Session) -> Task:
    """The task for `train.py`; UserError where data or configuration do not allow it."""
    config, processes, logger = session.config, session.processes, session.logger
    check_frozen_norms(config)
    train_images, val_images = open_masks(config, "train"), open_masks(config, "val")
    check_first_masks(train_images, val_images)
    classes = train_images.classes
    config = with_num_classes(config, len(classes))
    share = (processes.rank, processes.world_size)
    pin_memory = processes.device.type == "cuda"
    samples_log = session.folder / f"samples_rank{processes.rank}.txt" if config.LOG_SAMPLES else None
    data = TrainingData(
        config, TrainingImages(config, train_images), *share, pin_memory, logger.warning, samples_log=samples_log
    )
    # Validation in training is of one view, whatever test.py does later.
    single = with_values(config, {"TEST.SCALES": [1.0], "TEST.FLIP": False})
    val_loader = evaluation_loader(single, val_images, processes, keep_workers=True)

    network = Segmenter(config)
    # On GPUs batch norms are synchronised: they see the images of all processes.
    together = processes.world_size if processes.device.type == "cuda" else 1
    check_one_step(network, config.DATA.BATCH_SIZE * together, config.AUG.CROP)
    network.to(processes.device)
    if processes.device.type == "cpu":
        use_fast_gradients(network)
    precision = build_precision(config, processes.device)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return segmentation_loss(config, model(normalize(batch["image"])), batch["classes"])

    def validate(network: nn.Module) -> dict[str, float]:
        confusion = confusion_of(session, single, network, val_loader, precision)
        numbers = summarize(confusion, config.TEST.ABSENT_CLASSES)
        logger.info(f" * {numbers.line()}")
        return numbers.as_dict()

    return Task(
        config=config,
        network=network,
        data=data,
        loss=loss,
        validate=validate,
        decides="miou",
        by_chance=100 / len(classes) if len(classes) > 1 else None,  # one class everywhere: at most its IoU of 100
        identity={
            "data_fingerprint": fingerprint(train_images),
            "val_fingerprint": fingerprint(val_images),
            "classes": classes,
        },
        load_pretrained=network.backbone.load,
        about=f"{len(train_images)} training and {len(val_images)} validation images of {len(classes)} classes, "
        f"{usable_workers(config)} loader workers per process",
        preview=lambda batch: normalize(batch["image"]),
    )


def segmentation_loss(config: CfgNode, outputs: list[Tensor], classes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy over the pixels that count, and the auxiliary head's times MODEL.AUX_WEIGHT.

    Args:
        config: MODEL.AUX_WEIGHT.
        outputs: logits (B, K, H, W) of each head.
        classes: (B, H, W); IGNORED pixels count nowhere. A batch without any other has the loss 0.
    """
    targets = classes.long()
    counted = (targets != IGNORED).sum().clamp(min=1)
    losses = [F.cross_entropy(x.float(), targets, ignore_index=IGNORED, reduction="sum") / counted for x in outputs]
    parts = dict(zip(("main", "auxiliary"), losses))
    return losses[0] + sum(config.MODEL.AUX_WEIGHT * loss for loss in losses[1:]), parts
