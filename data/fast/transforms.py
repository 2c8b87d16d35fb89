"""The fast way from an image file to network input, built from the exact transforms: DATA.FAST_LOADING.

Workers decode to uint8 tensors with the pixels of Pillow (`decoding.py`), resize these tensors, and shear and translate
line by line (`shearing.py`). They send uint8 batches. Normalising and random erasing follow on the batch, where the
network runs. Draws are those of the exact way, from the same random state; pixels are not: torch and Pillow round
antialiased resizing differently, by less than 3 of 255 levels. Released numbers are those of the exact way.

A step of the exact transforms that the fast way cannot do is refused, never dropped.
"""

import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation, ResizeKeepRatio
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from configs import UserError
from data.normalization import normalize, pixel_statistics

from .decoding import EncodedImage
from .shearing import policy_ops, shear_by_lines

_RESIZES = (transforms.Resize, ResizeKeepRatio)
_TENSOR_MODES = (InterpolationMode.NEAREST, InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)


class FastTrainTransform:
    """uint8 crop (H, W, 3) -> augmented uint8 image (height, width, 3), before normalising and erasing.

    `decode_crop` draws the crop before it decodes, so that nothing else has to be decoded. `normalize_batch` does the
    rest on a batch. Steps between mirroring and the conversion to a tensor run on Pillow images, as they are.

    Args:
        exact: the steps of the exact transform: Grayscale (or not), a crop, mirroring (or not), any steps on Pillow
            images, MaybeToTensor, ImageNet's Normalize, RandomErasing (or not). They are copied.

    Grey images have 1 channel instead of 3. Raises UserError, naming the step, where the steps are others.
    """

    def __init__(self, exact: Sequence[Any]) -> None:
        self.grey, (self.crop, *steps) = _grey_first(copy.deepcopy(list(exact)))
        if not isinstance(self.crop, (RandomResizedCropAndInterpolation, transforms.RandomCrop)):
            raise _cannot(self.crop, "as the first step")
        self.resizes = isinstance(self.crop, RandomResizedCropAndInterpolation)
        self.modes = _tensor_modes(self.crop.interpolation) if self.resizes else []
        self.steps, after = _split_at(MaybeToTensor, steps)
        self.erasing = after.pop(1) if len(after) > 1 and isinstance(after[1], RandomErasing) else None
        _check_normalizing(after)
        self.mirror_probability = 0.0
        if self.steps and isinstance(self.steps[0], transforms.RandomHorizontalFlip):
            self.mirror_probability = self.steps.pop(0).p
        for step in self.steps:
            shear_by_lines(policy_ops(step))

    def decode_crop(self, encoded: bytes) -> Tensor:
        """From the bytes of a file to a crop of its image. Raises what `decode_image` raises for damaged files."""
        image = EncodedImage(encoded)
        if not self.resizes:  # small images: padded, and cropped to their final size
            return self.crop(self.as_grey(image.whole()).permute(2, 0, 1)).permute(1, 2, 0)
        return self.as_grey(image.region(*self.crop.get_params(image.header, self.crop.scale, self.crop.ratio)))

    def as_grey(self, image: Tensor) -> Tensor:
        return _to_grey(image) if self.grey else image

    def __call__(self, crop: Tensor) -> Tensor:
        image = _resize(crop, list(self.crop.size), self.modes) if self.resizes else crop
        if self.mirror_probability and torch.rand(1) < self.mirror_probability:  # as torchvision draws it
            image = image.flip(1)
        if self.steps:
            augmented = Image.fromarray(image.squeeze(2).numpy())
            for step in self.steps:
                augmented = step(augmented)
            image = torch.from_numpy(np.array(augmented)).view(image.shape)
        return image.contiguous()

    def normalize_batch(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) on any device -> normalised, randomly erased float32 (B, 3, H, W)."""
        images = normalize(images)
        if self.erasing is None:
            return images
        self.erasing.device = images.device
        return self.erasing(images)


class FastEvalTransform:
    """uint8 image (H, W, 3) -> uint8 views (views, height, width, 3), before normalising: five by FiveCrop, else one.

    Args:
        exact: the steps of the exact transform: Grayscale (or not), any of Resize, ResizeKeepRatio, CenterCrop and
            FiveCrop, ToTensor, ImageNet's Normalize.

    Grey images have 1 channel instead of 3. Raises UserError, naming the step, where the steps are others.
    """

    def __init__(self, exact: Sequence[Any]) -> None:
        self.grey, exact = _grey_first(list(exact))
        self.steps, after = _split_at(transforms.ToTensor, exact)
        _check_normalizing(after)
        for step in self.steps:
            if not isinstance(step, (*_RESIZES, transforms.CenterCrop, transforms.FiveCrop)):
                raise _cannot(step, "in validation")
            if isinstance(step, _RESIZES):
                _tensor_modes(step.interpolation)

    def __call__(self, image: Tensor) -> Tensor:
        image = _to_grey(image) if self.grey else image
        for step in self.steps:
            if isinstance(step, _RESIZES):
                size = step.size if isinstance(step.size, Sequence) else [step.size]
                if isinstance(step, ResizeKeepRatio):
                    size = step.get_params(image.permute(2, 0, 1), step.size, step.longest)
                image = _resize(image, list(size), [step.interpolation])
            else:  # crops are torchvision's, which take tensors
                image = step(image.permute(2, 0, 1))
                image = torch.stack(image) if isinstance(image, tuple) else image
                image = image.movedim(-3, -1)
        return (image if image.dim() == 4 else image[None]).contiguous()


def _grey_first(steps: list[Any]) -> tuple[bool, list[Any]]:
    """Whether the steps begin with a conversion to grey, and the others."""
    grey = bool(steps) and isinstance(steps[0], transforms.Grayscale) and steps[0].num_output_channels == 1
    return grey, steps[1:] if grey else steps


def _to_grey(image: Tensor) -> Tensor:
    """uint8 (H, W, 3) -> (H, W, 1), with the weights and the rounding of Pillow's mode L: grey stays as it is."""
    luma = image.int() * torch.tensor([19595, 38470, 7471], dtype=torch.int32)  # their sum is 2**16
    return ((luma.sum(dim=2, keepdim=True) + 2**15) >> 16).to(torch.uint8)


