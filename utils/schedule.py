"""How long a run is, and the learning rate of each of its updates."""

from dataclasses import dataclass

from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer
from yacs.config import CfgNode

from configs import UserError
from data import as_stages, in_epoch

from .session import Session


@dataclass(frozen=True)
class RunLength:
    """The updates of a run, and how they make epochs: all but the last one are whole."""

    updates: int
    warmup_updates: int  # of these, the first ones
    updates_per_epoch: int | list  # of a whole epoch: one pass over the training data; may be by epoch (`data.stages`)

    @property
    def epochs(self) -> int:
        return self.position(self.updates - 1)[0] + 1

    @property
    def unit(self) -> int:
        """Updates of a whole epoch of the last ones, in which the schedule counts."""
        return as_stages(self.updates_per_epoch)[-1][1]

    def updates_before(self, epoch: float) -> int:
        """Updates of the whole epochs from the start to this one; of a half-done epoch half of them."""
        stages = as_stages(self.updates_per_epoch)
        ends = [first for first, _ in stages[1:]] + [epoch]
        return round(sum(max(0, min(epoch, end) - first) * each for (first, each), end in zip(stages, ends)))

    def updates_of(self, epoch: int) -> int:
        """Updates of an epoch, counted from 0: fewer in the last one where TRAIN.UPDATES ends within it."""
        return max(0, min(in_epoch(self.updates_per_epoch, epoch), self.updates - self.updates_before(epoch)))

    def position(self, update: int) -> tuple[int, int]:
        """The epoch that an update is in, and its number there, both counted from 0."""
        stages = [(self.updates_before(first), first, each) for first, each in as_stages(self.updates_per_epoch)]
        before, first, each = next(stage for stage in reversed(stages) if stage[0] <= update)
        return first + (update - before) // each, (update - before) % each

    def time(self, update: int) -> float:
        """Where the schedule is at an update, in units: it follows the epochs, however many updates each has."""
        epoch, rest = self.position(update)
        each = in_epoch(self.updates_per_epoch, epoch)
        return epoch * self.unit + (rest if each == self.unit else rest * self.unit / each)

    def is_last(self, epoch: int) -> bool:
        return epoch + 1 >= self.epochs

    def __str__(self) -> str:
        whole, rest = self.position(self.updates)
        return f"{self.updates} updates" if rest else f"{whole} epochs"

    @property
    def of_an_epoch(self) -> str:
        """Updates of a whole epoch, for the log."""
        return " then ".join(str(each) for _, each in as_stages(self.updates_per_epoch))


def run_length(config: CfgNode, updates_per_epoch: int | list) -> RunLength:
    """The length that TRAIN.UPDATES or else TRAIN.EPOCHS says, and likewise of the warm-up.

    Raises UserError where the run would be over before it begins, or before its warm-up ends.
    """
    train = config.TRAIN
    whole = RunLength(0, 0, updates_per_epoch)
    updates = train.UPDATES or whole.updates_before(train.EPOCHS)
    warmup = train.WARMUP_UPDATES or whole.updates_before(train.WARMUP_EPOCHS)
    length = RunLength(updates, warmup, updates_per_epoch)
    of_an_epoch = f"an epoch of these images has {length.of_an_epoch} updates"
    if warmup >= updates:
        key = "TRAIN.WARMUP_UPDATES" if train.WARMUP_UPDATES else "TRAIN.WARMUP_EPOCHS"
        raise UserError(f"{key}: {warmup} updates of warm-up in a run of {updates}; lower it ({of_an_epoch})")
    if length.epochs <= train.START_EPOCH:
        raise UserError(f"TRAIN.START_EPOCH = {train.START_EPOCH}: the run has {length.epochs} epochs ({of_an_epoch})")
    return length


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
    """Base, warm-up and minimum learning rate, each x global batch / TRAIN.REFERENCE_BATCH (linear scaling)."""
    train = config.TRAIN
    scale = global_batch_size(config, world_size) / train.REFERENCE_BATCH
    return LearningRates(train.BASE_LR * scale, train.WARMUP_LR * scale, train.MIN_LR * scale)


