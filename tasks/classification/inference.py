"""The pass over images that validation, test.py and --images share: it counts, and where asked gathers predictions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data import Source, build_eval_loader, normalize
from data.sources import UNLABELLED
from utils.evaluation import evaluation_batches
from utils.precision import Precision
from utils.processes import Processes, gather_on_main, sum_over_processes
from utils.session import Session

from .images import eval_dataset
from .predictions import Predictions

TOP = 5
# Logits are kept up to this size, for a moment in three copies on the main process: 50,000 images of 1000 classes are
# 0.2 GB. Beyond it, as for the 10,450 classes of ImageNet-21k, everything but the temperature is still exact.
MAX_LOGITS_BYTES = 10**9


@dataclass(frozen=True)
class Sums:
    """What a pass counts, over the labelled images of all processes."""

    count: int  # images
    hits1: int  # whose label is the most probable class
    hits5: int  # whose label is among the five most probable (all, of fewer classes)
    loss_sum: float  # of their cross-entropies, nats; not finite where an output is not

    def means(self) -> dict[str, float]:
        """Top-1 and top-5 accuracy, percent, and the mean cross-entropy; NaN of no images."""
        sums = {"acc1": 100 * self.hits1, "acc5": 100 * self.hits5, "loss": self.loss_sum}
        return {name: value / self.count if self.count else math.nan for name, value in sums.items()}


@torch.inference_mode()
def run_network(
    session: Session,
    config: CfgNode,
    network: nn.Module,
    loader: DataLoader,
    precision: Precision,
    outputs: Sequence[int] | None = None,
    title: str = "Test: ",
    keep: Callable[[Tensor, Tensor], None] | None = None,
) -> Sums:
    """One pass over this process's batches: hits and loss are counted, summed over the processes once.

    Args:
        session: the run.
        config: views and batch size.
        network: the bare network, (B, 3, H, W) -> logits (B, outputs). Processes may have different numbers of
            batches, so its forward pass must not wait for other processes.
        loader: this process's batches, images (B, views, 3, H, W) and labels (B), from `build_eval_loader`.
        precision: how the forward pass computes.
        outputs: the network's outputs that are the classes of the data, by class index; None: all of them, in order.
        title: what log lines begin with.
        keep: gets the logits (B, K) and labels (B) of every batch, on the device.

    Raises StopRequested, on all processes, where one was asked to stop.
    """
    processes = session.processes
    network.eval()
    # Images, top-1 hits, top-5 hits, loss. Counts are exact in float64 up to 2**53.
    sums = torch.zeros(4, dtype=torch.float64, device=processes.device)

    def so_far() -> str:
        acc1, acc5, mean_loss = (sums[1:] / sums[0]).tolist()
        return f"loss {mean_loss:.4f}\tAcc@1 {100 * acc1:.3f}\tAcc@5 {100 * acc5:.3f}"

    size = config.DATA.BATCH_SIZE
    num_batches = math.ceil(len(loader.dataset) / size)
    for images, labels in evaluation_batches(session, loader, num_batches, size, title, so_far):
        logits = predict_batch(network, images, precision, config, outputs)
        if keep is not None:
            keep(logits, labels)
        hits = logits.topk(min(TOP, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=UNLABELLED)
        sums += torch.stack([(labels != UNLABELLED).sum(), hits[:, 0].sum(), hits.sum(), loss])
    count, hits1, hits5, loss_sum = sum_over_processes(sums, processes).tolist()
    return Sums(int(count), int(hits1), int(hits5), loss_sum)


def predict(
    session: Session,
    config: CfgNode,
    network: nn.Module,
    source: Source,
    precision: Precision,
    outputs: Sequence[int] | None = None,
    title: str = "Test: ",
) -> Predictions | None:
    """Predict every image of a source, on all processes together; the result is on the main one, None elsewhere.

    Whole batches are dealt out to the processes, so that every batch is made of the same images, and every prediction
    has the same bits, on any number of processes. With TEST.TTA, the softmax probabilities of an image's views are
    averaged. The source's labels may be -1, unknown; the other arguments are those of `run_network`.
    """
    processes = session.processes
    share = (processes.rank, processes.world_size, processes.device.type == "cuda")
    loader, batches = build_eval_loader(config, eval_dataset(config, source), *share)
    keep_logits = 4 * len(source.samples) * len(source.classes) <= MAX_LOGITS_BYTES
    nothing = torch.empty(0, device=processes.device)  # for a process that gets no batch
    parts = [summarize_batch(nothing.new_empty(0, len(source.classes)), nothing.long(), keep_logits)]

    def keep(logits: Tensor, labels: Tensor) -> None:
        parts.append(summarize_batch(logits, labels, keep_logits))

    run_network(session, config, network, loader, precision, outputs, title, keep)
    return _gather(session, source, parts, batches)


@torch.inference_mode()
def predict_batch(
    network: nn.Module,
    images: Tensor,
    precision: Precision,
    config: CfgNode,
    outputs: Sequence[int] | None = None,
) -> Tensor:
    """Logits (B, K) of images (B, views, 3, H, W): those of a single view, or such whose softmax is the views' mean."""
    flip = config.TEST.TTA in ("flip", "ten-crop")
    logits = []
    with precision.autocast():
        for view in normalize(images).unbind(1):
            logits.append(network(view).float())
            if flip:
                logits.append(network(view.flip(-1)).float())
    if outputs is not None:
        columns = torch.as_tensor(outputs, device=images.device)
        logits = [view[:, columns] for view in logits]
    if len(logits) == 1:
        return logits[0]
    return torch.stack([view.log_softmax(dim=1) for view in logits]).logsumexp(dim=0) - math.log(len(logits))


