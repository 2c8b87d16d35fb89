"""Grey input (MODEL.GMA.IN_DIM 1) and input that is not square (DATA.IMG_SIZE [height, width]), exact and fast."""

import io

import numpy as np
import pytest
import runs
import torch
from image_data import message_of
from PIL import Image
from torchvision.transforms import functional
from yacs.config import CfgNode

from data.datasets import decode_image
from data.fast.decoding import decode_to_tensor
from data.fast.shearing import policy_ops
from data.normalization import denormalize, normalize
from data.randomness import seed_everything
from tasks.classification.transforms import (
    build_mixup,
    eval_transform,
    fast_train_transform,
    fast_views_transform,
    train_transform,
    views_transform,
)

GREY = ("MODEL.GMA.IN_DIM", "1")
OBLONG = ("DATA.IMG_SIZE", "[64, 96]")
PLAIN = ("AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", "0.0", "AUG.REPROB", "0.0", "AUG.HFLIP", "0.0")
MEAN, STD = (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3


def released(make_config, *opts: str) -> CfgNode:
    """The released recipe with other values."""
    return make_config("--cfg", runs.ROOT / "configs" / "groupmixformer_small.yaml", "--opts", *opts)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth, because torch and Pillow resize noise differently; every edge and colour is another."""
    y, x = np.mgrid[:height, :width]
    values = np.stack([255 * x / width, 255 * y / height, 127 + 127 * np.sin((x + y) / 40)], axis=2)
    return Image.fromarray(values.astype(np.uint8)).convert(mode)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------------- grey
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_pictures_keep_their_values_and_colours_become_pillows_grey(make_config, mode):
    image = picture(64, 64, mode)
    config = released(make_config, *GREY, "DATA.IMG_SIZE", "64", "TEST.CROP", "False")
    expected = (torch.from_numpy(np.array(image.convert("L"))).float() / 255 - MEAN) / STD
    content = png(image)
    exact = eval_transform(config)(decode_image(content))
    assert exact.shape == (1, 64, 64)
    torch.testing.assert_close(exact[0], expected)
    fast = fast_views_transform(config)(decode_to_tensor(content))
    assert fast.shape == (1, 64, 64, 1) and fast.dtype == torch.uint8
    assert torch.equal(normalize(fast)[0], exact), "of the right size, the fast way has the bits of the exact one"
    assert torch.equal((denormalize(exact[None]) * 255).round()[0, 0].byte(), fast[0, ..., 0])


@pytest.mark.parametrize("size", ["32", "64"], ids=["padded", "resized"])
def test_training_images_of_the_fast_way_are_those_of_the_exact_way(make_config, size):
    config = released(make_config, *GREY, *PLAIN, "AUG.HFLIP", "0.5", "DATA.IMG_SIZE", size)
    exact, fast = train_transform(config), fast_train_transform(config)
    content = png(picture(90, 70))
    for number in range(10):
        seed_everything(0, number)
        expected = exact(decode_image(content))
        seed_everything(0, number)
        image = fast(fast.decode_crop(content))
        assert image.dtype == torch.uint8 and image.shape == (int(size), int(size), 1)
        levels = (fast.normalize_batch(image[None])[0] - expected).abs() * 255 * STD
        assert levels.max() < (1e-3 if size == "32" else 3)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "3a", "original", "none"])
def test_every_operation_of_a_policy_takes_grey_images(make_config, policy):
    transform = train_transform(released(make_config, *GREY, "AUG.AUTO_AUGMENT", policy))
    for step in transform.transforms:
        for op in policy_ops(step):
            op.prob = 1.0
            result = op(picture(40, 30, "L"))
            assert (result.mode, result.size) == ("L", (40, 30)), op.name
    for number in range(10):
        seed_everything(0, number)
        image = transform(picture(100, 80))
        assert image.shape == (1, 224, 224) and image.isfinite().all()


def test_colour_steps_leave_grey_images_as_they_are(make_config):
    """Saturation has nothing to change; timm's colour operation neither."""
    transform = train_transform(released(make_config, *GREY))
    (colour,) = (op for step in transform.transforms for op in policy_ops(step) if op.name.startswith("Color"))
    colour.prob = 1.0
    image = picture(40, 30, "L")
    assert np.array_equal(np.array(colour(image)), np.array(image))


def test_the_fast_way_trains_grey_images_with_the_policy(make_config):
    fast = fast_train_transform(released(make_config, *GREY, *OBLONG))
    for number in range(20):
        seed_everything(0, number)
        batch = fast(fast.decode_crop(png(picture(90, 70))))[None]
        assert batch.shape == (1, 64, 96, 1) and fast.normalize_batch(batch).shape == (1, 1, 64, 96)


@pytest.mark.parametrize("opts", [GREY, ()], ids=["grey", "colour"])
@pytest.mark.parametrize("tta", ["none", "five-crop"])
def test_views_have_the_channels_and_the_size(make_config, opts, tta):
    config = released(make_config, *opts, *OBLONG, "TEST.TTA", tta)
    views, channels = 5 if "five" in tta else 1, 1 if opts else 3
    exact = views_transform(config)(picture(200, 160))
    assert exact.shape == (views, channels, 64, 96)
    fast = fast_views_transform(config)(torch.from_numpy(np.array(picture(200, 160))))
    assert fast.shape == (views, 64, 96, channels)
    assert ((normalize(fast[None])[0] - exact).abs() * 255 * 0.229).max() < 3


# ---------------------------------------------------------------------------------------------------------- not square
@pytest.mark.parametrize(("image", "resized"), [((400, 100), (292, 73)), ((120, 200), (109, 182)), ((109, 73), None)])
def test_the_crop_is_the_centre_of_the_image_at_the_size_that_covers_it(make_config, image, resized):
    """Edges of 64 and 96 are those of a crop of 73 and 109, as 224 are those of 256."""
    original = picture(*image)
    got = eval_transform(released(make_config, *OBLONG))(original)
    if resized is not None:
        size = resized[::-1]
        original = functional.resize(original, size, functional.InterpolationMode.BICUBIC)
    expected = functional.to_tensor(functional.center_crop(original, (64, 96)))
    assert torch.equal(got, functional.normalize(expected, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def test_without_a_crop_the_image_takes_both_edges(make_config):
    got = eval_transform(released(make_config, *OBLONG, "TEST.CROP", "False"))(picture(300, 50))
    expected = functional.resize(picture(300, 50), (64, 96), functional.InterpolationMode.BICUBIC)
    expected = functional.normalize(functional.to_tensor(expected), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("size", ["[32, 48]", "[64, 96]"])
def test_training_crops_have_height_and_width(make_config, size):
    config = released(make_config, "DATA.IMG_SIZE", size)
    height, width = config.DATA.IMG_SIZE
    assert train_transform(config)(picture(50, 40)).shape == (3, height, width)
    fast = fast_train_transform(config)
    assert fast(fast.decode_crop(png(picture(50, 40)))).shape == (height, width, 3)


@pytest.mark.parametrize(("size", "fits"), [("[224, 32]", False), ("[32, 224]", False), ("[224, 200]", True)])
def test_cutmix_has_a_choice_of_boxes_on_both_edges(make_config, size, fits):
    """timm draws both edges of the box between two whole numbers of pixels."""
    opts = ("AUG.CUTMIX_MINMAX", "[0.5,0.51]", "DATA.IMG_SIZE", size)
    config = make_config("--batch-size", "4", "--opts", *opts)
    if fits:
        build_mixup(config)(torch.rand(4, 3, 224, 200), torch.arange(4))
    else:
        assert "images of 32 pixels" in message_of(build_mixup, config)
