"""Training: the state of a run, one update, one epoch. What is trained is the task's (`utils/task.py`)."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from configs import UserError
from configs.errors import StopRequested
from data import TRAINING_STEP, seed_everything

from .freezing import set_training_mode
from .optimizer import scheduled_lr
from .precision import Precision
from .processes import broadcast_batchnorm_stats, unwrap
from .run_log import ProgressLog, TensorBoard, peak_memory_mib
from .schedule import RunLength, global_batch_size, set_learning_rate
from .session import Session
from .supervision import StepStatus
from .task import Batch, Task


@dataclass
class TrainState:
    """What an update uses and changes."""

    model: nn.Module  # the network, wrapped where there are several processes
    optimizer: Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    precision: Precision
    length: RunLength
    num_updates: int = 0  # updates since the start of the run, skipped ones included

    def __post_init__(self) -> None:
        self.parameters = list(self.network.parameters())  # once: a walk over all modules takes milliseconds

    @property
    def network(self) -> nn.Module:
        return unwrap(self.model)

    @property
    def lr(self) -> float:
        return scheduled_lr(self.optimizer)


@dataclass
class LoopState:
    """Where a run is: training continues at `next_update` of `next_epoch`, both counted from 0."""

    next_epoch: int = 0
    next_update: int = 0
    loss_sum: float = 0.0  # over the updates of this epoch so far, each the mean over the processes
    norm_sum: float = 0.0  # likewise, gradient norms
    part_sums: dict[str, float] = field(default_factory=dict)  # likewise, named parts of the loss
    counted: int = 0  # updates in these sums: skipped ones are not
    best: float = 0.0  # the best number so far, of raw or EMA weights
    best_weights: str = ""  # which of the two: 'raw' or 'ema'; '' before the first validation
    nonfinite_in_a_row: int = 0  # updates skipped just now

    def begin_epoch(self, epoch: int) -> None:
        self.next_epoch, self.next_update = epoch, 0
        self.loss_sum, self.norm_sum, self.part_sums, self.counted = 0.0, 0.0, {}, 0

    def count(self, status: StepStatus) -> None:
        """Count an update, or note that it was skipped."""
        if not status.finite:
            self.nonfinite_in_a_row += 1
            return
        self.nonfinite_in_a_row = 0
        self.loss_sum += status.loss
        self.norm_sum += status.grad_norm
        for name, value in status.parts.items():
            self.part_sums[name] = self.part_sums.get(name, 0.0) + value
        self.counted += 1

    def mean(self, total: float) -> float:
        return total / self.counted if self.counted else math.nan

    @property
    def best_so_far(self) -> str:
        """The best number, for the log."""
        if not self.best_weights:
            return "none yet, no validation gave a number"
        return f"{self.best:.3f} ({self.best_weights} weights)"

    def record(self, numbers: dict[str, float], higher_is_better: bool = True) -> bool:
        """Note the numbers that decide, {'raw': ..., 'ema': ...}; True where one of them is the best so far."""
        is_best = False
        for weights, value in numbers.items():
            better = value > self.best if higher_is_better else value < self.best
            if better or (not self.best_weights and not math.isnan(value)):
                self.best, self.best_weights, is_best = value, weights, True
        return is_best


class BufferSnapshot:
    """A copy of a network's buffers (running statistics), to return to where an update is skipped."""

    def __init__(self, network: nn.Module) -> None:
        buffers = [buffer for buffer in network.buffers() if buffer.numel()]
        by_type = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype for b in buffers}]
        # A list a dtype: of mixed ones torch copies one tensor after the other.
        self._pairs = [([buffer.clone() for buffer in alike], alike) for alike in by_type]

    def take(self) -> None:
        for copies, buffers in self._pairs:
            torch._foreach_copy_(copies, buffers)

    def restore(self) -> None:
        for copies, buffers in self._pairs:
            torch._foreach_copy_(buffers, copies)


