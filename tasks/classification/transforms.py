"""From image to network input: the released transforms, made by timm, and mixup."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.transforms import ResizeKeepRatio, str_to_interp_mode
from torchvision import transforms
from yacs.config import CfgNode

from configs import UserError, image_size
from configs.errors import one_line
from data.fast.shearing import policy_ops
from data.fast.transforms import FastEvalTransform, FastTrainTransform
from data.normalization import pixel_statistics

from .keys import KEYS

SMALL_IMAGE = 32  # pixels; up to here training pads and crops, as for CIFAR, instead of cropping and resizing
SMALL_IMAGE_PADDING = 4
CROP_RATIO = 224 / 256  # edge of the centre crop over the short side of the resized image


def train_transform(config: CfgNode) -> transforms.Compose:
    """PIL image -> augmented, normalised float32 tensor (IN_DIM, height, width).

    Steps that change colours alone leave a grey image as it is.
    """
    aug, size = config.AUG, image_size(config)
    mean, std = pixel_statistics(config.MODEL.GMA.IN_DIM)
    try:
        transform = create_transform(
            input_size=size,
            is_training=True,
            scale=aug.CROP_SCALE,
            ratio=aug.CROP_RATIO,
            color_jitter=aug.COLOR_JITTER or None,
            auto_augment=aug.AUTO_AUGMENT if aug.AUTO_AUGMENT not in ("", "none") else None,
            hflip=aug.HFLIP,
            vflip=aug.VFLIP,
            grayscale_prob=aug.GRAYSCALE_PROB,
            gaussian_blur_prob=aug.GAUSSIAN_BLUR_PROB,
            re_prob=aug.REPROB,
            re_mode=aug.REMODE,
            re_count=aug.RECOUNT,
            interpolation=config.DATA.INTERPOLATION,
            mean=mean,
            std=std,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"AUG.AUTO_AUGMENT = {aug.AUTO_AUGMENT!r}: not a policy of timm ({one_line(error)})") from None
    for step in transform.transforms:
        _allow_zero_bits(policy_ops(step))
        for op in policy_ops(step):
            if op.kwargs.get("resample") == Image.Resampling.LANCZOS:  # for Pillow, no way to turn or shear an image
                op.kwargs["resample"] = Image.Resampling.BICUBIC
    if max(size) <= SMALL_IMAGE:
        for name, value in (("AUG.CROP_SCALE", aug.CROP_SCALE), ("AUG.CROP_RATIO", aug.CROP_RATIO)):
            if value != KEYS[name].default:
                raise UserError(
                    f"{name} = {value}: images of up to {SMALL_IMAGE} pixels are padded and cropped, never resized; "
                    "leave it out, or raise DATA.IMG_SIZE"
                )
        transform.transforms[0] = transforms.RandomCrop(size, padding=SMALL_IMAGE_PADDING, pad_if_needed=True)
    return transforms.Compose(_grey(config) + transform.transforms)


def _grey(config: CfgNode) -> list[Any]:
    """The first step where the network takes grey images: Pillow's mode L, in which grey pictures keep their values."""
    return [transforms.Grayscale()] if config.MODEL.GMA.IN_DIM == 1 else []


def _allow_zero_bits(ops: Sequence[AugmentOp]) -> None:
    """Let timm's 'Posterize' keep no bits, which the released policy asks for at magnitude 10.

    That gave a black image until Pillow 13, which raises ValueError instead.
    """
    for op in ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    if bits < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits)


def eval_transform(config: CfgNode) -> transforms.Compose:
    """PIL image -> resized, cropped and normalised float32 tensor (IN_DIM, height, width).

    A crop that is not square is the centre of the image at the smallest size that covers both edges, as in timm.
    """
    size = image_size(config)
    name = "bicubic" if config.DATA.INTERPOLATION == "random" else config.DATA.INTERPOLATION
    interpolation = str_to_interp_mode(name)
    steps = _grey(config)
    if config.TEST.CROP:
        height, width = (int(edge / CROP_RATIO) for edge in size)
        if height == width:
            steps.append(transforms.Resize(height, interpolation=interpolation))
        else:
            steps.append(ResizeKeepRatio((height, width), interpolation=name))
        steps.append(transforms.CenterCrop(size))
    else:
        steps.append(transforms.Resize(size, interpolation=interpolation))
    steps += [transforms.ToTensor(), transforms.Normalize(*pixel_statistics(config.MODEL.GMA.IN_DIM))]
    return transforms.Compose(steps)


def views_transform(config: CfgNode) -> transforms.Compose:
    """PIL image -> the views that TEST.TTA crops from it, (views, IN_DIM, height, width); mirroring is left to the GPU.

    One view, that of `eval_transform`; or with five-crop and ten-crop the four corners and the centre.
    """
    transform = eval_transform(config)
    if config.TEST.TTA in ("five-crop", "ten-crop"):
        *resize, _, to_tensor, normalize = transform.transforms
        crop = transforms.FiveCrop(image_size(config))
        return transforms.Compose([*resize, crop, _EachView(transforms.Compose([to_tensor, normalize]))])
    return transforms.Compose([transform, _add_view_axis])


def fast_train_transform(config: CfgNode) -> FastTrainTransform:
    """`train_transform` for DATA.FAST_LOADING; UserError where it has a step that the fast way cannot do."""
    return FastTrainTransform(train_transform(config).transforms)


def fast_views_transform(config: CfgNode) -> FastEvalTransform:
    """`views_transform` for DATA.FAST_LOADING 'all'; UserError where it has a step that the fast way cannot do."""
    steps = eval_transform(config).transforms
    if config.TEST.TTA in ("five-crop", "ten-crop"):
        crops = transforms.FiveCrop(image_size(config))
        steps = [crops if isinstance(step, transforms.CenterCrop) else step for step in steps]
    return FastEvalTransform(steps)


class _EachView:
    """Several PIL images -> one tensor, each transformed. A class, because loader workers may need to pickle it."""

    def __init__(self, transform: transforms.Compose) -> None:
        self.transform = transform

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack([self.transform(image) for image in images])


def _add_view_axis(image: torch.Tensor) -> torch.Tensor:
    return image[None]


def build_mixup(config: CfgNode) -> Mixup | None:
    """timm's mixup and cutmix as configured; None where neither is on. UserError for batches that it cannot pair."""
    aug = config.AUG
    if not (aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX is not None) or aug.MIXUP_PROB == 0:
        return None
    if config.DATA.BATCH_SIZE % 2:
        raise UserError(
            f"DATA.BATCH_SIZE = {config.DATA.BATCH_SIZE}: mixup and cutmix pair the images of a batch and need an even "
            "number (or AUG.MIXUP 0 AUG.CUTMIX 0)"
        )
    if aug.CUTMIX_MINMAX is not None:
        edge = min(image_size(config))
        low, high = (int(edge * share) for share in aug.CUTMIX_MINMAX)
        if low >= high:
            raise UserError(
                f"AUG.CUTMIX_MINMAX = {aug.CUTMIX_MINMAX}: leaves no choice of a box in images of "
                f"{edge} pixels ({low} to {high}); the shares must lie further apart"
            )
    return Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=config.MODEL.GMA.NUM_CLASSES,
    )
