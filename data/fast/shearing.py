"""Shears and translations of timm's policies, computed line by line: Pillow's pixels in less than half of its time.

Each of them moves every row (or column) of an image along itself, by a distance of its own. Pillow's transform treats
them as any affine map, with sixteen neighbours for a pixel; four along the line are enough, with weights that all
pixels of a line share. Bicubic results are Pillow's to one of 255 levels, where one cuts off what the other does not;
other filters, which need fewer neighbours, and small images stay Pillow's.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from timm.data.auto_augment import AugmentOp
from torch import Tensor

_NAMES = ("ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "TranslateX", "TranslateY")
SMALLEST_EDGE = 100  # pixels; below, the calls cost more than Pillow does
# Added before fractions are cut off: four weights of float32 may sum to less than 1, and an even area keeps its level.
_ROUNDING = 1e-3


def shear_by_lines(ops: Sequence[AugmentOp]) -> None:
    """Let these operations of a policy, where they shear or translate, work line by line."""
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
            return shift_lines(image, level * (np.arange(lines) + 0.5), along_rows, fillcolor)
        return translate(image, level * length if self.name.endswith("Rel") else level, along_rows, fillcolor)


def shift_lines(image: Image.Image, distances: np.ndarray, along_rows: bool, fillcolor: Sequence[int]) -> Image.Image:
    """Each row (or column) of an RGB image, read from `distances` of its pixels further on.

    Pixel i of a line becomes the image at i + distance by Pillow's cubic, whose a is -1; neighbours beyond the border
    are the border's, and `fillcolor` is what lies outside.
    """
    packed = _packed_pixels(image) if along_rows else np.ascontiguousarray(_packed_pixels(image).T)
    lines, length = packed.shape
    whole = np.floor(distances).clip(-length, length)  # further on is nothing of the image
    # Lines that are longer by their borders' pixels, of which each gives the piece that it is weighted from.
    before, after = (int(max(0, shift)) for shift in (1 - whole.min(), 2 + whole.max()))
    longer = np.empty((lines, before + length + after), np.uint32)
    longer[:, :before], longer[:, before + length :] = packed[:, :1], packed[:, -1:]
    longer[:, before : before + length] = packed
    starts = longer.shape[1] * np.arange(lines) + before - 1 + whole.astype(np.int64)
    pieces = sliding_window_view(longer.ravel(), length + 3)[starts]

    pixels = _filter(pieces, torch.from_numpy(_cubic(distances - whole))[..., None], 1, length)
    first, end = np.ceil([-distances - 0.5, length - distances - 0.5]).astype(np.int32)[..., None]
    number = np.arange(length, dtype=np.int32)
    pixels[(number < first) | (number >= end)] = _packed_colour(fillcolor)
    return _to_image(pixels if along_rows else pixels.T)


def translate(image: Image.Image, distance: float, along_rows: bool, fillcolor: Sequence[int]) -> Image.Image:
    """`shift_lines` where all distances are the same: rows or columns are weighted as a whole, where there are any."""
    pixels = np.full(image.size[::-1], _packed_colour(fillcolor))
    length, axis = (image.width, 1) if along_rows else (image.height, 0)
    middles = np.arange(length) + 0.5 + distance
    inside = np.flatnonzero((middles >= 0) & (middles < length))
    if len(inside):
        first, end, whole = inside[0], inside[-1] + 1, math.floor(distance)
        neighbours = (np.arange(first - 1, end + 2) + whole).clip(0, length - 1)
        weights = torch.from_numpy(_cubic(np.array(distance - whole)))
        filtered = _filter(_packed_pixels(image).take(neighbours, axis), weights, axis, end - first)
        pixels[(slice(None),) * axis + (slice(first, end),)] = filtered
    return _to_image(pixels)


def _packed_pixels(image: Image.Image) -> np.ndarray:
    """(H, W) uint32 of an RGB image, a pixel each, which are gathered as one."""
    return np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32).reshape(image.size[::-1])


def _packed_colour(colour: Sequence[int]) -> np.ndarray:
    return np.array([*colour, 0], np.uint8).view(np.uint32)


def _to_image(packed: np.ndarray) -> Image.Image:
    return Image.frombytes("RGB", packed.shape[::-1], packed.tobytes(), "raw", "RGBX")


def _filter(packed: np.ndarray, weights: Tensor, axis: int, length: int) -> np.ndarray:
    """Sums of four neighbours along an axis, which is `length` + 3 long before, of packed pixels for each band."""
    bands = torch.from_numpy(packed.view(np.uint8)).float()
    step = 4 if axis == 1 else 1  # from one pixel to the next
    shifted = torch.full_like(bands.narrow(axis, 0, length * step), _ROUNDING)
    for neighbour, weight in enumerate(weights):
        shifted.addcmul_(bands.narrow(axis, neighbour * step, length * step), weight)
    # Cut off, not rounded, as Pillow does; by NumPy, which takes a fifth of torch's time.
    return shifted.clamp_(0, 255).numpy().astype(np.uint8).view(np.uint32)


def _cubic(d: np.ndarray) -> np.ndarray:
    """Weights (4, ...) of the neighbours at -1, 0, 1 and 2, for points at d of [0, 1) between 0 and 1, as float32."""
    square, cube = d * d, d * d * d
    return np.array([2 * square - cube - d, 1 - 2 * square + cube, d + square - cube, cube - square], np.float32)