def train_step(
    session: Session, state: TrainState, task: Task, batches: Iterator[Batch], snapshot: BufferSnapshot
) -> StepStatus:
    """One update: the gradient of the mean loss over its batches and all processes, clipped once, applied once.

    Update t uses lr(t), or where batches differ that x its batch / the usual one. An update in which a process's loss
    or gradients are not finite is skipped by all processes, and changes nothing. Raises FloatingPointError where the
    processes do not agree on the gradients.
    """
    config, processes, supervisor = session.config, session.processes, session.supervisor
    steps = config.TRAIN.ACCUMULATION_STEPS
    epoch, _ = state.length.position(state.num_updates)
    batch_ratio = task.data.order.images_per_update(epoch) / global_batch_size(config, processes.world_size)
    set_learning_rate(state.scheduler, state.length, state.num_updates, batch_ratio)
    snapshot.take()
    losses: list[dict[str, Tensor]] = []
    for step in range(steps):
        batch = to_device(next(batches), processes.device)
        seed_everything(TRAINING_STEP, config.SEED, processes.rank, state.num_updates, step)
        supervisor.arrive()  # before every batch: synchronised batch norms wait for the others in each
        with _gradient_sync(state.model, enabled=step == steps - 1):
            with state.precision.autocast():
                loss, parts = _checked(task.loss(state.model, batch))
            state.scaler.scale(loss / steps).backward()
        # The loss has the one name that no part can have.
        losses.append({name: value.detach().float() / steps for name, value in ({"": loss} | parts).items()})
    state.scaler.unscale_(state.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(state.parameters, config.TRAIN.CLIP_GRAD or math.inf)

    parts = {name: sum(batch[name] for batch in losses) for name in losses[0]}
    status = supervisor.agree_on_update(parts.pop(""), parts, grad_norm)
    if status.finite:
        state.scaler.step(state.optimizer)
    else:
        snapshot.restore()
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.num_updates += 1
    if status.finite and state.ema is not None:
        state.ema.update(state.network, step=state.num_updates)
    return status


def train_one_epoch(
    session: Session,
    state: TrainState,
    loop: LoopState,
    task: Task,
    board: TensorBoard,
    after_update: Callable[[], None],
) -> dict[str, Any]:
    """Train from where `loop` is to the end of its epoch; returns the epoch's numbers, as metrics.jsonl holds them.

    Raises StopRequested, after the same update on all processes, once one of them was asked to stop, and
    FloatingPointError where more than TRAIN.MAX_NONFINITE_UPDATES in a row were skipped.
    """
    config, epoch, updates = session.config, loop.next_epoch, state.length.updates_of(loop.next_epoch)
    title, is_main = f"Train: [{epoch}/{state.length.epochs}]", session.processes.is_main
    console = ProgressLog(session.logger, title, updates, loop.next_update, config.PRINT_FREQ, is_main)
    snapshot = BufferSnapshot(state.network)
    batches = task.data.batches(epoch, loop.next_update)
    if state.num_updates == 0 and is_main and task.preview is not None:
        first = next(batches)
        seed_everything(TRAINING_STEP, config.SEED, session.processes.rank, 0, 0)  # as `train_step` does
        board.images("train/images", task.preview(first), 0)
        batches = itertools.chain([first], batches)
    set_training_mode(state.model)
    for update in range(loop.next_update, updates):
        status = train_step(session, state, task, batches, snapshot)
        loop.count(status)
        if not status.finite:
            _report_skipped(session, state, loop, task, update, status)
        loop.next_update = update + 1
        if console.step():
            _report_update(session, state, loop, task, console, board, status)
        after_update()
        if status.stop:
            raise StopRequested
    images = console.steps_done * task.data.order.images_per_update(epoch)
    seconds = console.close()
    mean_loss = loop.mean(loop.loss_sum)
    session.logger.info(f"EPOCH {epoch} training takes {seconds:.1f} s, mean loss {mean_loss:.4f}")
    return {
        "epoch": epoch,
        "updates": state.num_updates,
        "lr": state.lr,
        "seconds": seconds,
        "images_per_second": images / seconds,
        "train_loss": mean_loss,
        **{f"train_{name}": loop.mean(total) for name, total in loop.part_sums.items()},
        "grad_norm": loop.mean(loop.norm_sum),
    }


def _checked(returned: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a task's loss returned; UserError where it is not a loss and its named parts."""
    loss, parts = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, None)
    if not isinstance(parts, dict) or any(not isinstance(v, Tensor) or v.dim() for v in (loss, *parts.values())):
        raise UserError(f"Task.loss: returned {returned!r:.200}; it must return a scalar tensor and a dict of such")
    return loss, parts


def validate(task: Task, network: nn.Module) -> dict[str, float]:
    """The task's validation numbers as plain numbers; UserError where the one that decides is not among them."""
    numbers = {name: float(value) for name, value in task.validate(network).items()}
    if task.decides not in numbers:
        raise UserError(f"Task.decides = {task.decides!r}: validate gives {', '.join(numbers)}; name one of these")
    return numbers


def validate_all(session: Session, task: Task, networks: dict[str, nn.Module]) -> dict[str, dict[str, float]]:
    """`validate` for each network, by the name of its weights ('raw', 'ema'); running statistics are process 0's."""
    results = {}
    for weights, network in networks.items():
        session.logger.info(f"validating the {weights} weights")
        broadcast_batchnorm_stats(network, session.processes)
        results[weights] = validate(task, network)
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in results[weights].items())
        session.logger.info(f"{weights} weights: {numbers}")
    return results


