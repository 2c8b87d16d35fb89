"""The pass over images that validation and test.py share: class maps, and the confusion matrix over all processes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from configs import with_values
from data import build_eval_loader, normalize
from utils.evaluation import evaluation_batches
from utils.precision import Precision
from utils.processes import Processes, sum_over_processes
from utils.session import Session

from .folders import MaskedImages
from .heads import resize
from .metrics import confusion_matrix, summarize
from .transforms import EvaluationImages

Keep = Callable[[int, Tensor, Tensor], None]  # gets an image's index, predicted classes (H, W) and confusion (K, K)


def evaluation_loader(
    config: CfgNode, images: MaskedImages, processes: Processes, keep_workers: bool = False
) -> DataLoader:
    """This process's share of the images, one at a time: padding would reach the attention of the others."""
    single = with_values(config, {"DATA.BATCH_SIZE": 1})
    share = (processes.rank, processes.world_size, processes.device.type == "cuda")
    return build_eval_loader(single, EvaluationImages(config, images), *share, _only, keep_workers)[0]


def _only(samples: list[Any]) -> Any:
    (sample,) = samples
    return sample


@torch.inference_mode()
def confusion_of(
    session: Session,
    config: CfgNode,
    network: nn.Module,
    loader: DataLoader,
    precision: Precision,
    keep: Keep | None = None,
) -> Tensor:
    """Confusion matrix (K, K) of all processes' images, int64 on the CPU: rows are true classes, columns predicted.

    Whole numbers add up to the same sum in any order, so the number of processes makes no difference.
    Raises StopRequested, on all processes, where one was asked to stop.
    """
    processes = session.processes
    network.eval()
    num_classes = config.MODEL.GMA.NUM_CLASSES
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=processes.device)

    def so_far() -> str:
        return summarize(confusion.cpu(), config.TEST.ABSENT_CLASSES).line()

    for sample in evaluation_batches(session, loader, len(loader.dataset), 1, fields=so_far):
        classes = sample["classes"]
        predicted = predict_classes(config, network, sample["views"], classes.shape, precision)
        of_image = confusion_matrix(predicted, classes, num_classes)
        confusion += of_image
        if keep is not None:
            keep(sample["index"], predicted, of_image)
    return sum_over_processes(confusion, processes).cpu()


@torch.inference_mode()
def predict_classes(
    config: CfgNode, network: nn.Module, views: list[Tensor], size: tuple[int, int], precision: Precision
) -> Tensor:
    """The most probable class of each pixel, int64 of this size (H, W).

    Args:
        config: TEST says whether by windows, and whether mirrored as well.
        network: in evaluation mode, (1, 3, h, w) -> logits (1, K, h, w).
        views: the image at several scales, uint8 (h, w, 3) on the network's device.
        size: height and width of the mask.
        precision: how the network computes.

    The softmax of several scales and of the mirrored image is averaged at the mask's size.
    """
    logits = [_at_size(x, size) for view in views for x in _of_view(config, network, view, precision)]
    if len(logits) == 1:
        return logits[0].argmax(0)
    total = logits[0].softmax(0)
    for other in logits[1:]:
        total += other.softmax(0)
    return total.argmax(0)


def _at_size(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return (logits if logits.shape[2:] == size else resize(logits, size))[0]


def _of_view(config: CfgNode, network: nn.Module, view: Tensor, precision: Precision) -> Iterator[Tensor]:
    """Logits (1, K, h, w) of a view, and with TEST.FLIP those of the mirrored one, mirrored back."""
    image = normalize(view[None])
    yield _logits(config, network, image, precision)
    if config.TEST.FLIP:
        yield _logits(config, network, image.flip(-1), precision).flip(-1)


def _logits(config: CfgNode, network: nn.Module, image: Tensor, precision: Precision) -> Tensor:
    """(1, 3, h, w) -> (1, K, h, w) float32, at once or as the mean over the windows that cover a pixel."""

    def run(pixels: Tensor) -> Tensor:
        with precision.autocast():
            return network(pixels).float()

    if config.TEST.MODE == "whole":
        return run(image)
    height, width = image.shape[2:]
    window = [min(size, edge) for size, edge in zip(config.TEST.WINDOW, (height, width))]
    total, count = None, image.new_zeros(1, 1, height, width)
    for top in window_starts(height, window[0], config.TEST.STRIDE[0]):
        for left in window_starts(width, window[1], config.TEST.STRIDE[1]):
            area = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = run(image[area])
            total = logits.new_zeros(1, logits.shape[1], height, width) if total is None else total
            total[area] += logits
            count[area] += 1
    return total / count


def window_starts(edge: int, window: int, stride: int) -> list[int]:
    """Where windows begin so that they cover an edge: every `stride` pixels, the last one flush with the end."""
    return [min(start, edge - window) for start in range(0, max(edge - window + stride, 1), stride)]
