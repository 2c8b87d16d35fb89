"""data/fast/shearing.py: timm's shears and translations line by line, with Pillow's pixels."""

import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
import runs
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, AugmentOp
from yacs.config import CfgNode

from data.fast.shearing import SMALLEST_EDGE, LineShift, policy_ops, shear_by_lines
from tasks.classification.transforms import fast_train_transform, train_transform

MakeConfig = Callable[..., CfgNode]
RELEASED = ("--cfg", str(runs.ROOT / "configs" / "groupmixformer_small.yaml"))
LEVELS = {
    "ShearX": (0.27, -0.013),
    "ShearY": (0.3, -0.2),
    "TranslateXRel": (0.405, -0.1234),
    "TranslateYRel": (0.25, -0.0071),
    "TranslateX": (20.0, -3.75),
    "TranslateY": (0.5, -100.2),
}
FILL = (124, 116, 104)


def photo(width: int = 150, height: int = 102) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def differences(name: str, image: Image.Image, level: float, resample: int = Image.Resampling.BICUBIC) -> np.ndarray:
    by_pillow = NAME_TO_OP[name]
    expected = by_pillow(image, level, fillcolor=FILL, resample=resample)
    got = LineShift(name, by_pillow)(image, level, fillcolor=FILL, resample=resample)
    assert got.mode == "RGB" and got.size == image.size
    return np.abs(np.asarray(got).astype(int) - np.asarray(expected).astype(int))


@pytest.mark.parametrize("name", LEVELS)
def test_pixels_are_those_of_pillow(name: str) -> None:
    for level in LEVELS[name]:
        for image in (photo(), photo(102, 150)):
            difference = differences(name, image, level)
            # Round fractions give whole numbers, from which either may be a rounding away before it is cut off.
            assert difference.max() <= 1 and difference.mean() < 0.06


@pytest.mark.parametrize("name", LEVELS)
def test_an_even_area_keeps_its_level(name: str) -> None:
    for level in LEVELS[name]:
        for colour in ((255, 254, 1), (0, 77, 200)):
            assert not differences(name, Image.new("RGB", (128, 100), colour), level).any()


def test_what_leaves_the_image_is_filled() -> None:
    assert not differences("TranslateX", photo(), 500.0).any()
    assert not differences("ShearY", photo(), 90.0).any()


@pytest.mark.parametrize(
    ("image", "fillcolor", "resample"),
    [
        (photo(), FILL, Image.Resampling.BILINEAR),
        (photo(), FILL, Image.Resampling.NEAREST),
        (photo().convert("L"), 3, Image.Resampling.BICUBIC),
        (photo(SMALLEST_EDGE - 1, 150), FILL, Image.Resampling.BICUBIC),
    ],
    ids=["bilinear", "nearest", "grey", "small"],
)
def test_what_is_no_faster_by_lines_is_left_to_pillow(image: Image.Image, fillcolor: object, resample: int) -> None:
    by_pillow = NAME_TO_OP["ShearX"]
    got = LineShift("ShearX", by_pillow)(image, 0.2, fillcolor=fillcolor, resample=resample)
    assert got == by_pillow(image, 0.2, fillcolor=fillcolor, resample=resample)


def test_a_filter_is_drawn_as_timm_draws_it() -> None:
    """Where DATA.INTERPOLATION is 'random', every operation draws its own; later draws must not depend on who did."""
    hparams = dict(img_mean=FILL, interpolation=(Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
    op = AugmentOp("ShearX", prob=1.0, magnitude=9, hparams=hparams)
    by_lines = AugmentOp("ShearX", prob=1.0, magnitude=9, hparams=hparams)
    shear_by_lines([by_lines])
    assert isinstance(by_lines.aug_fn, LineShift)
    for seed in range(8):
        random.seed(seed)
        expected, then = np.asarray(op(photo())).astype(int), random.random()
        random.seed(seed)
        got = np.asarray(by_lines(photo())).astype(int)
        assert np.abs(got - expected).max() <= 1 and random.random() == then


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "v0", "augmix-m5-w4"])
def test_only_the_fast_way_uses_them(make_config: MakeConfig, policy: str) -> None:
    config = make_config(*RELEASED, "--opts", "AUG.AUTO_AUGMENT", policy)
    fast = [op for step in fast_train_transform(config).steps for op in policy_ops(step)]
    exact = [op for step in train_transform(config).transforms for op in policy_ops(step)]
    assert [op.name for op in fast] == [op.name for op in exact] and exact
    assert any(isinstance(op.aug_fn, LineShift) for op in fast)
    assert not any(isinstance(op.aug_fn, LineShift) for op in exact)
    for op in fast:
        assert isinstance(op.aug_fn, LineShift) == op.name.startswith(("Shear", "Translate"))


def test_workers_may_pickle_it(make_config: MakeConfig) -> None:
    pickle.loads(pickle.dumps(fast_train_transform(make_config(*RELEASED))))