def _split_at(kind: type, steps: list[Any]) -> tuple[list[Any], list[Any]]:
    """The steps before and after the conversion to a tensor, which is of this class."""
    for number, step in enumerate(steps):
        if isinstance(step, kind):
            return steps[:number], steps[number + 1 :]
    raise UserError(f"DATA.FAST_LOADING: the exact transform has no {kind.__name__}; set DATA.FAST_LOADING 'no'")


def _check_normalizing(steps: list[Any]) -> None:
    """UserError unless these are what `normalize` does to a batch."""
    if not steps:
        raise UserError("DATA.FAST_LOADING: the exact transform has no Normalize; set DATA.FAST_LOADING 'no'")
    for step in steps[1:] if isinstance(steps[0], transforms.Normalize) else steps:
        raise _cannot(step, "after the conversion to a tensor")
    values = [torch.as_tensor(value).tolist() for value in (steps[0].mean, steps[0].std)]
    if not np.allclose(values, pixel_statistics(len(values[0]))):
        raise _cannot(steps[0], "with other values than ImageNet's")


def _cannot(step: Any, where: str) -> UserError:
    name = getattr(step, "__name__", type(step).__name__)
    return UserError(f"DATA.FAST_LOADING: cannot do the step {name} {where}; set DATA.FAST_LOADING 'no', or remove it")


def _tensor_modes(interpolation: InterpolationMode | Sequence[InterpolationMode]) -> list[InterpolationMode]:
    modes = [interpolation] if isinstance(interpolation, InterpolationMode) else list(interpolation)
    for mode in modes:
        if mode not in _TENSOR_MODES:
            raise UserError(
                f"DATA.INTERPOLATION = {mode.value!r}: DATA.FAST_LOADING resizes tensors; choose one of "
                f"{', '.join(repr(known.value) for known in _TENSOR_MODES)} or 'random'"
            )
    return modes


def _resize(image: Tensor, size: list[int], modes: list[InterpolationMode]) -> Tensor:
    mode = modes[0] if len(modes) == 1 else random.choice(modes)
    if not image.numel():  # timm crops nothing from images of a pixel or two, and Pillow makes black of it
        return image.new_zeros(*size, image.shape[2])
    # Contiguous (H, W, 3) is a channels-last (3, H, W), which torch resizes faster.
    image = functional.resize(image.contiguous().permute(2, 0, 1), size, mode, antialias=True)
    return image.permute(1, 2, 0).contiguous()
