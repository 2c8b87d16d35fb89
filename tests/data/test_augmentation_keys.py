"""What researchers vary of the augmentation: policies by timm's names, the crop, flips, colours, blur."""

import io
import random

import numpy as np
import pytest
import torch
from image_data import message_of, released
from PIL import Image
from timm.data.auto_augment import AugMixAugment, AutoAugment
from torchvision import transforms

from configs import UserError
from data.datasets import decode_image
from data.normalization import normalize
from data.randomness import seed_everything
from tasks.classification.transforms import fast_train_transform, train_transform

POLICIES = ("3a", "augmix-m3-w3", "augmix-m5-w2-d2-b1", "rand-m9-t3a", "rand-m7-n3-t3aw", "v0", "originalr", "none")


def photo() -> bytes:
    """A JPEG of smooth shading with edges, no two quarters alike."""
    y, x = np.mgrid[:240, :320]
    levels = np.stack([np.sin(x / 70), np.cos(y / 50), np.sin((x + y) / 90)], axis=2) * 80 + 128
    levels += 40 * ((x // 60 + y // 45) % 2)[..., None]
    buffer = io.BytesIO()
    Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def steps_of(config) -> dict[str, object]:
    return {type(step).__name__: step for step in train_transform(config).transforms}


def test_every_key_reaches_its_step(make_config):
    opts = ("AUG.CROP_SCALE", [0.35, 0.5], "AUG.CROP_RATIO", [0.9, 1.1], "AUG.VFLIP", 0.25, "AUG.GRAYSCALE_PROB", 0.1)
    steps = steps_of(released(make_config, *opts, "AUG.GAUSSIAN_BLUR_PROB", 0.75))
    crop = steps["RandomResizedCropAndInterpolation"]
    assert (crop.scale, crop.ratio) == ((0.35, 0.5), (0.9, 1.1))
    assert steps["RandomVerticalFlip"].p == 0.25 and steps["RandomGrayscale"].p == 0.1
    blur = steps["RandomApply"]
    assert blur.p == 0.75 and isinstance(blur.transforms[0], transforms.GaussianBlur)


def test_policies_are_timms_by_name(make_config):
    steps = steps_of(released(make_config, "AUG.AUTO_AUGMENT", "3a", "AUG.COLOR_JITTER", 0.3))
    policy = steps["AutoAugment"]
    assert isinstance(policy, AutoAugment)
    assert [[op.name for op in ops] for ops in policy.policy] == [["Solarize"], ["Desaturate"], ["GaussianBlurRand"]]
    assert steps["ColorJitter"].brightness == (0.7, 1.3), "3-Augment keeps its colour jitter"
    steps = steps_of(released(make_config, "AUG.AUTO_AUGMENT", "augmix-m5-w4-d2", "AUG.COLOR_JITTER", 0.3))
    policy = steps["AugMixAugment"]
    assert isinstance(policy, AugMixAugment) and (policy.width, policy.depth) == (4, 2)
    assert {op.magnitude for op in policy.ops} == {5} and "ColorJitter" not in steps


def test_certain_flips_grey_and_full_crops_show_in_the_pixels(make_config):
    """A probability of 1 always acts; a crop of all the area and the image's own shape is the whole image."""
    off = ("AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", 0.0, "AUG.REPROB", 0.0, "AUG.HFLIP", 0.0)
    whole = (*off, "AUG.CROP_SCALE", [1.0, 1.0], "AUG.CROP_RATIO", [1.0, 1.0], "DATA.IMG_SIZE", 48)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    plain = train_transform(released(make_config, *whole))(image)
    assert torch.equal(plain, normalize(torch.from_numpy(np.array(image))[None])[0])
    assert torch.equal(train_transform(released(make_config, *whole, "AUG.VFLIP", 1.0))(image), plain.flip(1))
    grey = train_transform(released(make_config, *whole, "AUG.GRAYSCALE_PROB", 1.0))(image)
    levels = grey * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    levels += torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    torch.testing.assert_close(levels[0], levels[1], atol=1e-6, rtol=0)
    blurred = train_transform(released(make_config, *whole, "AUG.GAUSSIAN_BLUR_PROB", 1.0))(image)
    assert blurred.diff(dim=2).abs().mean() < plain.diff(dim=2).abs().mean()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AUG.CROP_SCALE", "[0.001, 0.001]"), ("AUG.CROP_SCALE", "[1, 1]"), ("AUG.CROP_RATIO", "[0.01, 100]"),
        ("AUG.VFLIP", "1"), ("AUG.GRAYSCALE_PROB", "1"), ("AUG.GAUSSIAN_BLUR_PROB", "1"),
        *(("AUG.AUTO_AUGMENT", policy) for policy in POLICIES),
    ],
)  # fmt: skip
def test_extreme_values_give_images(make_config, name, value):
    """On images of a pixel too, in both ways."""
    config = make_config("--opts", "DATA.IMG_SIZE", "64", name, value)
    exact, fast = train_transform(config), fast_train_transform(config)
    for shape in ((1, 1), (3, 50), (80, 60)):
        buffer = io.BytesIO()
        Image.new("RGB", shape, (124, 116, 104)).save(buffer, "PNG")
        for number in range(5):
            seed_everything(0, number)
            assert exact(decode_image(buffer.getvalue())).isfinite().all()
            assert fast(fast.decode_crop(buffer.getvalue())).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AUG.CROP_SCALE", "[0, 1]"), ("AUG.CROP_SCALE", "[0.9, 0.1]"), ("AUG.CROP_SCALE", "[0.5, 1.1]"),
        ("AUG.CROP_SCALE", "[0.5]"), ("AUG.CROP_RATIO", "[0, 1]"), ("AUG.CROP_RATIO", "[1, 101]"),
        ("AUG.VFLIP", "1.1"), ("AUG.GRAYSCALE_PROB", "-0.1"), ("AUG.GAUSSIAN_BLUR_PROB", "2"),
    ],
)  # fmt: skip
def test_impossible_values_are_one_line(make_config, name, value):
    assert message_of(make_config, "--opts", name, value).startswith(f"{name} = ")


