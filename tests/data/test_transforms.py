"""How images are augmented, and mixed."""

import numpy as np
import pytest
import torch
from image_data import message_of, released
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.auto_augment import auto_augment_transform
from torchvision.transforms import InterpolationMode

import data
from data.fast.shearing import policy_ops
from tasks.classification.transforms import build_mixup, eval_transform, train_transform


# ---------------------------------------------------------------------------------------------------------- transforms
def names_of(transform) -> list[str]:
    return [type(step).__name__ for step in transform.transforms]


def test_train_transform_is_the_released_one(make_config):
    transform = train_transform(released(make_config))
    assert names_of(transform) == [
        "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment", "MaybeToTensor", "Normalize",
        "RandomErasing",
    ]  # fmt: skip
    crop, flip, augment, _, normalize, erasing = transform.transforms
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation == InterpolationMode.BICUBIC
    assert flip.p == 0.5
    assert augment.num_layers == 2 and len(augment.ops) == 15
    for op in augment.ops:  # rand-m9-mstd0.5-inc1
        assert (op.magnitude, op.magnitude_std, op.prob) == (9, 0.5, 0.5)
        assert op.hparams["translate_const"] == 100 and op.hparams["img_mean"] == (124, 116, 104)
    assert {op.name for op in augment.ops} >= {"PosterizeIncreasing", "SolarizeIncreasing", "ColorIncreasing"}
    assert tuple(normalize.mean.tolist()) == pytest.approx(IMAGENET_DEFAULT_MEAN)
    assert tuple(normalize.std.tolist()) == pytest.approx(IMAGENET_DEFAULT_STD)
    assert (erasing.probability, erasing.rand_color, erasing.per_pixel) == (0.25, False, True)
    assert (erasing.min_count, erasing.max_count) == (1, 1)
    assert (erasing.min_area, erasing.max_area) == (0.02, 1 / 3)


def test_augmentation_that_is_switched_off(make_config):
    opts = ("AUG.AUTO_AUGMENT", "none", "AUG.REPROB", 0.0, "AUG.HFLIP", 0.0)
    transform = train_transform(released(make_config, *opts))
    assert names_of(transform) == ["RandomResizedCropAndInterpolation", "ColorJitter", "MaybeToTensor", "Normalize"]
    jitter = transform.transforms[1]
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.6, 1.4) and jitter.hue is None
    transform = train_transform(released(make_config, *opts, "AUG.COLOR_JITTER", 0.0))
    assert names_of(transform) == ["RandomResizedCropAndInterpolation", "MaybeToTensor", "Normalize"]


@pytest.mark.parametrize(
    ("mode", "flags"), [("pixel", (False, True)), ("rand", (True, False)), ("const", (False,) * 2)]
)
def test_erasing_mode_and_count(make_config, mode, flags):
    erasing = train_transform(released(make_config, "AUG.REMODE", mode, "AUG.RECOUNT", 3)).transforms[-1]
    assert (erasing.rand_color, erasing.per_pixel, erasing.max_count) == (*flags, 3)


@pytest.mark.parametrize("size", [224, 32])
def test_train_transform_gives_a_normalised_tensor_from_any_image(make_config, size):
    transform = train_transform(released(make_config, "DATA.IMG_SIZE", size))
    for shape in ((1, 1), (3, 1), (300, 5), (28, 28), (33, 31), (400, 300)):
        for _ in range(5):
            images = transform(Image.new("RGB", shape, (124, 116, 104)))
            assert images.shape == (3, size, size) and images.dtype == torch.float32
            assert images.isfinite().all() and images.abs().max() < 8


def test_images_of_32_pixels_are_padded_and_cropped(make_config):
    transform = train_transform(released(make_config, "DATA.IMG_SIZE", 32))
    assert names_of(transform)[0] == "RandomCrop"
    crop = transform.transforms[0]
    assert (crop.size, crop.padding, crop.fill, crop.padding_mode) == ((32, 32), 4, 0, "constant")
    assert names_of(transform)[1:] == names_of(train_transform(released(make_config)))[1:]
    assert names_of(train_transform(released(make_config, "DATA.IMG_SIZE", 33)))[0] != "RandomCrop"


@pytest.mark.parametrize(
    ("name", "mode"),
    [("bicubic", "BICUBIC"), ("bilinear", "BILINEAR"), ("lanczos", "LANCZOS"), ("nearest", "NEAREST")],
)
def test_interpolation_reaches_both_transforms(make_config, name, mode):
    config = released(make_config, "DATA.INTERPOLATION", name)
    assert train_transform(config).transforms[0].interpolation == InterpolationMode[mode]
    assert eval_transform(config).transforms[0].interpolation == InterpolationMode[mode]


def test_random_interpolation_is_for_training_only(make_config):
    config = released(make_config, "DATA.INTERPOLATION", "random")
    assert len(train_transform(config).transforms[0].interpolation) == 2
    assert eval_transform(config).transforms[0].interpolation == InterpolationMode.BICUBIC


