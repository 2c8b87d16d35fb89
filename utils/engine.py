"""One epoch of training, one evaluation, one throughput measurement."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from configs import UserError
from configs.errors import StopRequested
from data import TRAINING_STEP, TrainingData, seed_everything
from data.normalization import normalize
from models.groupmixformer import GroupMixFormer

from .compilation import compile_blocks
from .optimizer import scheduled_lr
from .processes import sum_over_processes, unwrap
from .run_log import ProgressLog, TensorBoard, peak_memory_mib
from .session import Session
from .supervision import KeptStatistics, UpdateVerdict
from .sync_batchnorm import use_traceable_batch_norms


@dataclass(frozen=True)
class Precision:
    """How numbers are computed: float32, or autocast to `dtype`."""

    device_type: str
    dtype: torch.dtype
    enabled: bool

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)

    def __str__(self) -> str:
        return f"autocast to {str(self.dtype).removeprefix('torch.')}" if self.enabled else "float32"


def build_precision(config: CfgNode, device: torch.device) -> Precision:
    """AMP_OPT_LEVEL and AMP_DTYPE as configured; autocast is the default on GPUs, float32 on CPU."""
    level = config.AMP_OPT_LEVEL or ("O1" if device.type == "cuda" else "O0")
    return Precision(device.type, getattr(torch, config.AMP_DTYPE), enabled=level != "O0")


def build_scaler(precision: Precision) -> torch.amp.GradScaler:
    """Loss scaling for float16; for other precisions it passes everything through."""
    return torch.amp.GradScaler(precision.device_type, enabled=precision.enabled and precision.dtype == torch.float16)


def compile_for_training(network: GroupMixFormer, precision: Precision) -> None:
    """`compile_blocks`, synchronised batch norms included; raises UserError under autocast on a CPU.

    Gradients that are compiled so were not finite on some CPUs and right on others, with torch 2.10 to 2.14 (logits are
    right everywhere).
    """
    if precision.enabled and precision.device_type == "cpu":
        raise UserError(
            f"COMPILE with {precision} on a CPU: torch {torch.__version__} may compile gradients that are not finite; "
            "train in float32 (--amp-opt-level O0) or without --compile"
        )
    use_traceable_batch_norms(network.groupmixformer_backbone)
    compile_blocks(network)


def build_criterion(mixup: Mixup | None, label_smoothing: float) -> nn.Module:
    """The loss that fits the targets: soft ones where mixup or cutmix make them (smoothing included), else labels."""
    if mixup is not None:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(label_smoothing) if label_smoothing > 0 else nn.CrossEntropyLoss()


@dataclass
class Trainer:
    """What a training step uses and changes."""

    model: nn.Module  # the network, wrapped where there are several processes
    optimizer: Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    mixup: Mixup | None
    criterion: nn.Module
    precision: Precision
    num_updates: int = 0  # updates since the start of the run, skipped ones included

    @property
    def network(self) -> nn.Module:
        return unwrap(self.model)

    @property
    def lr(self) -> float:
        return scheduled_lr(self.optimizer)


@dataclass
class Progress:
    """Where a run stands: training goes on at `next_update` of `next_epoch`, both counted from 0."""

    next_epoch: int = 0
    next_update: int = 0
    loss_sum: float = 0.0  # over the updates of this epoch so far, each the mean over the processes
    norm_sum: float = 0.0  # likewise, gradient norms
    counted: int = 0  # updates that those two are over: skipped ones are not
    max_accuracy: float = 0.0  # best top-1 so far, raw or EMA, percent
    best_weights: str = ""  # which of the two it was: 'raw' or 'ema'; '' before the first evaluation
    nonfinite_in_a_row: int = 0  # updates skipped just now

    def begin_epoch(self, epoch: int) -> None:
        self.next_epoch, self.next_update = epoch, 0
        self.loss_sum, self.norm_sum, self.counted = 0.0, 0.0, 0

    @property
    def mean_loss(self) -> float:
        return self.loss_sum / self.counted if self.counted else math.nan

    @property
    def mean_norm(self) -> float:
        return self.norm_sum / self.counted if self.counted else math.nan

    def record(self, accuracy: float, weights: str) -> bool:
        """Note an accuracy of 'raw' or 'ema' weights; True where it is the best so far."""
        if self.best_weights and accuracy <= self.max_accuracy:
            return False
        self.max_accuracy, self.best_weights = accuracy, weights
        return True


def train_one_epoch(
    session: Session,
    trainer: Trainer,
    progress: Progress,
    data: TrainingData,
    board: TensorBoard,
    after_update: Callable[[], None],
) -> float:
    """Train from where `progress` stands to the end of its epoch; returns the epoch's mean loss over all processes.

    Update t uses lr(t). Gradients of TRAIN.ACCUMULATION_STEPS batches are averaged, synchronised once, clipped once.
    An update in which a process's loss or gradients are not finite is skipped by all, and leaves no trace but the log.
    Raises StopRequested, at the same update on all processes, once one of them was asked to stop, and
    FloatingPointError where more than TRAIN.MAX_NONFINITE_UPDATES in a row were skipped, or where the processes do not
    agree on the gradients.
    """
    config, watch, epoch = session.config, session.watch, progress.next_epoch
    console = ProgressLog(
        session.logger,
        f"Train: [{epoch}/{config.TRAIN.EPOCHS}]",
        data.updates_per_epoch,
        progress.next_update,
        config.PRINT_FREQ,
        session.processes.is_main,
    )
    parameters = list(trainer.network.parameters())
    statistics = KeptStatistics(trainer.network)
    trainer.model.train()
    batches = data.batches(epoch, progress.next_update)
    for update in range(progress.next_update, data.updates_per_epoch):
        trainer.scheduler.step_update(trainer.num_updates)
        statistics.keep()
        _accumulate_gradients(session, trainer, data, batches, board)
        trainer.scaler.unscale_(trainer.optimizer)
        verdict = watch.conclude_update(nn.utils.clip_grad_norm_(parameters, config.TRAIN.CLIP_GRAD or math.inf))
        finite = not verdict.nonfinite_ranks
        if finite:
            trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.num_updates += 1
        if finite:
            if trainer.ema is not None:
                trainer.ema.update(trainer.network, step=trainer.num_updates)
            progress.nonfinite_in_a_row = 0
            progress.loss_sum += verdict.loss
            progress.norm_sum += verdict.grad_norm
            progress.counted += 1
        else:
            statistics.restore()
            _report_skipped(session, trainer, progress, data, update, verdict)
        progress.next_update = update + 1

        if console.step():
            _report_update(session, trainer, progress, console, board, verdict)
        after_update()
        if verdict.stop:
            raise StopRequested
    seconds = console.close()
    session.logger.info(f"EPOCH {epoch} training takes {seconds:.1f} s, mean loss {progress.mean_loss:.4f}")
    return progress.mean_loss


def _accumulate_gradients(
    session: Session,
    trainer: Trainer,
    data: TrainingData,
    batches: Iterator[tuple[Tensor, Tensor]],
    board: TensorBoard,
) -> None:
    """Forward and backward passes of one update: gradients of the mean loss over its batches and all processes."""
    config, processes = session.config, session.processes
    for step in range(config.TRAIN.ACCUMULATION_STEPS):
        images, targets = (x.to(processes.device, non_blocking=True) for x in next(batches))
        seed_everything(TRAINING_STEP, config.SEED, processes.rank, trainer.num_updates, step)
        images = data.finish(images)
        if trainer.mixup is not None:
            images, targets = trainer.mixup(images, targets)
        if trainer.num_updates == 0 and step == 0:
            board.images("train/images", images, 0)
        session.watch.arrive()  # every batch's: synchronised batch norms wait for the others in each
        with _gradient_sync(trainer.model, enabled=step == config.TRAIN.ACCUMULATION_STEPS - 1):
            with trainer.precision.autocast():
                loss = trainer.criterion(trainer.model(images), targets) / config.TRAIN.ACCUMULATION_STEPS
            (trainer.scaler.scale(loss) + session.watch.notes_term(loss)).backward()


def _gradient_sync(model: nn.Module, enabled: bool):
    """Without `enabled`, gradients stay on their process: they are synchronised once an update, not once a batch."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not enabled else nullcontext()