def warn_of_chance(session: Session, task: Task, loop: LoopState) -> None:
    """Log one line where the best number of a run is no better than guessing may be."""
    if task.by_chance is not None and not (loop.best_weights and loop.best > task.by_chance):
        session.logger.warning(
            f"best {task.decides} {loop.best:.3f}: guessing may reach {task.by_chance:.3f} on so many images, so "
            "nothing shows that the network has learnt; few validation images, fresh weights on few training images, a "
            "wrong learning rate and wrong data (python -m tools.check) are the usual causes"
        )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same nested values with their tensors on `device`."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)


def _gradient_sync(model: nn.Module, enabled: bool):
    """Without `enabled`, gradients stay on their process: they are synchronised once an update, not once a batch."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not enabled else nullcontext()


def _report_update(
    session: Session,
    state: TrainState,
    loop: LoopState,
    task: Task,
    console: ProgressLog,
    board: TensorBoard,
    status: StepStatus,
) -> None:
    parts = "".join(f"\t{name} {value:.4f}" for name, value in status.parts.items())
    speed = console.line(
        f"loss {status.loss:.4f} ({loop.mean(loop.loss_sum):.4f}){parts}"
        f"\tgrad_norm {status.grad_norm:.4f} ({loop.mean(loop.norm_sum):.4f})"
        f"\tmem {peak_memory_mib(session.processes.device):.0f}MB",
        task.data.order.images_per_update(loop.next_epoch),
        state.lr,
    )
    values = {"loss": status.loss, **status.parts, "lr": state.lr, "grad_norm": status.grad_norm}
    values["images_per_second"] = speed
    if state.scaler.is_enabled():
        values["loss_scale"] = state.scaler.get_scale()
    board.scalars({f"train/{name}": value for name, value in values.items()}, state.num_updates)


def _report_skipped(
    session: Session, state: TrainState, loop: LoopState, task: Task, update: int, status: StepStatus
) -> None:
    """Log a skipped update, with the samples of this process if it is to blame; end the run after too many in a row."""
    ranks = ", ".join(map(str, status.nonfinite_ranks))
    what = f"update {state.num_updates - 1} skipped: loss or gradients not finite on process {ranks}, "
    what += f"learning rate {state.lr:g}, {loop.nonfinite_in_a_row} in a row"
    if state.scaler.is_enabled():
        what += f", loss scale now {state.scaler.get_scale():g}"
    session.logger.warning(what)
    rank = session.processes.rank
    if rank in status.nonfinite_ranks:
        session.logger.warning(f"process {rank}, image indices: {task.data.order.indices_of(update)}")
    if loop.nonfinite_in_a_row > session.config.TRAIN.MAX_NONFINITE_UPDATES:
        raise FloatingPointError(
            f"{what}: more than TRAIN.MAX_NONFINITE_UPDATES, the run ends; they changed neither weights nor checkpoints"
        )
