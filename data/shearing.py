"""Shears and translations of timm's policies, computed line by line: Pillow's pixels in a third of its time.

Each of them moves every row (or column) of an image along itself, by a distance of its own. Pillow's transform treats
them as any affine map, with sixteen neighbours for a pixel; four along the line are enough, with weights that all
pixels of a line share. Results are Pillow's to one of 255 levels, where float32 rounds differently.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp

# Added before fractions are cut off: four weights of float32 may sum to less than 1, and an even area keeps its level.
_ROUNDING = 1e-3

# What the operation's level means: how far line number i, whose middle is at i + 0.5, moves in an image of this length.
_DISTANCES: dict[str, Callable[[float, np.ndarray, int], np.ndarray]] = {
    "Shear": lambda level, middles, length: level * middles,
    "TranslateRel": lambda level, middles, length: np.full_like(middles, level * length),
    "Translate": lambda level, middles, length: np.full_like(middles, level),
}
_OPERATIONS = {
    "ShearX": ("Shear", True),
    "ShearY": ("Shear", False),
    "TranslateXRel": ("TranslateRel", True),
    "TranslateYRel": ("TranslateRel", False),
    "TranslateX": ("Translate", True),
    "TranslateY": ("Translate", False),
}


def shear_by_lines(ops: Sequence[AugmentOp]) -> None:
    """Let these operations of a policy, where they shear or translate, work line by line."""
    for op in ops:
        if op.name in _OPERATIONS:
            op.aug_fn = LineShift(op.name, op.aug_fn)


class LineShift:
    """One of timm's shears and translations, called as timm calls them; other filters than two are left to Pillow.

    A class, because loader workers may need to pickle it.
    """

    def __init__(self, name: str, by_pillow: Callable[..., Image.Image]) -> None:
        self.name = name
        self.by_pillow = by_pillow

    def __call__(self, image: Image.Image, level: float, *, fillcolor: Sequence[int], resample: Any) -> Image.Image:
        if isinstance(resample, (list, tuple)):  # timm's way to draw one
            resample = random.choice(resample)
        if resample not in _WEIGHTS or image.mode != "RGB":
            return self.by_pillow(image, level, fillcolor=fillcolor, resample=resample)
        kind, along_rows = _OPERATIONS[self.name]
        lines, length = reversed(image.size) if along_rows else image.size
        distances = _DISTANCES[kind](level, np.arange(lines) + 0.5, length)
        return shift_lines(image, distances, along_rows, fillcolor, resample)


def shift_lines(
    image: Image.Image, distances: np.ndarray, along_rows: bool, fillcolor: Sequence[int], resample: int
) -> Image.Image:
    """Each row (or column) of an RGB image, read from `distances` of its pixels further on.

    Pixel i of a line becomes the image at i + distance, interpolated by `resample`, Pillow's BILINEAR or BICUBIC (its
    cubic of a = -1); neighbours beyond the border are the border's, and `fillcolor` is what lies outside.
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
    weights = torch.from_numpy(_WEIGHTS[resample](distances - whole).astype(np.float32))
    shifted = torch.full((lines, 4 * length), _ROUNDING)
    for neighbour in range(4):
        shifted.addcmul_(bands[:, 4 * neighbour :][:, : 4 * length], weights[:, neighbour : neighbour + 1])
    pixels = shifted.clamp_(0, 255).to(torch.uint8).numpy().view(np.uint32)  # cut off, not rounded, as Pillow does
    middles = np.arange(length) + 0.5 + distances[:, None]
    pixels[(middles < 0) | (middles >= length)] = np.array([*fillcolor, 0], np.uint8).view(np.uint32)
    return Image.frombytes("RGB", image.size, (pixels if along_rows else pixels.T).tobytes(), "raw", "RGBX")


def _cubic(d: np.ndarray) -> np.ndarray:
    return np.stack([-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2], axis=1)


def _linear(d: np.ndarray) -> np.ndarray:
    return np.stack([0 * d, 1 - d, d, 0 * d], axis=1)


# Weights (lines, 4) of the neighbours at -1, 0, 1 and 2, for a point at d of [0, 1) between 0 and 1.
_WEIGHTS = {Image.Resampling.BICUBIC: _cubic, Image.Resampling.BILINEAR: _linear}