def _report_update(
    session: Session,
    trainer: Trainer,
    progress: Progress,
    console: ProgressLog,
    board: TensorBoard,
    verdict: UpdateVerdict,
) -> None:
    config, loss, grad_norm = session.config, verdict.loss, verdict.grad_norm
    speed = console.line(
        f"loss {loss:.4f} ({progress.mean_loss:.4f})\tgrad_norm {grad_norm:.4f} ({progress.mean_norm:.4f})"
        f"\tmem {peak_memory_mib(session.processes.device):.0f}MB",
        config.DATA.BATCH_SIZE * session.processes.world_size * config.TRAIN.ACCUMULATION_STEPS,
        trainer.lr,
    )
    values = {"loss": loss, "lr": trainer.lr, "grad_norm": grad_norm, "images_per_second": speed}
    if trainer.scaler.is_enabled():
        values["loss_scale"] = trainer.scaler.get_scale()
    board.scalars({f"train/{name}": value for name, value in values.items()}, trainer.num_updates)


def _report_skipped(
    session: Session,
    trainer: Trainer,
    progress: Progress,
    data: TrainingData,
    update: int,
    verdict: UpdateVerdict,
) -> None:
    """Log a skipped update, with the images of this process if it is to blame; end the run after too many in a row."""
    progress.nonfinite_in_a_row += 1
    ranks = ", ".join(map(str, verdict.nonfinite_ranks))
    what = f"update {trainer.num_updates - 1} skipped: loss or gradients not finite on process {ranks}, "
    what += f"learning rate {trainer.lr:g}, {progress.nonfinite_in_a_row} in a row"
    if trainer.scaler.is_enabled():
        what += f", loss scale now {trainer.scaler.get_scale():g}"
    session.logger.warning(what)
    if session.processes.rank in verdict.nonfinite_ranks:
        session.logger.warning(f"process {session.processes.rank}, image indices: {data.order.indices_of(update)}")
    if progress.nonfinite_in_a_row > session.config.TRAIN.MAX_NONFINITE_UPDATES:
        raise FloatingPointError(
            f"{what}: more than TRAIN.MAX_NONFINITE_UPDATES, the run ends; they changed neither weights nor checkpoints"
        )


