"""From image to network input: the released transforms, made by timm, and mixup."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms
from yacs.config import CfgNode

from configs import UserError
from configs.errors import one_line
from data.fast.shearing import policy_ops
from data.fast.transforms import FastEvalTransform, FastTrainTransform

from .keys import KEYS

SMALL_IMAGE = 32  # pixels; up to here training pads and crops, as for CIFAR, instead of cropping and resizing
SMALL_IMAGE_PADDING = 4
CROP_RATIO = 224 / 256  # edge of the centre crop over the short side of the resized image


def train_transform(config: CfgNode) -> transforms.Compose:
    """PIL image -> augmented, normalised float32 tensor (3, IMG_SIZE, IMG_SIZE)."""
    aug, size = config.AUG, config.DATA.IMG_SIZE
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
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"AUG.AUTO_AUGMENT = {aug.AUTO_AUGMENT!r}: not a policy of timm ({one_line(error)})") from None
    for step in transform.transforms:
        _allow_zero_bits(policy_ops(step))
        for op in policy_ops(step):
            if op.kwargs.get("resample") == Image.Resampling.LANCZOS:  # for Pillow, no way to turn or shear an image
                op.kwargs["resample"] = Image.Resampling.BICUBIC
    if size <= SMALL_IMAGE:
        for name, value in (("AUG.CROP_SCALE", aug.CROP_SCALE), ("AUG.CROP_RATIO", aug.CROP_RATIO)):
            if value != KEYS[name].default:
                raise UserError(
                    f"{name} = {value}: images of up to {SMALL_IMAGE} pixels are padded and cropped, never resized; "
                    "leave it out, or raise DATA.IMG_SIZE"
                )
        transform.transforms[0] = transforms.RandomCrop(size, padding=SMALL_IMAGE_PADDING, pad_if_needed=True)
    return transform


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
    """PIL image -> resized, cropped and normalised float32 tensor (3, IMG_SIZE, IMG_SIZE)."""
    size = config.DATA.IMG_SIZE
    name = config.DATA.INTERPOLATION
    interpolation = str_to_interp_mode("bicubic" if name == "random" else name)
    if config.TEST.CROP:
        steps: list[Any] = [
            transforms.Resize(int(size / CROP_RATIO), interpolation=interpolation),
            transforms.CenterCrop(size),
        ]
    else:
        steps = [transforms.Resize((size, size), interpolation=interpolation)]
    steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    return transforms.Compose(steps)


def views_transform(config: CfgNode) -> transforms.Compose:
    """PIL image -> the views that TEST.TTA crops from it, (views, 3, IMG_SIZE, IMG_SIZE); mirroring is left to the GPU.

    One view, that of `eval_transform`; or with five-crop and ten-crop the four corners and the centre.
    """
    transform = eval_transform(config)
    if config.TEST.TTA in ("five-crop", "ten-crop"):
        resize, _, *normalize = transform.transforms
        crop = transforms.FiveCrop(config.DATA.IMG_SIZE)
        return transforms.Compose([resize, crop, _EachView(transforms.Compose(normalize))])
    return transforms.Compose([transform, _add_view_axis])


def fast_train_transform(config: CfgNode) -> FastTrainTransform:
    """`train_transform` for DATA.FAST_LOADING; UserError where it has a step that the fast way cannot do."""
    return FastTrainTransform(train_transform(config).transforms)


def fast_views_transform(config: CfgNode) -> FastEvalTransform:
    """`views_transform` for DATA.FAST_LOADING 'all'; UserError where it has a step that the fast way cannot do."""
    steps = eval_transform(config).transforms
    if config.TEST.TTA in ("five-crop", "ten-crop"):
        crops = transforms.FiveCrop(config.DATA.IMG_SIZE)
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
        low, high = (int(config.DATA.IMG_SIZE * share) for share in aug.CUTMIX_MINMAX)
        if low >= high:
            raise UserError(
                f"AUG.CUTMIX_MINMAX = {aug.CUTMIX_MINMAX}: leaves no choice of a box in images of "
                f"{config.DATA.IMG_SIZE} pixels ({low} to {high}); the shares must lie further apart"
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
