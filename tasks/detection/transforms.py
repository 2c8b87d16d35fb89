"""Training and evaluation views of an image with its boxes and masks; all stay together.

An image is a Pillow image. Its targets are a dict of tensors: boxes (N, 4) as left, top, right, bottom in pixels,
labels (N), and where masks are learned, masks (N, H, W) of 0 and 1. Random numbers come from Python's generator, which
training seeds by (seed, epoch, index).
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, masks_to_boxes
from yacs.config import CfgNode

Targets = dict[str, Tensor]
SMALLEST_EDGE = 1e-5  # pixels; boxes that are smaller are no objects
CROPPED = 0.5  # share of the images that are cropped, where any are


@dataclass(frozen=True)
class TrainTransform:
    """Flip; for half of the images, where asked for, a resize and a random crop (DETR's); resize to a drawn size."""

    config: CfgNode

    def __call__(self, image: Image.Image, targets: Targets) -> tuple[Image.Image, Targets]:
        data = self.config.DATA
        if random.random() < self.config.AUG.HFLIP:
            image, targets = flip(image, targets)
        if data.CROP and random.random() < CROPPED:
            image, targets = resize(image, targets, random.choice(data.CROP_MIN_SIZES))
            width, height = (random.randint(*(min(edge, size) for edge in data.CROP)) for size in image.size)
            left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
            image, targets = crop(image, targets, left, top, width, height)
        image, targets = resize(image, targets, random.choice(data.MIN_SIZES), data.MAX_SIZE)
        return image, drop_vanished(targets)


def flip(image: Image.Image, targets: Targets) -> tuple[Image.Image, Targets]:
    """Mirror left and right."""
    left, top, right, bottom = targets["boxes"].unbind(1)
    boxes = torch.stack([image.width - right, top, image.width - left, bottom], 1)
    flipped = targets | {"boxes": boxes}
    if "masks" in targets:
        flipped["masks"] = targets["masks"].flip(-1)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flipped


def resize(
    image: Image.Image, targets: Targets, short_side: int, longest: int | None = None
) -> tuple[Image.Image, Targets]:
    """Resize so that the short side is `short_side` pixels, or less where the long one would exceed `longest`."""
    width, height = new_size(image.width, image.height, short_side, longest)
    scale = torch.tensor([width / image.width, height / image.height] * 2)
    resized = targets | {"boxes": targets["boxes"] * scale}
    if "masks" in targets:
        # The nearest pixel centre, as Pillow counts; torch's 'nearest' would move masks by half a pixel.
        rows, columns = (
            ((torch.arange(new) + 0.5) * (old / new)).long()
            for new, old in ((height, image.height), (width, image.width))
        )
        resized["masks"] = targets["masks"][:, rows][:, :, columns]
    return image.resize((width, height), Image.Resampling.BILINEAR), resized


def new_size(width: int, height: int, short_side: int, longest: int | None = None) -> tuple[int, int]:
    """Width and height that `resize` gives an image."""
    scale = short_side / min(width, height)
    if longest is not None:
        scale = min(scale, longest / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def crop(
    image: Image.Image, targets: Targets, left: int, top: int, width: int, height: int
) -> tuple[Image.Image, Targets]:
    """Cut out a part. The box of an object that is cut is that of what is left of its mask, where it has one."""
    moved = targets["boxes"] - torch.tensor([left, top, left, top])
    boxes = clip_boxes_to_image(moved, (height, width))
    cropped: dict[str, Any] = targets | {"boxes": boxes}
    if "masks" in targets:
        cropped["masks"] = targets["masks"][:, top : top + height, left : left + width]
        cut = (boxes != moved).any(1)
        cut &= has_pixels(cropped["masks"])  # of what has vanished there is no box
        boxes[cut] = boxes_of_masks(cropped["masks"][cut]).to(boxes.dtype)
    part = image.crop((left, top, left + width, top + height))
    return part, drop_vanished(cropped)


def boxes_of_masks(masks: Tensor) -> Tensor:
    """The boxes (N, 4) around the pixels of masks (N, H, W), none of them empty; right and bottom are far edges."""
    return masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])


def has_pixels(masks: Tensor) -> Tensor:
    """Which of the masks (N, H, W) are not empty, (N)."""
    return masks.flatten(1).any(1).bool()


def drop_vanished(targets: Targets) -> Targets:
    """The targets without objects that have no extent, or no pixel of a mask, any more."""
    left, top, right, bottom = targets["boxes"].unbind(1)
    keep = (right - left > SMALLEST_EDGE) & (bottom - top > SMALLEST_EDGE)
    if "masks" in targets:
        keep &= has_pixels(targets["masks"])
    return {name: values[keep] for name, values in targets.items()}