def unusual_settings(config: CfgNode, world_size: int, length: RunLength) -> list[str]:
    """Settings that are possible but seldom meant, a line each."""
    train, ema, batch = config.TRAIN, config.EMA, global_batch_size(config, world_size)
    lines = []
    if train.RECIPE_BATCH not in (0, batch):
        lines.append(
            f"global batch {batch} instead of the recipe's {train.RECIPE_BATCH}, and learning rates are BASE_LR x "
            f"batch / {train.REFERENCE_BATCH}, TRAIN.REFERENCE_BATCH; change --batch-size or --accumulation-steps or "
            f"that key, or say that it is meant with TRAIN.RECIPE_BATCH {batch}"
        )
    if ema.ENABLED and not ema.WARMUP and length.updates * (1 - ema.DECAY) < 1:
        lines.append(
            f"EMA.DECAY = {ema.DECAY} averages over {1 / (1 - ema.DECAY):.0f} updates, and the run has "
            f"{length.updates}: the average stays near the first weights; set EMA.WARMUP True"
        )
    return lines


def build_scheduler(config: CfgNode, optimizer: Optimizer, rates: LearningRates, length: RunLength) -> Scheduler:
    """timm's scheduler for the run: `step_update(t)` sets the learning rate that update t, counted from 0, uses.

    With W updates of warm-up and T in all, lr(t) = warmup + t * (base - warmup) / W for t < W. From then on:

        cosine     minimum + (base - minimum) * (1 + cos(pi * t / T)) / 2
        poly       minimum + (base - minimum) * (1 - t / T) ** POWER
        linear     minimum + (base - minimum) * (1 - (t - W) / (T - W))
        step       base * DECAY_RATE ** (t // updates of DECAY_EPOCHS)
        multistep  base * DECAY_RATE ** (number of MILESTONES up to t)

    Only 'linear' counts from the end of the warm-up; the others fall as if there had been none. Where epochs differ in
    their updates, t, T and W are `RunLength.time` of these.
    """
    schedule, name = config.TRAIN.LR_SCHEDULER, config.TRAIN.LR_SCHEDULER.NAME
    warmup = length.time(length.warmup_updates)
    common = dict(
        warmup_t=warmup,
        warmup_lr_init=rates.warmup,
        warmup_prefix=name == "linear",  # whether t counts from the end of the warm-up; timm's defaults differ
        t_in_epochs=False,
    )
    if name in ("cosine", "linear", "poly"):
        updates = length.time(length.updates) - (warmup if name == "linear" else 0)
        # Of one update, whose rate is the base rate in any case, timm would print a warning.
        common |= dict(t_initial=max(2, updates), lr_min=rates.minimum)
        if name == "cosine":
            return CosineLRScheduler(optimizer, **common)
        return PolyLRScheduler(optimizer, power=1.0 if name == "linear" else schedule.POWER, **common)
    if name == "step":
        decay_updates = schedule.DECAY_EPOCHS * length.unit
        return StepLRScheduler(optimizer, decay_t=decay_updates, decay_rate=schedule.DECAY_RATE, **common)
    if name == "multistep":
        unit = 1 if config.TRAIN.UPDATES else length.unit
        # timm lets milestone m take effect at update m - 1; here, as in PyTorch, it is the first with the lower rate.
        milestones = [round(milestone * unit) + 1 for milestone in schedule.MILESTONES]
        return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=schedule.DECAY_RATE, **common)
    raise ValueError(f"TRAIN.LR_SCHEDULER.NAME = {name!r}: has a name, but no schedule here")


def set_learning_rate(scheduler: Scheduler, length: RunLength, update: int, batch_ratio: float) -> None:
    """Set the learning rate of an update whose batch is `batch_ratio` times the one that rates are scaled for."""
    scheduler.step_update(length.time(update))
    for group in scheduler.optimizer.param_groups:
        group["lr"] *= batch_ratio


def report_recipe(session: Session, network: str, rates: LearningRates, length: RunLength) -> None:
    """Log what a run computes with: `network` in a few words, learning rates, global batch, length; then warnings."""
    config, world_size = session.config, session.processes.world_size
    session.logger.info(
        f"{config.MODEL.NAME}: {network}; learning rate {rates.base:g} (warm-up from {rates.warmup:g}, minimum "
        f"{rates.minimum:g}) for global batch {global_batch_size(config, world_size)}: {config.DATA.BATCH_SIZE} images "
        f"x {world_size} processes x {config.TRAIN.ACCUMULATION_STEPS} accumulated; {length.of_an_epoch} updates "
        f"per epoch, {length.updates} in all, {length.warmup_updates} of warm-up"
    )
    for line in unusual_settings(config, world_size, length):
        session.logger.warning(line)
