"""What turns a backbone's four maps into classes: Semantic FPN, UPerNet, and the auxiliary FCN head.

Shapes below: B images, K classes, maps (B, C_i, H_i, W_i) at strides 4, 8, 16, 32. Sizes round up at every stride, so
maps are resized to the size of the next finer one, not by a factor of 2.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOL_SIZES = (1, 2, 3, 6)  # cells along an edge, of UPerNet's pyramid pooling
AUX_CHANNELS = 256
FPN_HEAD_CHANNELS = 128


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, (B, C, H, W) -> (B, C, *size)."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _conv(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU; sizes stay."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def _classifier(in_channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    layer = nn.Conv2d(in_channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Dropout2d(dropout), layer)


class SemanticFPN(nn.Module):
    """Kirillov et al., Panoptic Feature Pyramid Networks (arXiv 1901.02446): maps -> (B, K, H_1, W_1).

    Args:
        in_channels: of the maps.
        num_classes: K.
        channels: of the pyramid; the head on it has half as many.
        dropout: before the classifier.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        head = channels // 2
        # A level at stride 4 * 2**i comes down in i steps, each a convolution and a resizing; the finest has one of the
        # former and none of the latter.
        self.steps = nn.ModuleList(
            nn.ModuleList(_conv(channels if step == 0 else head, head, 3) for step in range(max(1, level)))
            for level in range(len(in_channels))
        )
        _initialize(self)
        self.classifier = _classifier(head, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], levels[i - 1].shape[2:])  # nearest, as in FPN
        sizes = [level.shape[2:] for level in levels]
        total: Tensor | None = None
        for i, (output, steps) in enumerate(zip(self.output, self.steps)):
            x = output(levels[i])
            for number, step in enumerate(steps):
                x = step(x)
                if i > 0:
                    x = resize(x, sizes[i - 1 - number])
            total = x if total is None else total + x
        return self.classifier(total)


class UPerNet(nn.Module):
    """Xiao et al., Unified Perceptual Parsing (arXiv 1807.10221): maps -> (B, K, H_1, W_1). Arguments as SemanticFPN's.

    In training, batch norm of the 1 x 1 pooled map needs more than one image.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.pooled = nn.ModuleList(_conv(coarsest, channels, 1) for _ in POOL_SIZES)
        self.bottleneck = _conv(coarsest + len(POOL_SIZES) * channels, channels, 3)
        self.lateral = nn.ModuleList(_conv(c, channels, 1) for c in finer)
        self.output = nn.ModuleList(_conv(channels, channels, 3) for _ in finer)
        self.fuse = _conv(len(in_channels) * channels, channels, 3)
        _initialize(self)
        self.classifier = _classifier(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *finer, last = maps
        pooled = [conv(F.adaptive_avg_pool2d(last, cells)) for cells, conv in zip(POOL_SIZES, self.pooled)]
        top = self.bottleneck(torch.cat([last, *(resize(x, last.shape[2:]) for x in pooled)], dim=1))
        levels = [*(lateral(x) for lateral, x in zip(self.lateral, finer)), top]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[2:])
        levels = [*(output(x) for output, x in zip(self.output, levels)), levels[-1]]
        finest = levels[0].shape[2:]
        return self.classifier(self.fuse(torch.cat([levels[0], *(resize(x, finest) for x in levels[1:])], dim=1)))


class FCNHead(nn.Sequential):
    """One convolution and a classifier on one map: (B, C, H, W) -> (B, K, H, W). It helps the training only."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(_conv(in_channels, AUX_CHANNELS, 3), _classifier(AUX_CHANNELS, num_classes, dropout))
        nn.init.kaiming_normal_(self[0][0].weight, mode="fan_out", nonlinearity="relu")


def _initialize(head: nn.Module) -> None:
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
