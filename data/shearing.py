"""Shears and translations of timm's policies, computed line by line: Pillow's pixels in half of its time.

Each of them moves every row (or column) of an image along itself, by a distance of its own. Pillow's transform treats
them as any affine map, with sixteen neighbours for a pixel; four along the line are enough, with weights that all
pixels of a line share. Bicubic results are Pillow's to one of 255 levels, where one cuts off what the other does not;
other filters, which need fewer neighbours, and small images stay Pillow's.
"""

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
            distances = level * (np.arange(lines) + 0.5)
        else:
            distances = np.full(lines, level * length if self.name.endswith("Rel") else level)
        return shift_lines(image, distances, along_rows, fillcolor)


def shift_lines(image: Image.Image, distances: np.ndarray, along_rows: bool, fillcolor: Sequence[int]) -> Image.Image:
    """Each row (or column) of an RGB image, read from `distances` of its pixels further on.

    Pixel i of a line becomes the image at i + distance by Pillow's cubic, whose a is -1; neighbours beyond the border
    are the border's, and `fillcolor` is what lies outside.
    """
    width, height = image.size
    lines, length = (height, width) if along_rows else (width, height)
    packed = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)  # a pixel each, which are gathered as one
    whole = np.floor(distances)
    neighbours = np.arange(-1, length + 2) + whole.astype(np.int64)[:, None]
    neighbours.clip(0, length - 1, out=neighbours)
    number = np.arange(lines)[:, None]
    gathered = packed.take(neighbours + number * width if along_rows else neighbours * width + number)

    bands = torch.from_numpy(gathered.view(np.uint8)).float()  # (lines, 4 * (length + 3))
    weights = torch.from_numpy(_cubic(distances - whole).astype(np.float32))
    shifted = torch.full((lines, 4 * length), _ROUNDING)
    for neighbour in range(4):
        shifted.addcmul_(bands[:, 4 * neighbour :][:, : 4 * length], weights[:, neighbour : neighbour + 1])
    pixels = shifted.clamp_(0, 255).to(torch.uint8).numpy().view(np.uint32)  # cut off, not rounded, as Pillow does

    middles = np.arange(length) + 0.5 + distances[:, None]
    pixels[(middles < 0) | (middles >= length)] = np.array([*fillcolor, 0], np.uint8).view(np.uint32)
    return Image.frombytes("RGB", image.size, (pixels if along_rows else pixels.T).tobytes(), "raw", "RGBX")


def _cubic(d: np.ndarray) -> np.ndarray:
    """Weights (lines, 4) of the neighbours at -1, 0, 1 and 2, for a point at d of [0, 1) between 0 and 1."""
    return np.stack([-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2], axis=1)
