"""Class maps as pictures: a colour for each class, over the image, with a legend."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .folders import IGNORED

_OPACITY = 0.6  # of the colours over the image
_GOLDEN = 0.618034  # of a turn from each hue to the next one: neighbours differ, and none comes twice
_ROW, _FONT = 20, 13  # height of a legend's line and its text, pixels
_LEGEND_WIDTH = 190


def palette(num_classes: int) -> np.ndarray:
    """uint8 (K, 3), the same for a class whatever their number."""
    colours = [
        colorsys.hsv_to_rgb(i * _GOLDEN % 1, 0.9 - 0.35 * (i // 3 % 2), 1.0 - 0.35 * (i // 6 % 2))
        for i in range(num_classes)
    ]
    return np.rint(255 * np.array(colours)).astype(np.uint8).reshape(-1, 3)


def paint(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """A class map (H, W) in colours, uint8 (H, W, 3); ignored pixels are black."""
    painted = palette(num_classes)[np.maximum(classes, 0)]
    painted[classes == IGNORED] = 0
    return painted


def overlay(image: Image.Image, classes: np.ndarray, num_classes: int) -> Image.Image:
    """The image with its class map's colours over it, of the image's size."""
    painted = Image.fromarray(paint(classes, num_classes)).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image, painted, _OPACITY)


def with_legend(picture: Image.Image, names: Sequence[str], shown: Sequence[tuple[int, str]]) -> Image.Image:
    """The picture with a line for each (class, note) at its right."""
    canvas = Image.new("RGB", (picture.width + _LEGEND_WIDTH, max(picture.height, _ROW * len(shown))), "white")
    canvas.paste(picture)
    draw, font, colours = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT), palette(len(names))
    for row, (number, note) in enumerate(shown):
        left, top = picture.width + 6, row * _ROW + 3
        draw.rectangle((left, top, left + 13, top + 13), fill=tuple(int(x) for x in colours[number]))
        draw.text((left + 20, top), f"{note} {names[number]}"[:28], fill="black", font=font)
    return canvas


def side_by_side(pictures: Sequence[Image.Image], height: int) -> Image.Image:
    """Pictures in a row, each of this height."""
    scaled = [p.resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    row = Image.new("RGB", (sum(p.width for p in scaled) + 4 * (len(scaled) - 1), height), "white")
    left = 0
    for picture in scaled:
        row.paste(picture, (left, 0))
        left += picture.width + 4
    return row