def class_probabilities(config: CfgNode, logits: Tensor) -> Tensor:
    """Logits (B, K) -> the probability of each class, float64: of the one of an image, or with MULTI_LABEL of any."""
    return logits.double().sigmoid() if config.DATA.MULTI_LABEL else logits.double().softmax(dim=1)


def summarize_batch(logits: Tensor, labels: Tensor, keep_logits: bool = False) -> dict[str, Tensor]:
    """What is kept of a batch, on the CPU: `Predictions` says what the entries are."""
    top = logits.topk(min(TOP, logits.shape[1])).indices
    log_probabilities = logits.double().log_softmax(dim=1)
    unknown = labels == UNLABELLED
    nll = -log_probabilities.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(unknown, math.nan)
    parts = {
        "labels": labels,
        "probabilities": nll.neg().exp().float(),
        "nll": nll.float(),
        "top": top,
        "top_probabilities": log_probabilities.gather(1, top).exp().float(),
    }
    if keep_logits:
        parts["logits"] = logits
    return {name: value.cpu() for name, value in parts.items()}


def _gather(
    session: Session, source: Source, parts: list[dict[str, Tensor]], batches: list[range]
) -> Predictions | None:
    """Bring the processes' rows together on the main one, in the order of the data set."""
    processes = session.processes
    columns: dict[str, np.ndarray] = {}
    for name in list(parts[0]):
        rows = gather_in_order(torch.cat([part.pop(name) for part in parts]), batches, processes)
        if rows is not None:
            columns[name] = rows.numpy()
    if not processes.is_main:
        return None
    paths = [relative_path(source, index) for index in range(len(source.samples))]
    return Predictions(paths, classes=list(source.classes), **columns)


def gather_in_order(own: Tensor, batches: Sequence[range], processes: Processes) -> Tensor | None:
    """A row of every image, on the main process in the order of the data set; None elsewhere.

    Args:
        own: this process's rows, on the CPU.
        batches: those of all processes, from `build_eval_loader`.
        processes: this process among all.
    """
    size = processes.world_size
    # The images of each process, in the order in which it saw them.
    shares = [[i for batch in batches[rank::size] for i in batch] for rank in range(size)]
    gathered = gather_on_main(own, [len(share) for share in shares], processes)
    if gathered is None:
        return None
    order = torch.tensor([index for share in shares for index in share])
    return torch.empty_like(gathered).index_copy_(0, order, gathered)


def relative_path(source: Source, index: int) -> str:
    """The path of an image below the folder of its split, or its name in the zip file."""
    path = source.samples[index][0]
    root = getattr(source, "root", None)
    return Path(path).relative_to(root).as_posix() if root is not None else path
