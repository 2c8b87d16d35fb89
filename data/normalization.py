"""Pixels to network input and back."""

from functools import cache

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 batch (B, H, W, 3) -> normalised float32 (B, 3, H, W), on its device; float batches pass, as they are that.

    Views (B, views, H, W, 3) become (B, views, 3, H, W). Grey images have 1 channel instead of 3. The arithmetic is
    that of torchvision's ToTensor and Normalize, bit for bit.
    """
    if images.dtype != torch.uint8:
        return images
    mean, std = _mean_and_std(images.device, images.shape[-1])
    # Colours stay side by side in memory, channels last, which the network asks for.
    return images.movedim(-1, -3).float().div_(255).sub_(mean).div_(std)


def pixel_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of ImageNet's pixels; of one channel, grey: the means over the three colours."""
    if channels == 3:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)


@cache
def _mean_and_std(device: torch.device, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(channels, 1, 1) each; kept, because a copy to a GPU waits for all its work, and this would be one a batch."""
    mean, std = (torch.tensor(values, device=device) for values in pixel_statistics(channels))
    return mean.view(-1, 1, 1), std.view(-1, 1, 1)


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """Normalised images (B, 3 or 1, H, W) -> values in [0, 1], to look at."""
    mean, std = _mean_and_std(images.device, images.shape[1])
    return (images * std + mean).clamp(0, 1)