@pytest.mark.parametrize(("size", "resized"), [(224, 256), (384, 438), (256, 292), (192, 219), (32, 36)])
def test_eval_transform_with_crop(make_config, size, resized):
    transform = eval_transform(released(make_config, "DATA.IMG_SIZE", size))
    assert names_of(transform) == ["Resize", "CenterCrop", "ToTensor", "Normalize"]
    resize, crop = transform.transforms[:2]
    assert resize.size == resized == int((256 / 224) * size), "the released arithmetic"
    assert resize.interpolation == InterpolationMode.BICUBIC and resize.antialias
    assert crop.size == (size, size)
    assert transform(Image.new("RGB", (500, 375))).shape == (3, size, size)


def test_eval_transform_without_crop(make_config):
    transform = eval_transform(released(make_config, "TEST.CROP", False))
    assert names_of(transform) == ["Resize", "ToTensor", "Normalize"]
    assert transform.transforms[0].size == (224, 224)
    assert transform(Image.new("RGB", (500, 375))).shape == (3, 224, 224)


def test_eval_pixels(make_config):
    """Against the steps written out with Pillow and NumPy."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8))
    resized = image.resize((341, 256), Image.Resampling.BICUBIC)
    left, top = round((341 - 224) / 2), round((256 - 224) / 2)
    array = np.asarray(resized.crop((left, top, left + 224, top + 224)), np.float64) / 255
    expected = (array - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    result = eval_transform(released(make_config))(image)
    np.testing.assert_allclose(result.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_denormalize_undoes_the_normalisation(make_config):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (224, 224, 3), dtype=np.uint8))
    normalised = eval_transform(released(make_config, "TEST.CROP", False))(image)
    restored = data.denormalize(normalised[None])[0]
    np.testing.assert_allclose(restored.permute(1, 2, 0).numpy(), np.asarray(image) / 255, atol=1e-6)
    assert data.denormalize(torch.full((1, 3, 2, 2), 100.0)).max() == 1
    assert data.denormalize(torch.full((1, 3, 2, 2), -100.0)).min() == 0


def test_unknown_augmentation_policy_is_named(make_config):
    message = message_of(train_transform, released(make_config, "AUG.AUTO_AUGMENT", "fancy"))
    assert "AUG.AUTO_AUGMENT = 'fancy'" in message


def test_policies_of_pairs_may_keep_no_bits(make_config):
    """timm's v0 asks for 0 bits at level 2, which Pillow 13 refuses."""
    assert any(op.name == "Posterize" for op in policy_ops(auto_augment_transform("v0", {})))
    config = released(make_config, "AUG.AUTO_AUGMENT", "v0")
    ops = [op for step in train_transform(config).transforms for op in policy_ops(step) if op.name == "Posterize"]
    for op in ops:
        op.prob = 1.0
        op.magnitude, op.magnitude_std = 2, 0
        assert not np.asarray(op(Image.new("RGB", (9, 9), (200, 100, 50)))).any()


# ----------------------------------------------------------------------------------------------------------- mixup
def test_odd_batch_cannot_be_mixed(make_config):
    def mixup(*opts, batch_size="3"):
        return build_mixup(make_config("--batch-size", batch_size, "--opts", "MODEL.LABEL_SMOOTHING", "0.1", *opts))

    for opts in (["AUG.MIXUP", "0.8"], ["AUG.CUTMIX", "1"], ["AUG.CUTMIX_MINMAX", "[0.2,0.8]"]):
        message = message_of(mixup, *opts)
        assert "DATA.BATCH_SIZE = 3" in message and "even" in message
        assert mixup(*opts, "AUG.MIXUP_PROB", "0") is None
        assert mixup(*opts, batch_size="4") is not None
    assert mixup() is None


@pytest.mark.parametrize(
    ("shares", "size", "fits"), [("[0.5,0.5]", 32, False), ("[0.5,0.51]", 32, False), ("[0.5,0.51]", 224, True)]
)
def test_cutmix_needs_a_choice_of_boxes(make_config, shares, size, fits):
    """timm draws the box between the two whole numbers of pixels."""
    opts = ("AUG.CUTMIX_MINMAX", shares, "DATA.IMG_SIZE", str(size))
    config = make_config("--batch-size", "4", "--opts", "MODEL.LABEL_SMOOTHING", "0.1", *opts)
    if fits:
        mixup = build_mixup(config)
        mixup(torch.rand(4, 3, size, size), torch.arange(4))
    else:
        assert "AUG.CUTMIX_MINMAX" in message_of(build_mixup, config)


@pytest.mark.parametrize("name", ["bicubic", "bilinear", "lanczos", "nearest", "random"])
def test_the_policy_takes_every_interpolation(make_config, name):
    transform = train_transform(released(make_config, "DATA.INTERPOLATION", name))
    image = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    for op in policy_ops(next(step for step in transform.transforms if policy_ops(step))):
        op.prob = 1.0
        assert op(image).size == (40, 40), op.name
