"""Classification as a run sees it: images, network, loss, validation."""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from configs import with_num_classes, with_values
from data import TrainingData, as_stages, build_eval_loader, fingerprint, in_epoch, map_stages, usable_workers
from data.sources import count_images
from data.splits import one_level_too_many
from models.cpu.depthwise import use_fast_gradients
from tasks.networks import build_model, check_batch_norms, compile_for_training
from utils.precision import build_precision
from utils.session import Session
from utils.task import Task

from . import multi_label, single_label
from .distillation import Teacher, distillation_loss
from .images import class_balance, eval_dataset, open_train_and_val, train_dataset
from .inference import run_network
from .losses import build_criterion
from .stages import training_stages
from .transforms import build_mixup
from .unused import unused_settings
from .weights import load_pretrained


def build(session: Session) -> Task:
    """The task for `train.py`; UserError where data or configuration do not allow it."""
    config, processes, logger = session.config, session.processes, session.logger
    if config.MODEL.CLASS_MAP and not config.MODEL.PRETRAINED:
        logger.warning(f"MODEL.CLASS_MAP {config.MODEL.CLASS_MAP} is not used: no --pretrained is named")
    several = config.DATA.MULTI_LABEL
    if several:
        multi_label.check_recipe(config)
    for line in unused_settings(config):
        logger.warning(line)
    share = (processes.rank, processes.world_size)
    train_source, val_source = open_train_and_val(config, *share, logger.warning)
    classes = train_source.classes
    for split, source in (("training", train_source), ("validation", val_source)):
        if source.left_out:
            logger.info(f"left out of the {split} images: {source.left_out}")
        if odd := one_level_too_many(source):
            logger.warning(odd)
    config = with_num_classes(config, len(classes))
    pin_memory = processes.device.type == "cuda"
    samples_log = session.folder / f"samples_rank{processes.rank}.txt" if config.LOG_SAMPLES else None
    stages = training_stages(config)
    images = map_stages(lambda stage: train_dataset(stage, train_source), stages)
    data = TrainingData(
        config,
        images,
        *share,
        pin_memory,
        logger.warning,
        samples_log=samples_log,
        balance=class_balance(config, train_source),
        batch_size=map_stages(lambda stage: stage.DATA.BATCH_SIZE, stages),
    )
    of_batch = in_epoch(images, 0).transform  # what it does to a whole batch does not depend on the size
    # Validation in training is of one view, whatever test.py does later.
    single = with_values(config, {"TEST.TTA": "none"})
    val_images = eval_dataset(single, val_source)
    val_loader, val_batches = build_eval_loader(config, val_images, *share, pin_memory, keep_workers=True)

    for _, stage in as_stages(stages):
        check_batch_norms(stage, synchronised=1 if processes.device.type == "cpu" else processes.world_size)
        build_mixup(stage)  # refuses what a size does not allow
    network = build_model(config).to(processes.device)
    if processes.device.type == "cpu":
        use_fast_gradients(network)
    mixup = build_mixup(config)
    counts = count_images(train_source)
    criterion = nn.BCEWithLogitsLoss() if several else build_criterion(config, mixup is not None, counts)
    criterion.to(processes.device)
    # After the network: its initial weights are the same with a teacher and without.
    teacher = Teacher(config, processes.device, classes, logger.warning) if config.DISTILL.TEACHER else None
    precision = build_precision(config, processes.device)

    def inputs_and_targets(batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What the network and the criterion get of a batch: images (B, 3, H, W), labels or soft targets."""
        pixels, labels = batch
        # With DATA.FAST_LOADING, batches are uint8: they are normalised and erased on their device.
        pixels = of_batch.normalize_batch(pixels) if pixels.dtype == torch.uint8 else pixels
        if mixup is None:
            return pixels, labels
        mixup.mixup_enabled = not config.AUG.MIXUP_OFF_EPOCH or data.order.epoch < config.AUG.MIXUP_OFF_EPOCH
        return mixup(pixels, labels)

    def loss(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, targets = inputs_and_targets(batch)
        logits = model(inputs)
        of_labels = criterion(logits, targets)
        if teacher is None:
            return of_labels, {}
        of_teacher, share = distillation_loss(config, logits, teacher(inputs)), config.DISTILL.WEIGHT
        return (1 - share) * of_labels + share * of_teacher, {"labels": of_labels, "teacher": of_teacher}

    def validate(network: nn.Module) -> dict[str, float]:
        # COMPILE compiles training: validation would compile everything again, and differ by rounding.
        with torch.compiler.set_stance("force_eager") if config.COMPILE else nullcontext():
            if several:
                return multi_label.validate(session, single, network, val_loader, val_batches, precision)
            sums = run_network(session, single, network, val_loader, precision)
        if not math.isfinite(sums.loss_sum):
            logger.warning(f"outputs are not finite: loss {sums.loss_sum} over {sums.count} images")
        numbers = sums.means()
        logger.info(single_label.last_line(numbers))
        return numbers

    def start_from(path: str) -> str:
        return load_pretrained(network, path, config.MODEL.CLASS_MAP, classes)

    return Task(
        config=config,
        network=network,
        data=data,
        loss=loss,
        validate=validate,
        decides="map" if several else "acc1",
        identity={
            "data_fingerprint": fingerprint(train_source),
            "val_fingerprint": fingerprint(val_source),  # the best accuracy is one of these images
            "classes": classes,  # names, for pictures that are labelled later
        },
        by_chance=None if several else accuracy_by_chance([label for _, label in val_source.samples]),
        load_pretrained=start_from,
        about=f"{len(train_source.samples)} training and {len(val_source.samples)} validation images of "
        f"{len(classes)} classes, {usable_workers(config)} loader workers per process{_about_sizes(config, stages)}",
        compile=lambda precision: compile_for_training(network, precision, config.COMPILE_MEMORY),
        preview=lambda batch: inputs_and_targets([value.clone() for value in batch])[0],
    )


def _about_sizes(config: CfgNode, stages: Any) -> str:
    """The sizes of DATA.TRAIN_SIZES and their batches, for the log."""
    sizes = [
        f"from epoch {first} on {stage.DATA.BATCH_SIZE} a batch at {stage.DATA.IMG_SIZE}"
        for first, stage in as_stages(stages)
    ]
    return f"; images {', '.join(sizes)}" if config.DATA.TRAIN_SIZES else ""


def accuracy_by_chance(labels: Sequence[int]) -> float | None:
    """Acc@1 (percent) that guessing seldom exceeds: two standard errors above the share of the most common class.

    None where so few images cannot tell.
    """
    share = max(Counter(labels).values()) / len(labels)
    bound = 100 * (share + 2 * math.sqrt(share * (1 - share) / len(labels)))
    return bound if bound < 100 else None
