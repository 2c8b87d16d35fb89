"""What a confusion matrix says: IoU and accuracy of each class, and their means."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .folders import IGNORED


def confusion_matrix(predicted: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """int64 (K, K) of an image: rows are true classes, columns predicted ones.

    `predicted` and `classes` have one shape and hold any integers. IGNORED true classes do not count.
    """
    counted = classes != IGNORED
    cells = num_classes * classes[counted].long() + predicted[counted].long()
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class Summary:
    """Percent; NaN of nothing. By class (K,): `iou` and `accuracy`, and pixels that are of it, and predicted to be."""

    miou: float
    mean_acc: float
    pixel_acc: float
    iou: Tensor
    accuracy: Tensor
    pixels: Tensor
    predicted: Tensor

    def as_dict(self) -> dict[str, float]:
        return {"miou": self.miou, "mean_acc": self.mean_acc, "pixel_acc": self.pixel_acc}

    def line(self) -> str:
        return f"mIoU {self.miou:.3f} mean accuracy {self.mean_acc:.3f} pixel accuracy {self.pixel_acc:.3f}"


def summarize(confusion: Tensor, absent: str = "skip") -> Summary:
    """The numbers of a confusion matrix, int64 (K, K).

    IoU is intersection over union of the pixels of a class and those predicted to be, accuracy the share of a class's
    pixels that are found. Means are over the classes that have pixels. A class that has none but is predicted has the
    IoU 0: with `absent` 'zero' it counts in mIoU (mmsegmentation's convention), with 'skip' it does not.
    """
    hits, pixels, predicted = confusion.diag().double(), confusion.sum(1).double(), confusion.sum(0).double()
    iou, accuracy = 100 * hits / (pixels + predicted - hits), 100 * hits / pixels  # NaN of 0 / 0
    return Summary(
        miou=(iou[pixels > 0] if absent == "skip" else iou).nanmean().item(),
        mean_acc=accuracy.nanmean().item(),
        pixel_acc=(100 * hits.sum() / pixels.sum()).item(),
        iou=iou,
        accuracy=accuracy,
        pixels=confusion.sum(1),
        predicted=confusion.sum(0),
    )
