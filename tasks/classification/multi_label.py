"""Images of several classes, or none: DATA.MULTI_LABEL. Binary cross-entropy; mean average precision decides.

N images, K classes. Label files name the classes (`data.label_files`).
"""

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from configs import UserError
from data import Source, build_eval_loader
from data.label_files import BETWEEN_CLASSES
from utils.evaluation import evaluation_batches
from utils.files import write_json, write_rows
from utils.precision import Precision
from utils.processes import run_on_main_and_broadcast
from utils.session import Session

from .images import eval_dataset
from .inference import gather_in_order, predict_batch, relative_path
from .validation_sets import ValidationSet

TABLE = (("mAP", "map", 3), ("loss", "loss", 4))  # title, key, decimals

# What is made for one class an image, with the values that turn it off; refused, not dropped.
_OFF = {
    "AUG.MIXUP": 0,
    "AUG.CUTMIX": 0,
    "AUG.CUTMIX_MINMAX": None,
    "MODEL.LABEL_SMOOTHING": 0,
    "DATA.CLASS_BALANCE": 0,
    "LOSS.CLASS_WEIGHTS": "",
    "LOSS.BCE_THRESHOLD": None,
    "DISTILL.TEACHER": "",
}


def check_recipe(config: CfgNode) -> None:
    """Raise UserError where the recipe of a training run does not go with several classes an image."""
    wrong = [name for name, off in _OFF.items() if attrgetter(name)(config) != off]
    if wrong:
        off = " ".join(f"{name} {_OFF[name]!r}" for name in wrong)
        raise UserError(f"DATA.MULTI_LABEL: takes no {', '.join(wrong)}; set {off}")


def check_evaluation(config: CfgNode) -> None:
    """Raise UserError for what test.py does for one class an image only."""
    for asked, what in ((config.TEST.TTA != "none", "--tta"), (config.TEST.VAL_SET, "--val-set")):
        if asked:
            raise UserError(f"DATA.MULTI_LABEL: {what} is for one class an image; leave it out")


def validate(
    session: Session,
    config: CfgNode,
    network: nn.Module,
    loader: DataLoader,
    batches: Sequence[range],
    precision: Precision,
) -> dict[str, float]:
    """The numbers of `numbers_of` on the validation images; loader and batches are `build_eval_loader`'s."""
    rows = run_network(session, config, network, loader, batches, precision)
    numbers = run_on_main_and_broadcast(lambda: numbers_of(*rows)[0], session.processes)
    session.logger.info(last_line(numbers))
    return numbers


@torch.inference_mode()
def run_network(
    session: Session,
    config: CfgNode,
    network: nn.Module,
    loader: DataLoader,
    batches: Sequence[range],
    precision: Precision,
    title: str = "Test: ",
) -> tuple[np.ndarray, np.ndarray] | None:
    """Logits (N, K) float32 and targets (N, K) bool of all images, in their order, on the main process; else None."""
    network.eval()
    parts = []
    for images, targets in evaluation_batches(session, loader, len(batches), config.DATA.BATCH_SIZE, title):
        parts.append(torch.stack([predict_batch(network, images, precision, config), targets], dim=1).cpu())
    own = torch.cat(parts) if parts else torch.empty(0, 2, len(loader.dataset.classes))
    rows = gather_in_order(own, batches, session.processes)
    return None if rows is None else (rows[:, 0].numpy(), rows[:, 1].numpy() > 0)


def numbers_of(logits: np.ndarray, targets: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """mAP and loss, and the average precision of every class.

    Args:
        logits: (N, K).
        targets: (N, K) bool.

    Returns {'map': percent, the mean over the classes that have images; 'loss': the mean binary cross-entropy}, and
    (K,) percents, NaN for a class without images. All are NaN where a logit is not finite.
    """
    from sklearn.metrics import average_precision_score  # imported lazily: slow

    precisions = np.full(targets.shape[1], math.nan)
    if not np.isfinite(logits).all():
        return {"map": math.nan, "loss": math.nan}, precisions
    for label in np.flatnonzero(targets.any(axis=0)):
        precisions[label] = 100 * average_precision_score(targets[:, label], logits[:, label])
    loss = F.binary_cross_entropy_with_logits(torch.from_numpy(logits).double(), torch.from_numpy(targets).double())
    found = precisions[~np.isnan(precisions)]
    return {"map": float(found.mean()) if len(found) else math.nan, "loss": float(loss)}, precisions


def evaluate(
    session: Session,
    config: CfgNode,
    network: nn.Module,
    images: ValidationSet,
    precision: Precision,
    about: dict[str, Any],
    folder: Path,
    title: str,
) -> dict[str, Any]:
    """Evaluate at one size and write metrics.json, per_class.csv and predictions.csv to `folder`.

    Returns what metrics.json holds, on every process: `about`, and the numbers. UserError where an output is not
    finite.
    """
    processes, source = session.processes, images.source
    share = (processes.rank, processes.world_size, processes.device.type == "cuda")
    loader, batches = build_eval_loader(config, eval_dataset(config, source), *share)
    rows = run_network(session, config, network, loader, batches, precision, title)

    def conclude() -> dict[str, Any]:
        logits, targets = rows
        numbers, precisions = numbers_of(logits, targets)
        if math.isnan(numbers["loss"]):
            raise UserError(f"{about['weights']}: gives outputs that are not finite; weights or AMP_DTYPE are at fault")
        counts = targets.sum(axis=0)
        sizes = {"images": len(targets), "classes": len(counts), "classes_with_images": int(np.count_nonzero(counts))}
        summary = about | sizes | numbers
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shown = ["" if math.isnan(value) else f"{value:.6g}" for value in precisions]
            per_class = zip(range(len(counts)), source.classes, counts.tolist(), shown)
            write_rows(folder / "per_class.csv", ("class", "name", "images", "average_precision"), per_class)
            write_rows(
                folder / "predictions.csv", ("path", "labels", "predicted"), _predictions(source, logits, targets)
            )
            write_json(str(folder / "metrics.json"), summary)
        except OSError as error:
            raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
        session.logger.info(f"loss {numbers['loss']:.4f}; predictions, precision by class and metrics are in {folder}")
        return summary

    return run_on_main_and_broadcast(conclude, processes)


def last_line(numbers: dict[str, Any]) -> str:
    """What test.py, and every validation, ends with."""
    return f" * mAP {numbers['map']:.3f}"


def _predictions(source: Source, logits: np.ndarray, targets: np.ndarray) -> Iterable[tuple[str, str, str]]:
    """Path, names of the classes, and of those with a probability above 1/2, of every image."""

    def names(row: np.ndarray) -> str:
        return BETWEEN_CLASSES.join(source.classes[label] for label in np.flatnonzero(row))

    for index, (scores, classes) in enumerate(zip(logits, targets)):
        yield relative_path(source, index), names(classes), names(scores > 0)