def test_a_crop_that_small_images_do_not_have_is_refused(make_config):
    for opts in (("AUG.CROP_SCALE", [0.5, 1.0]), ("AUG.CROP_RATIO", [1.0, 1.0])):
        config = released(make_config, "DATA.IMG_SIZE", 32, *opts)
        assert message_of(train_transform, config).startswith(f"{opts[0]} = {opts[1]}: images of up to 32 pixels")
        train_transform(released(make_config, "DATA.IMG_SIZE", 33, *opts))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "opts", [(), ("AUG.VFLIP", "0.5", "AUG.GRAYSCALE_PROB", "0.3", "AUG.GAUSSIAN_BLUR_PROB", "0.3")]
)
def test_the_fast_way_drops_no_step(make_config, policy, opts):
    """From the same random state it gives the image of the exact way, and leaves the same state behind."""
    opts = ("DATA.IMG_SIZE", "128", "AUG.REPROB", "0.0", "AUG.AUTO_AUGMENT", policy, *opts)
    config = make_config("--opts", *opts, "AUG.CROP_SCALE", "[0.3, 0.9]", "AUG.CROP_RATIO", "[0.8, 1.3]")
    exact, fast = train_transform(config), fast_train_transform(config)
    content, far = photo(), 0
    for number in range(20):
        results, states = [], []
        for way in (lambda: exact(decode_image(content)), lambda: fast(fast.decode_crop(content))):
            seed_everything(0, number)
            results.append(way())
            states.append((random.random(), np.random.rand(), torch.rand(1).item()))
        assert states[0] == states[1]
        levels = (results[0] - normalize(results[1][None])[0]).abs() * 255 * 0.225
        far += levels.mean().item() > 1.5  # few levels may become many in an operation of the policy
    assert far <= 2


def test_a_policy_that_neither_way_knows_is_refused(make_config):
    config = make_config("--opts", "AUG.AUTO_AUGMENT", "3b")
    for transform in (train_transform, fast_train_transform):
        with pytest.raises(UserError, match=r"^AUG\.AUTO_AUGMENT = '3b': not a policy of timm"):
            transform(config)