@dataclass(frozen=True)
class Evaluation:
    """Exact results over a whole data set, the same on every process."""

    acc1: float  # percent
    acc5: float  # percent
    loss: float  # mean cross-entropy; not finite where an output is not
    count: int  # images


@torch.no_grad()
def evaluate(
    session: Session, network: nn.Module, loader: DataLoader, precision: Precision, title: str = "Test: "
) -> Evaluation:
    """Evaluate on every process's share; counts are summed over the processes once and divided once.

    `predictions.predict` is test.py's loop. It gathers a prediction for every image on the main process and
    keeps its bits on any number of processes; an epoch of training needs neither, and sums cost no memory. That both
    give the same accuracy is tested.

    With fewer than five classes, top-5 means all of them. `network` is the bare network: shares differ in length,
    so its forward pass must not wait for other processes.
    Raises StopRequested, on all processes, where one was asked to stop.
    """
    processes, logger = session.processes, session.logger
    network.eval()
    # Top-1 hits, top-5 hits, loss, images. Counts are exact in float64 up to 2**53.
    sums = torch.zeros(4, dtype=torch.float64, device=processes.device)
    batches_everywhere = len(loader.dataset.dataset) // processes.world_size // loader.batch_size
    share = f"\t(the share of process {processes.rank})" if processes.world_size > 1 else ""
    console = ProgressLog(logger, title, len(loader), every=session.config.PRINT_FREQ, show_bar=processes.is_main)
    for number, (images, labels) in enumerate(loader):
        if number < batches_everywhere and session.watch.stop_agreed():
            raise StopRequested
        images, labels = (x.to(processes.device, non_blocking=True) for x in (images, labels))
        # What COMPILE compiles is training: validation would compile everything again, and differ by rounding.
        # The stance holds from its construction on, so it is made where it ends.
        eager = torch.compiler.set_stance("force_eager") if session.config.COMPILE else nullcontext()
        with precision.autocast(), eager:
            logits = network(normalize(images))
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.tensor(len(labels), device=loss.device)])
        if console.step():
            acc1, acc5, mean_loss = (sums[:3] / sums[3]).tolist()
            console.line(
                f"loss {mean_loss:.4f}\tAcc@1 {100 * acc1:.3f}\tAcc@5 {100 * acc5:.3f}"
                f"\tmem {peak_memory_mib(processes.device):.0f}MB{share}",
                len(labels),
            )
    console.close()
    # Here too: a process that waits for a failed one on the GPU does not come back, and could not save any more.
    if session.watch.stop_agreed():
        raise StopRequested
    hits1, hits5, loss_sum, count = sum_over_processes(sums, processes).tolist()
    if not math.isfinite(loss_sum):
        logger.warning(f"outputs are not finite: loss {loss_sum} over {count:.0f} images")
    result = Evaluation(100 * hits1 / count, 100 * hits5 / count, loss_sum / count, int(count))
    logger.info(f" * Acc@1 {result.acc1:.3f} Acc@5 {result.acc5:.3f}")
    return result


@torch.no_grad()
def measure_throughput(
    network: nn.Module,
    input_shape: tuple[int, int, int],
    batch_size: int,
    precision: Precision,
    device: torch.device,
    warmup_steps: int,
    steps: int,
) -> float:
    """Images/s of the evaluation forward pass on random images (batch_size, *input_shape), after warming up."""
    network.eval()
    images = torch.randn(batch_size, *input_shape, device=device)
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    start = 0.0
    for step in range(warmup_steps + steps):
        if step == warmup_steps:
            synchronize()
            start = time.perf_counter()
        with precision.autocast():
            network(images)
    synchronize()
    return steps * batch_size / (time.perf_counter() - start)
