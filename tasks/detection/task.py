"""Detection as a run sees it: images, detector, losses, validation."""

import math

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from configs import UserError, with_num_classes, with_values
from data import TrainingData, build_eval_loader, usable_workers
from models.cpu.depthwise import use_fast_gradients
from tasks.backbone import check_frozen_norms
from utils.precision import build_precision
from utils.processes import run_on_main_and_broadcast
from utils.session import Session
from utils.task import Task

from .coco import CocoSplit, check_masks, match_classes, open_split
from .detectors import build_detector
from .images import EvalImages, Sample, TrainImages, collate
from .inference import flatten, predict
from .metrics import KINDS, Scores, kinds_of, score
from .transforms import TrainTransform
from .weights import load_pretrained


def build(session: Session) -> Task:
    """The task for `train.py`; UserError where data or configuration do not allow it."""
    config, processes, logger = session.config, session.processes, session.logger
    check_settings(config)
    check_frozen_norms(config)
    train, val = (open_checked(session, split) for split in ("train", "val"))
    classes = list(train.categories.values())
    config = with_num_classes(config, len(classes))
    categories = categories_of(val, classes)
    precision = build_precision(config, processes.device)

    network = build_detector(config, len(classes)).to(processes.device)
    if processes.device.type == "cpu":
        use_fast_gradients(network)
    labels = {category: number + network.first_label for category, number in match_classes(train, classes).items()}
    with_masks = "mask" in kinds_of(config.MODEL.DETECTOR)
    data = TrainingData(
        config,
        TrainImages(train, labels, TrainTransform(config), with_masks),
        processes.rank,
        processes.world_size,
        processes.device.type == "cuda",
        logger.warning,
        collate,
        session.folder / f"samples_rank{processes.rank}.txt" if config.LOG_SAMPLES else None,
    )
    val_loader = eval_loader(session, EvalImages(val, config), keep_workers=True)

    def loss(model: nn.Module, batch: list[Sample]) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = batch
        parts = {name.removeprefix("loss_"): value for name, value in model(images, targets).items()}
        return torch.stack(list(parts.values())).sum(), parts

    def validate(network: nn.Module) -> dict[str, float]:
        results = predict(session, network, val, val_loader, precision, categories)

        def evaluate() -> dict[str, float]:
            return numbers_of({kind: score(val, flatten(results), kind) for kind in kinds_of(config.MODEL.DETECTOR)})

        numbers = run_on_main_and_broadcast(evaluate, processes)
        logger.info(summary(numbers))
        return numbers

    return Task(
        config=config,
        network=network,
        data=data,
        loss=loss,
        validate=validate,
        decides="box_ap",
        identity={
            "data_fingerprint": train.digest,
            "val_fingerprint": val.digest,  # the best AP is one of these images
            "classes": classes,
            "category_ids": list(train.categories),
        },
        load_pretrained=lambda path: load_pretrained(network, path),
        about=f"{len(train)} training and {len(val)} validation images, {train.num_objects} and {val.num_objects} "
        f"objects of {len(classes)} classes, {usable_workers(config)} loader workers per process",
        preview=lambda batch: network.transform(batch[0])[0].tensors,
    )


def check_settings(config: CfgNode) -> None:
    """Raise UserError for shared settings that detection cannot follow."""
    if config.DATA.ZIP_MODE:
        raise UserError("DATA.ZIP_MODE: detection reads folders; leave --zip out")
    if config.COMPILE:
        raise UserError("COMPILE: detectors are not compiled; leave --compile out")
    if config.TEST.FUSE:
        raise UserError("TEST.FUSE: detectors are not fused; leave --fuse out")
    if len(config.MODEL.GMA.EMBEDDING_DIMS) != 4:
        raise UserError(f"MODEL.GMA.EMBEDDING_DIMS = {config.MODEL.GMA.EMBEDDING_DIMS}: detectors need 4 stages")


def open_checked(session: Session, name: str) -> CocoSplit:
    """A split that the detector can learn from or be judged by; UserError where it cannot."""
    split = open_split(session.config, name)
    for note in split.notes:
        session.logger.warning(note)
    if not split.num_objects:
        raise UserError(f"{split.path}: has no annotations of its images; there is nothing to find")
    check_masks(split, session.config.MODEL.DETECTOR)
    return split


def categories_of(split: CocoSplit, classes: list[str]) -> dict[int, int]:
    """{class index: category id of this split}; UserError where it has objects of other classes."""
    return {number: category for category, number in match_classes(split, classes).items()}


def eval_loader(session: Session, images: EvalImages, keep_workers: bool = False) -> DataLoader:
    """This process's images, one by one."""
    processes = session.processes
    one = with_values(session.config, {"DATA.BATCH_SIZE": 1})
    share = (processes.rank, processes.world_size, processes.device.type == "cuda")
    return build_eval_loader(one, images, *share, collate=_only, keep_workers=keep_workers)[0]


def _only(samples: list) -> tuple[int, Tensor]:
    return samples[0]


def numbers_of(scores: dict[str, Scores]) -> dict[str, float]:
    """COCO's numbers under their names: box_ap, box_ap50, ..., mask_ap, ..."""
    return {f"{kind}_{name}": value for kind, each in scores.items() for name, value in each.numbers.items()}


def summary(numbers: dict[str, float]) -> str:
    """The line that validation and evaluation end with."""
    kinds = [kind for kind in KINDS if f"{kind}_ap" in numbers]
    of_kind = "; ".join(
        f"{kind} AP {numbers[f'{kind}_ap']:.2f} AP50 {numbers[f'{kind}_ap50']:.2f} AP75 {numbers[f'{kind}_ap75']:.2f}"
        for kind in kinds
    )
    return f" * {of_kind}" if not math.isnan(numbers["box_ap"]) else " * no objects that count"
