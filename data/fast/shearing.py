"""Shears and translations of timm's policies, computed line by line: Pillow's pixels in a third of its time.

They move each row (or column) of an image along itself, by a distance of its own. Pillow weights sixteen neighbours for
each pixel, as for any affine map. Four along the line are enough, with the same weights for all pixels of a line.
Bicubic results differ from Pillow's by at most 1 of 255 levels. Other filters and small images are left to Pillow.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from timm.data.auto_augment import AugmentOp

_NAMES = ("ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "TranslateX", "TranslateY")
SMALLEST_EDGE = 100  # pixels; below, the calls cost more than Pillow does
# Added before fractions are cut off: four weights of float32 may sum to less than 1, and an even area keeps its level.
_ROUNDING = 1e-3


def policy_ops(step: Any) -> list[AugmentOp]:
    """The operations that a step of timm's transforms draws from; none if the step is not a policy."""
    pairs = getattr(step, "policy", [])  # AutoAugment: pairs of operations
    return [*getattr(step, "ops", []), *(op for pair in pairs for op in pair)]


def shear_by_lines(ops: Sequence[AugmentOp]) -> None:
    """Let these operations of a policy, if they shear or translate, work line by line."""
    for op in ops:
        if op.name in _NAMES:
            op.aug_fn = LineShift(op.name, op.aug_fn)


class LineShift:
    """One of timm's shears and translations, called as timm calls them.

    A class, because loader workers may need to pickle it.
    """

    def __init__(self, name: str, by_pillow: Callable[..., Image.Image]) -> None:
        self.name = name
        self.by_pillow = by_pillow

    def __call__(self, image: Image.Image, level: float, *, fillcolor: Sequence[int], resample: Any) -> Image.Image:
        if isinstance(resample, (list, tuple)):  # timm's way to draw one
            resample = random.choice(resample)
        if resample != Image.Resampling.BICUBIC or image.mode != "RGB" or min(image.size) < SMALLEST_EDGE:
            return self.by_pillow(image, level, fillcolor=fillcolor, resample=resample)
        along_rows = "X" in self.name
        length, lines = image.size if along_rows else reversed(image.size)
        if self.name.startswith("Shear"):
            distances = level * (np.arange(lines) + 0.5)
        else:
            distances = np.full(lines, level * length if self.name.endswith("Rel") else level)
        return shift_lines(image, distances, along_rows, fillcolor)


def shift_lines(image: Image.Image, distances: np.ndarray, along_rows: bool, fillcolor: Sequence[int]) -> Image.Image:
    """Each row (or column) of an RGB image, read from `distances` of its pixels further on.

    Pixel i of a line becomes the image at i + distance, by Pillow's cubic (a = -1). Beyond the border, neighbours are
    the border's pixel. Pixels that come from outside the image are `fillcolor`.
    """
    # A pixel is one uint32, so that it is gathered as one.
    packed = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32).reshape(image.size[::-1])
    packed = packed if along_rows else np.ascontiguousarray(packed.T)
    lines, length = packed.shape
    whole = np.floor(distances).clip(-length, length)  # further on is nothing of the image
    # Lines with their border pixels repeated. Of each line, the piece is gathered that is weighted.
    before, after = (int(max(0, shift)) for shift in (1 - whole.min(), 2 + whole.max()))
    longer = np.empty((lines, before + length + after), np.uint32)
    longer[:, :before], longer[:, before + length :] = packed[:, :1], packed[:, -1:]
    longer[:, before : before + length] = packed
    starts = longer.shape[1] * np.arange(lines) + before - 1 + whole.astype(np.int64)
    pieces = sliding_window_view(longer.ravel(), length + 3)[starts]

    bands = torch.from_numpy(pieces.view(np.uint8)).float()  # (lines, 4 * (length + 3)): four bytes a pixel
    shifted = torch.full((lines, 4 * length), _ROUNDING)
    for neighbour, weight in enumerate(torch.from_numpy(_cubic(distances - whole))[..., None]):
        shifted.addcmul_(bands.narrow(1, 4 * neighbour, 4 * length), weight)
    # Cut off, not rounded, as Pillow does; by NumPy, which takes a fifth of torch's time.
    pixels = shifted.clamp_(0, 255).numpy().astype(np.uint8).view(np.uint32)

    first, end = np.ceil([-distances - 0.5, length - distances - 0.5]).astype(np.int32)[..., None]
    number = np.arange(length, dtype=np.int32)
    pixels[(number < first) | (number >= end)] = np.array([*fillcolor, 0], np.uint8).view(np.uint32)
    pixels = pixels if along_rows else pixels.T
    return Image.frombytes("RGB", image.size, pixels.tobytes(), "raw", "RGBX")


def _cubic(d: np.ndarray) -> np.ndarray:
    """Weights (4, ...) of the neighbours at -1, 0, 1 and 2, for points at d of [0, 1) between 0 and 1, as float32."""
    square, cube = d * d, d * d * d
    return np.array([2 * square - cube - d, 1 - 2 * square + cube, d + square - cube, cube - square], np.float32)
