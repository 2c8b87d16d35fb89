"""Shears and translations of timm's policies, computed line by line: Pillow's pixels in half of its time.

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
from PIL import Image
from timm.data.auto_augment import AugmentOp

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
    width, height = image.size
    lines, length = (height, width) if along_rows else (width, height)
    packed = _packed_pixels(image)
    whole = np.floor(distances)
    neighbours = np.arange(-1, length + 2) + whole.astype(np.int64)[:, None]
    neighbours.clip(0, length - 1, out=neighbours)
    number = np.arange(lines)[:, None]
    gathered = packed.take(neighbours + number * width if along_rows else neighbours * width + number)

    weights = torch.from_numpy(_cubic(distances - whole).astype(np.float32))
    pixels = _filter(gathered, weights.T[..., None], 1, length)
    middles = np.arange(length) + 0.5 + distances[:, None]
    pixels[(middles < 0) | (middles >= length)] = _packed_colour(fillcolor)
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
        weights = _cubic(np.array([distance - whole]))[0].tolist()
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


def _filter(packed: np.ndarray, weights: Sequence[Any], axis: int, length: int) -> np.ndarray:
    """Sums of four neighbours along an axis, which is `length` + 3 long before, of packed pixels for each band."""
    bands = torch.from_numpy(packed.view(np.uint8)).float()
    step = 4 if axis == 1 else 1  # from one pixel to the next
    shifted = torch.full_like(bands.narrow(axis, 0, length * step), _ROUNDING)
    for neighbour, weight in enumerate(weights):
        shifted.addcmul_(bands.narrow(axis, neighbour * step, length * step), torch.as_tensor(weight))
    # Cut off, not rounded, as Pillow does; by NumPy, which takes a fifth of torch's time.
    return shifted.clamp_(0, 255).numpy().astype(np.uint8).view(np.uint32)


def _cubic(d: np.ndarray) -> np.ndarray:
    """Weights (lines, 4) of the neighbours at -1, 0, 1 and 2, for a point at d of [0, 1) between 0 and 1."""
    return np.stack([-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2], axis=1)
