"""Faster loading, chosen by DATA.FAST_LOADING: uint8 tensors in the workers, the rest on the batch.

Images are decoded to uint8 tensors (`fast_decoding.py`, the pixels of Pillow) and resized as such, with colours side by
side as decoders write them; shears and translations of the policy go line by line. Batches of uint8 are normalised
where the network runs; random erasing works on the normalised batch there, as in timm's prefetcher. What an image is
drawn from has the same distribution, but not the same bits: antialiased resizing in torch and in Pillow round
differently, by a few of 255 levels. `transforms.py` is the exact way, which the released numbers were made with.
"""

import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from yacs.config import CfgNode

from configs import UserError
from tasks.classification.transforms import CROP_RATIO, SMALL_IMAGE, policy_ops, train_transform

from .decoding import EncodedImage
from .shearing import shear_by_lines

_MODES = {
    "nearest": InterpolationMode.NEAREST,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}


class FastTrainTransform:
    """uint8 crop (H, W, 3) -> augmented uint8 image (IMG_SIZE, IMG_SIZE, 3), before erasing and normalising.

    `decode_crop` draws the crop before pixels are decoded, so that it can be all that is decoded. Crop, mirror and
    policy are those of `train_transform`, with its parameters and its draws from the same random state; the policy is
    timm's on Pillow, but for `shearing.py`.
    """

    def __init__(self, config: CfgNode) -> None:
        exact = train_transform(config).transforms
        self.size = config.DATA.IMG_SIZE
        self.crop = exact[0]
        self.modes = _interpolation_modes(config, training=True)
        self.hflip = config.AUG.HFLIP
        # What stands between mirroring and the conversion to a tensor: the policy, or colour jitter.
        self.policy = [t for t in exact[1:] if not isinstance(t, transforms.RandomHorizontalFlip)]
        names = [type(t).__name__ for t in self.policy]
        self.policy = self.policy[: names.index("MaybeToTensor")]
        for step in self.policy:
            shear_by_lines(policy_ops(step))
            if isinstance(step, RandAugment):
                step.ops = np.array(step.ops, dtype=object)  # which NumPy draws from without making one every time

    def draw_box(self, image: EncodedImage) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop that is to be resized."""
        return self.crop.get_params(image.header, self.crop.scale, self.crop.ratio)

    def decode_crop(self, encoded: bytes) -> Tensor:
        """From the bytes of a file to a crop of its image; errors of damaged files as `decode_image` raises them."""
        image = EncodedImage(encoded)
        if self.size <= SMALL_IMAGE:  # which is padded and cropped to its final size
            return self.crop(image.whole().permute(2, 0, 1)).permute(1, 2, 0)
        return image.region(*self.draw_box(image))

    def __call__(self, crop: Tensor) -> Tensor:
        image = crop if self.size <= SMALL_IMAGE else _resize(crop, (self.size, self.size), self.modes)
        if self.hflip and torch.rand(1) < self.hflip:  # as torchvision draws it, and timm leaves it out
            image = image.flip(1)
        if self.policy:
            augmented = Image.fromarray(image.numpy())
            for step in self.policy:
                augmented = step(augmented)
            image = torch.from_numpy(np.array(augmented))
        return image.contiguous()


class FastEvalTransform:
    """uint8 image (H, W, 3) -> resized and cropped uint8 image (IMG_SIZE, IMG_SIZE, 3), before normalising."""

    def __init__(self, config: CfgNode) -> None:
        self.size, self.centre_crop = config.DATA.IMG_SIZE, config.TEST.CROP
        self.modes = _interpolation_modes(config, training=False)

    def __call__(self, image: Tensor) -> Tensor:
        if not self.centre_crop:
            return _resize(image, (self.size, self.size), self.modes)
        image = functional.center_crop(self.resize(image).permute(2, 0, 1), [self.size, self.size])
        return image.permute(1, 2, 0).contiguous()

    def resize(self, image: Tensor) -> Tensor:
        """Bring the short side to IMG_SIZE * 256 / 224, as torchvision's Resize rounds it."""
        height, width = image.shape[:2]
        short = int(self.size / CROP_RATIO)
        size = (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
        return image if size == (height, width) else _resize(image, size, self.modes)


class FastViewsTransform:
    """uint8 image (H, W, 3) -> the views of `views_transform`, uint8 (views, IMG_SIZE, IMG_SIZE, 3)."""

    def __init__(self, config: CfgNode) -> None:
        self.transform = FastEvalTransform(config)
        self.crops = config.TEST.TTA in ("five-crop", "ten-crop")

    def __call__(self, image: Tensor) -> Tensor:
        if not self.crops:
            return self.transform(image)[None]
        size = [self.transform.size] * 2
        views = functional.five_crop(self.transform.resize(image).permute(2, 0, 1), size)
        return torch.stack([view.permute(1, 2, 0) for view in views])


def build_erasing(config: CfgNode, device: torch.device) -> RandomErasing | None:
    """timm's random erasing of normalised batches on `device`, drawn from the global random state; None where off."""
    aug = config.AUG
    if aug.REPROB == 0:
        return None
    return RandomErasing(aug.REPROB, mode=aug.REMODE, max_count=aug.RECOUNT, device=str(device))


def _interpolation_modes(config: CfgNode, training: bool) -> list[Any]:
    name = config.DATA.INTERPOLATION
    if name == "random":
        return [_MODES["bilinear"], _MODES["bicubic"]] if training else [_MODES["bicubic"]]
    if name not in _MODES:
        raise UserError(
            f"DATA.INTERPOLATION = {name!r}: DATA.FAST_LOADING resizes tensors, which takes one of "
            f"{', '.join(map(repr, _MODES))} or 'random'"
        )
    return [_MODES[name]]


def _resize(image: Tensor, size: tuple[int, int], modes: list[Any]) -> Tensor:
    mode = modes[0] if len(modes) == 1 else random.choice(modes)
    if not image.numel():  # timm crops nothing from images of a pixel or two, and Pillow makes black of it
        return image.new_zeros(*size, 3)
    # Contiguous, so that torch sees a channels-last image, which it resizes faster, into another one.
    image = functional.resize(image.contiguous().permute(2, 0, 1), list(size), mode, antialias=True)
    return image.permute(1, 2, 0).contiguous()
