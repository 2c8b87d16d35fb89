"""One epoch of training, one evaluation, one throughput measurement."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from logging import Logger

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler.scheduler import Scheduler
from timm.utils import AverageMeter, ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from configs import UserError
from data import TRAINING_STEP, seed_everything

from .distributed import Processes, sum_over_processes, unwrap
from .logging import ProgressLog, TensorBoard, peak_memory_mib


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
    num_updates: int = 0  # optimizer updates done since the start of the run

    @property
    def network(self) -> nn.Module:
        return unwrap(self.model)


def train_one_epoch(
    config: CfgNode,
    trainer: Trainer,
    loader: DataLoader,
    epoch: int,
    first_update: int,
    processes: Processes,
    logger: Logger,
    board: TensorBoard,
) -> float:
    """Train from `first_update` of this epoch to its end; returns the mean loss over the epoch and all processes.

    Update t uses lr(t); gradients of TRAIN.ACCUMULATION_STEPS batches are averaged, synchronised once, then clipped.
    Raises FloatingPointError, before anything is changed, where loss or gradients are not finite.
    """
    accumulation, device = config.TRAIN.ACCUMULATION_STEPS, processes.device
    updates = first_update + len(loader) // accumulation
    images_per_update = config.DATA.BATCH_SIZE * processes.world_size * accumulation
    parameters = list(trainer.network.parameters())
    trainer.model.train()
    progress = ProgressLog(
        logger, f"Train: [{epoch}/{config.TRAIN.EPOCHS}]", updates, first_update, config.PRINT_FREQ, processes.is_main
    )
    loss_meter, norm_meter = AverageMeter(), AverageMeter()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    batches = iter(loader)
    for _ in range(first_update, updates):
        trainer.scheduler.step_update(trainer.num_updates)
        loss = torch.zeros((), device=device)
        for step in range(accumulation):
            images, targets = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            seed_everything(TRAINING_STEP, config.SEED, processes.rank, trainer.num_updates, step)
            if trainer.mixup is not None:
                images, targets = trainer.mixup(images, targets)
            if trainer.num_updates == 0 and step == 0:
                board.images("train/images", images, 0)
            with _gradient_sync(trainer.model, enabled=step == accumulation - 1):
                with trainer.precision.autocast():
                    step_loss = trainer.criterion(trainer.model(images), targets) / accumulation
                trainer.scaler.scale(step_loss).backward()
            loss += step_loss.detach()
        trainer.scaler.unscale_(trainer.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(parameters, config.TRAIN.CLIP_GRAD or math.inf)
        _check_finite(trainer, loss, grad_norm)
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.num_updates += 1
        if trainer.ema is not None:
            trainer.ema.update(trainer.network, step=trainer.num_updates)

        loss_sum += loss
        if progress.step():
            loss_meter.update(loss.item())
            norm_meter.update(grad_norm.item())
            lr = trainer.optimizer.param_groups[0]["lr"]
            speed = progress.line(
                f"loss {loss_meter.val:.4f} ({loss_meter.avg:.4f})"
                f"\tgrad_norm {norm_meter.val:.4f} ({norm_meter.avg:.4f})\tmem {peak_memory_mib(device):.0f}MB",
                images_per_update,
                lr,
            )
            values = {"loss": loss_meter.val, "lr": lr, "grad_norm": norm_meter.val, "images_per_second": speed}
            board.scalars({f"train/{name}": value for name, value in values.items()}, trainer.num_updates)
    seconds = progress.close()
    mean_loss = sum_over_processes(loss_sum, processes).item() / max(1, updates - first_update) / processes.world_size
    logger.info(f"EPOCH {epoch} training takes {seconds:.1f} s, mean loss {mean_loss:.4f}")
    return mean_loss


def _gradient_sync(model: nn.Module, enabled: bool):
    """Without `enabled`, gradients stay on their process: they are synchronised once an update, not once a batch."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not enabled else nullcontext()


def _check_finite(trainer: Trainer, loss: Tensor, grad_norm: Tensor) -> None:
    """Stop before damage. Under loss scaling overflowing gradients are ordinary: the scaler skips that update."""
    if trainer.scaler.is_enabled() or math.isfinite(grad_norm.item()):
        return
    raise FloatingPointError(
        f"loss {loss.item():g} and gradient norm {grad_norm.item():g} at update {trainer.num_updates}, learning rate "
        f"{trainer.optimizer.param_groups[0]['lr']:g}: stopped before the weights were changed or saved"
    )


@dataclass(frozen=True)
class Evaluation:
    """Exact results over a whole data set, the same on every process."""

    acc1: float  # percent
    acc5: float  # percent
    loss: float  # mean cross-entropy
    count: int  # images


@torch.no_grad()
def evaluate(
    network: nn.Module,
    loader: DataLoader,
    precision: Precision,
    processes: Processes,
    logger: Logger,
    print_freq: int,
    title: str = "Test: ",
) -> Evaluation:
    """Evaluate on every process's share; counts are summed over the processes once and divided once.

    With fewer than five classes, top-5 means all of them. `network` is the bare network: shares differ in length, so
    nothing in the loop may wait for another process.
    Raises UserError where the outputs are not finite.
    """
    device = processes.device
    network.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # top-1 hits, top-5 hits, loss, images: exact to 2^53
    progress = ProgressLog(logger, title, len(loader), every=print_freq, show_bar=processes.is_main)
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with precision.autocast():
            logits = network(images)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.tensor(len(labels), device=device)])
        if progress.step():
            acc1, acc5, mean_loss = (sums[:3] / sums[3]).tolist()
            progress.line(
                f"loss {mean_loss:.4f}\tAcc@1 {100 * acc1:.3f}\tAcc@5 {100 * acc5:.3f}"
                f"\tmem {peak_memory_mib(device):.0f}MB",
                len(labels),
            )
    progress.close()
    hits1, hits5, loss_sum, count = sum_over_processes(sums, processes).tolist()
    if not math.isfinite(loss_sum):
        raise UserError(f"evaluation gave a loss of {loss_sum} over {count:.0f} images: the weights are damaged")
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
    warmup_steps: int = 10,
    steps: int = 30,
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
