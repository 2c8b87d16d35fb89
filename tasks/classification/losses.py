"""The loss of labels, hard ones or mixed."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from yacs.config import CfgNode

from configs import UserError


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy whose term of class c counts weights[c] times: logits (B, K) -> mean over the B images.

    Args:
        weights: (K,).
        smoothing: label smoothing of targets that are labels (B,); targets (B, K) are taken as they are.

    torch's own mean divides by the weights of the batch, so that a rare class would count less where it is alone.
    """

    def __init__(self, weights: Tensor, smoothing: float) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = 0.0 if targets.is_floating_point() else self.smoothing
        options = dict(weight=self.weights, label_smoothing=smoothing, reduction="none")
        return F.cross_entropy(logits.float(), targets, **options).mean()


class FloatBinaryCrossEntropy(BinaryCrossEntropy):
    """timm's, in float32: under autocast it would make its targets in the type of the logits."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().forward(logits.float(), targets)


def build_criterion(config: CfgNode, mixed: bool, counts: Sequence[int]) -> nn.Module:
    """(logits (B, K), labels (B,) or mixed targets (B, K)) -> mean loss. Mixed targets are smoothed already.

    Args:
        config: LOSS, and MODEL.LABEL_SMOOTHING.
        mixed: mixup or cutmix makes the targets.
        counts: training images of each of the K classes.

    Raises UserError for weights or a threshold that do not fit the classes.
    """
    smoothing, weights = config.MODEL.LABEL_SMOOTHING, class_weights(config, counts)
    if config.LOSS.NAME == "bce":
        check_threshold(config, len(counts))
        return FloatBinaryCrossEntropy(smoothing, target_threshold=config.LOSS.BCE_THRESHOLD, weight=weights)
    if weights is not None:
        return WeightedCrossEntropy(weights, smoothing)
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss()


def class_weights(config: CfgNode, counts: Sequence[int]) -> Tensor | None:
    """LOSS.CLASS_WEIGHTS, (K,); None where it is ''.

    'balanced' is N / (K * n) for a class of n of the N images: every class counts the same in an epoch. 'effective' is
    (1 - beta) / (1 - beta ** n), times what makes their mean 1 ("Class-Balanced Loss Based on Effective Number of
    Samples", arXiv 1901.05555). A class without images counts as one image.
    """
    chosen = config.LOSS.CLASS_WEIGHTS
    if not chosen:
        return None
    images = torch.tensor(counts, dtype=torch.float64)
    if chosen == "balanced":
        weights = images.sum() / (len(counts) * images.clamp(min=1))
    elif chosen == "effective":
        beta = config.LOSS.EFFECTIVE_BETA
        weights = (1 - beta) / (1 - beta ** images.clamp(min=1))
        weights /= weights.mean()
    elif len(chosen) == len(counts):
        weights = torch.tensor(chosen)
    else:
        raise UserError(f"LOSS.CLASS_WEIGHTS: has {len(chosen)} weights for {len(counts)} classes; give one for each")
    return weights.float()


def check_threshold(config: CfgNode, num_classes: int) -> None:
    """Raise UserError where LOSS.BCE_THRESHOLD makes a target of every class, or of none."""
    threshold, smoothing = config.LOSS.BCE_THRESHOLD, config.MODEL.LABEL_SMOOTHING
    if threshold is None:
        return
    lowest = smoothing / num_classes
    highest = 1 - smoothing + lowest
    if not lowest <= threshold < highest:
        raise UserError(
            f"LOSS.BCE_THRESHOLD = {threshold}: with MODEL.LABEL_SMOOTHING = {smoothing} the targets of {num_classes} "
            f"classes lie between {lowest:g} and {highest:g}, so that all or none exceed it; set one between, or "
            "MODEL.LABEL_SMOOTHING 0"
        )
