"""The learning rate of every update: how it scales with the global batch, and how it moves over a run."""

from dataclasses import dataclass

from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer
from yacs.config import CfgNode

REFERENCE_BATCH = 512  # images; the learning rates of the configuration are meant for this global batch


@dataclass(frozen=True)
class LearningRates:
    """Learning rates in use, scaled by the global batch."""

    base: float
    warmup: float
    minimum: float


def global_batch_size(config: CfgNode, world_size: int) -> int:
    """Images of one update: batch per process x processes x accumulated batches."""
    return config.DATA.BATCH_SIZE * world_size * config.TRAIN.ACCUMULATION_STEPS


def scaled_learning_rates(config: CfgNode, world_size: int) -> LearningRates:
    """Base, warm-up and minimum learning rate, each x global batch / 512 (the released linear scaling)."""
    scale = global_batch_size(config, world_size) / REFERENCE_BATCH
    train = config.TRAIN
    return LearningRates(train.BASE_LR * scale, train.WARMUP_LR * scale, train.MIN_LR * scale)


def build_scheduler(config: CfgNode, optimizer: Optimizer, rates: LearningRates, updates_per_epoch: int) -> Scheduler:
    """timm's scheduler for the run: `step_update(t)` sets the learning rate that update t, counted from 0, uses.

    With W updates of warm-up and T in all, lr(t) = warmup + t * (base - warmup) / W for t < W, and from then on
    cosine: minimum + (base - minimum) * (1 + cos(pi * t / T)) / 2, counted from update 0;
    linear: base - (base - minimum) * (t - W) / (T - W); step: base * DECAY_RATE ** (t // updates of DECAY_EPOCHS).
    """
    schedule = config.TRAIN.LR_SCHEDULER
    total_updates = config.TRAIN.EPOCHS * updates_per_epoch
    warmup_updates = config.TRAIN.WARMUP_EPOCHS * updates_per_epoch
    common = dict(
        warmup_t=warmup_updates,
        warmup_lr_init=rates.warmup,
        warmup_prefix=schedule.NAME == "linear",  # whether t counts from the end of the warm-up; timm's defaults differ
        t_in_epochs=False,
    )
    if schedule.NAME == "cosine":
        return CosineLRScheduler(optimizer, t_initial=total_updates, lr_min=rates.minimum, **common)
    if schedule.NAME == "linear":
        decay_updates = total_updates - warmup_updates
        return PolyLRScheduler(optimizer, t_initial=decay_updates, lr_min=rates.minimum, power=1.0, **common)
    if schedule.NAME != "step":
        raise ValueError(f"TRAIN.LR_SCHEDULER.NAME = {schedule.NAME!r}: has a name, but no schedule here")
    decay_updates = schedule.DECAY_EPOCHS * updates_per_epoch
    return StepLRScheduler(optimizer, decay_t=decay_updates, decay_rate=schedule.DECAY_RATE, **common)
