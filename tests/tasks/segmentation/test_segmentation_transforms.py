"""Image and mask stay together under every transform, and what is drawn depends on the seed alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from segmentation_data import small_config

from data import seed_everything
from tasks.segmentation.folders import IGNORED
from tasks.segmentation.transforms import TrainingTransform, evaluation_views, resized

PLAIN = ("AUG.PHOTOMETRIC", "False")


def marked(size: tuple[int, int] = (90, 70)) -> tuple[Image.Image, np.ndarray]:
    """An image whose colour tells each pixel's class: large areas of ten classes."""
    rows, columns = np.indices(size)
    classes = (rows // 23 * 3 + columns // 24).astype(np.int16) % 10
    return Image.fromarray((classes[..., None] * 20 + np.array([10, 20, 30])).astype(np.uint8)), classes


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("crop", ["[48, 40]", "[200, 160]"])
def test_image_and_mask_stay_together(seed, crop):
    transform = TrainingTransform(small_config(*PLAIN, "AUG.CROP", crop, "AUG.MAX_SHARE", "1.0"))
    seed_everything(0, seed)
    image, classes = transform(*marked())
    assert image.dtype == torch.uint8 and classes.dtype == torch.int16
    assert image.shape[:2] == classes.shape == torch.Size(eval(crop))
    inside = classes != IGNORED
    # Inside of an area the colour is its class's exactly; resizing blends it with the next one's at edges.
    expected = (classes[..., None] * 20 + torch.tensor([10, 20, 30])).to(torch.uint8)
    agrees = (image.int() - expected.int()).abs().amax(-1) <= 1
    assert agrees[inside].float().mean() > 0.75
    assert inside.any() and set(classes[inside].tolist()) <= set(range(10))
    if crop == "[200, 160]":  # larger than the image: padded by the mean colour, which is 0 once normalised
        assert (image[~inside] == torch.tensor([124, 116, 104], dtype=torch.uint8)).all() and (~inside).any()


@pytest.mark.parametrize("factor", [1 / 3, 0.6])
def test_a_resized_mask_stays_in_its_place(factor):
    """Then the mirrored mask becomes the mirrored one; of these factors no pixel's centre is on an edge."""
    size = round(120 * factor)
    scale = ("AUG.SCALE", f"[{factor}, {factor}]", "AUG.CROP", f"[{size}, {size}]", "AUG.MAX_SHARE", "1.0")
    transform = TrainingTransform(small_config(*PLAIN, *scale, "AUG.HFLIP", "0.0"))
    classes = np.random.default_rng(0).integers(0, 9, (120, 120)).astype(np.int16)
    image = Image.new("RGB", (120, 120))
    assert torch.equal(transform(image, classes[:, ::-1].copy())[1], transform(image, classes)[1].flip(1))


def test_a_flip_mirrors_both():
    both = [
        TrainingTransform(small_config(*PLAIN, "AUG.SCALE", "[1.0, 1.0]", "AUG.CROP", "[90, 70]", "AUG.HFLIP", chance))
        for chance in ("0.0", "1.0")
    ]
    (image, classes), (flipped_image, flipped_classes) = (transform(*marked()) for transform in both)
    assert torch.equal(flipped_image, image.flip(1)) and torch.equal(flipped_classes, classes.flip(1))
    assert np.array_equal(classes.numpy(), marked()[1])


def test_colours_change_and_the_mask_does_not():
    config = small_config("AUG.SCALE", "[1.0, 1.0]", "AUG.CROP", "[90, 70]", "AUG.HFLIP", "0.0")
    seed_everything(0, 3)
    image, classes = TrainingTransform(config)(*marked())
    assert np.array_equal(classes.numpy(), marked()[1])
    assert not np.array_equal(image.numpy(), np.asarray(marked()[0]))


def test_no_class_covers_a_crop():
    classes = np.zeros((100, 400), np.int16)
    classes[:, 300:] = 1
    picture = Image.new("RGB", (400, 100))
    transform = TrainingTransform(small_config(*PLAIN, "AUG.SCALE", "[1.0, 1.0]", "AUG.CROP", "[100, 120]"))
    shares = []
    for seed in range(30):
        seed_everything(0, seed)
        shares.append(float((transform(picture, classes)[1] == 0).float().mean()))
    # Nine of ten crops show one class alone, or nearly so; ten tries find a better one for two of three images.
    assert sum(0.25 <= share <= 0.75 for share in shares) >= 20


def test_what_is_drawn_depends_on_the_seed():
    transform = TrainingTransform(small_config())
    results = []
    for seed in (1, 2, 1):
        seed_everything(0, seed)
        results.append(transform(*marked()))
    assert torch.equal(results[0][0], results[2][0]) and torch.equal(results[0][1], results[2][1])
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        ((683, 512), 1.0, [683, 512]),
        ((300, 200), 1.0, [768, 512]),
        ((200, 2000), 1.0, [205, 2048]),  # the long side decides
        ((512, 683), 0.5, [256, 342]),
        ((100, 2000), 0.25, [32, 512]),  # no side below what the network takes
    ],
)
def test_sizes_fit_short_and_long_side(size, factor, expected):
    assert resized(small_config("DATA.IMG_SIZE", "512"), size, factor) == expected


def test_views_for_evaluation_have_the_scales():
    views = evaluation_views(small_config(), marked()[0], [1.0, 1.5])
    assert [tuple(view.shape) for view in views] == [(90, 70, 3), (135, 105, 3)]
    assert np.array_equal(views[0].numpy(), np.asarray(marked()[0]))
