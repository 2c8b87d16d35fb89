"""DATA.FAST_LOADING: the same pixels, the same distributions, the same guarantees as the exact way."""

import errno
import io
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from image_data import UNREADABLE, made_images
from PIL import Image
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision import transforms
from yacs.config import CfgNode

from configs import UserError
from data.datasets import ImageDataset, decode_image
from data.fast import decoding as fast_decoding
from data.fast.decoding import EncodedImage, _region_decoder, decode_to_tensor
from data.fast.transforms import FastEvalTransform, FastTrainTransform
from data.normalization import normalize
from data.randomness import seed_everything
from data.sources import FolderSource
from tasks.classification.transforms import (
    eval_transform,
    fast_train_transform,
    fast_views_transform,
    train_transform,
    views_transform,
)

MakeConfig = Callable[..., CfgNode]
RELEASED = ("--cfg", str(runs.ROOT / "configs" / "groupmixformer_small.yaml"))


def photo(width: int = 500, height: int = 375) -> Image.Image:
    """Smooth shading with edges and texture, as photographs have."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    shading = np.stack([np.sin(x / 70), np.cos(y / 50), np.sin((x + y) / 90)], axis=2) * 80 + 128
    shading += 40 * ((x // 60 + y // 45) % 2)[..., None] + rng.normal(0, 6, shading.shape)
    return Image.fromarray(shading.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


def augment(transform: FastTrainTransform, content: bytes) -> Tensor:
    return transform(transform.decode_crop(content))


def with_marker(jpeg: bytes, marker: bytes) -> bytes:
    """A marker where four fifths of the file are over, behind most crops."""
    place = len(jpeg) * 4 // 5
    return jpeg[:place] + marker + jpeg[place:]


JPEGS = {
    "plain": dict(quality=90),
    "progressive": dict(quality=80, progressive=True),
    "no chroma subsampling": dict(quality=95, subsampling=0),
    "4:2:2": dict(quality=75, subsampling=1),
    "low quality": dict(quality=20),
    "restart markers": dict(quality=85, restart_marker_blocks=4),
}


# ------------------------------------------------------------------------------------------------------------- decoding
@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("size", [(333, 501), (1, 1)], ids=str)
def test_jpegs_decode_to_the_pixels_of_pillow(kind: str, size: tuple[int, int]) -> None:
    content = encoded(photo(*size), **JPEGS[kind])
    assert torch.equal(decode_to_tensor(content), as_tensor(decode_image(content)))


def test_without_torchvisions_decoder_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(photo())
    expected = decode_to_tensor(content)
    monkeypatch.setattr(fast_decoding, "decode_jpeg", None)
    assert torch.equal(decode_to_tensor(content), expected)


REGIONS = [
    (0, 0, 100, 100),
    (11, 13, 101, 87),
    (274, 399, 101, 101),
    (0, 499, 375, 1),
    (374, 0, 1, 500),
    (0, 0, 375, 500),
]
regions_decoded = pytest.mark.skipif(
    _region_decoder(os.getpid()) is None, reason="needs nvImageCodec (requirements-extras.txt)"
)


@regions_decoded
@pytest.mark.parametrize(
    "kind", [*(kind for kind in JPEGS if kind != "progressive"), "grey", "turned by EXIF", "RGB inside"]
)
def test_a_region_has_the_pixels_that_the_whole_image_has_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is decoded without the rest: what decodes whole images is taken away."""
    turned = Image.Exif()
    turned[0x0112] = 6
    options = {**JPEGS, "grey": {}, "turned by EXIF": dict(exif=turned), "RGB inside": dict(keep_rgb=True)}[kind]
    image = photo().convert("L" if kind == "grey" else "RGB")
    encoded_image = EncodedImage(encoded(image, **options))
    whole = encoded_image.whole()
    monkeypatch.setattr(encoded_image, "whole", None)
    for top, left, height, width in REGIONS:
        expected = whole[top : top + height, left : left + width]
        assert torch.equal(encoded_image.region(top, left, height, width), expected)


def cut_short(progressive: bool) -> bytes:
    """A JPEG that ends too early, in its one scan or before the last of several; decoders make up what lacks."""
    content = encoded(photo(), quality=95, progressive=progressive)
    end = content.rindex(b"\xff\xda") if progressive else len(content) // 2
    return content[:end] + b"\xff\xd9"


OTHER_REGIONS = {
    "PNG": encoded(photo(), "PNG"),
    "CMYK": encoded(photo().convert("CMYK")),
    "progressive": encoded(photo(), progressive=True),
    "progressive, cut short": cut_short(progressive=True),
    "cut short": cut_short(progressive=False),
    "wrong restart": with_marker(encoded(photo()), b"\xff\xd3"),
    "bytes lacking": encoded(photo())[:15000] + encoded(photo())[15300:],
    "comment behind the image": encoded(photo())[:-2] + b"\xff\xfe\x00\x04ab\xff\xd9",
}


@pytest.mark.parametrize("kind", OTHER_REGIONS)
def test_regions_of_all_that_pillow_accepts_are_parts_of_the_whole(kind: str) -> None:
    image = EncodedImage(OTHER_REGIONS[kind])
    whole = image.whole()  # not Pillow's: torchvision 0.25 smooths a progressive image that lacks scans otherwise
    for top, left, height, width in REGIONS:
        expected = whole[top : top + height, left : left + width]
        assert torch.equal(image.region(top, left, height, width), expected)


@pytest.mark.skipif(fast_decoding.decode_jpeg is None, reason="this torchvision has no decoders")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_torchvision_alone_refuses_is_decoded_by_pillow() -> None:
    content = encoded(photo())[:-2] + bytes(400)
    with pytest.raises(RuntimeError, match="truncated"):
        fast_decoding.decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    assert torch.equal(decode_to_tensor(content), as_tensor(decode_image(content)))


def raise_(error: Exception) -> None:
    raise error


@regions_decoded
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("importlib.util.find_spec", lambda name: None),
        ("importlib.util.find_spec", lambda name: raise_(ModuleNotFoundError("No module named 'nvidia'"))),
        ("importlib.util.find_spec", lambda name: ModuleSpec(name, None)),
        ("tempfile.TemporaryDirectory", lambda: raise_(OSError(errno.ENOSPC, "No space left on device"))),
        ("nvidia.nvimgcodec.__version__", "0.8.0"),
        ("nvidia.nvimgcodec.Decoder", lambda **options: raise_(RuntimeError("no decoder"))),
    ],
    ids=["not installed", "nothing of NVIDIA", "a folder left", "no room", "too old", "does not start"],
)
def test_without_nvimagecodec_crops_are_the_same(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    transform = fast_train_transform(make_config(*RELEASED))
    content = encoded(photo())

    def crop() -> Tensor:
        seed_everything(0)
        return transform.decode_crop(content)

    expected = crop()
    monkeypatch.setattr(name, value)
    fast_decoding._region_decoder.cache_clear()
    try:
        assert _region_decoder(os.getpid()) is None and torch.equal(crop(), expected)
    finally:
        fast_decoding._region_decoder.cache_clear()


@pytest.mark.launch
@regions_decoded
def test_nvimagecodec_is_quiet_and_loads_no_decoder_for_gpus(tmp_path: Path) -> None:
    """They print which libraries they miss, and a forked worker must leave CUDA alone. Four threads need it first."""
    path = tmp_path / "image.jpg"
    path.write_bytes(encoded(photo()))
    code = f"""
import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from data.fast.decoding import EncodedImage
EncodedImage.whole = None
together = Barrier(4)
def decode(_):
    image = EncodedImage(open({str(path)!r}, "rb").read())
    together.wait()
    return image.region(0, 0, 50, 60)
with ThreadPoolExecutor(4) as threads:
    assert len(list(threads.map(decode, range(4)))) == 4
assert "NVIMGCODEC_EXTENSIONS_PATH" not in os.environ and "PYNVIMGCODEC_VERBOSITY" not in os.environ
assert not [line for line in open("/proc/self/maps") if "nvimgcodec/extensions" in line and "jpeg_turbo" not in line]
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@regions_decoded
def test_threads_and_forked_processes_may_decode_regions() -> None:
    image = EncodedImage(encoded(photo()))
    expected = image.whole()[10:110, 20:120]

    def check(_: int) -> bool:
        return torch.equal(image.region(10, 20, 100, 100), expected)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(check, range(200)))
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as processes:
        assert all(processes.map(_region_is, [image.encoded] * 4, [expected.numpy()] * 4))


def _region_is(content: bytes, expected: np.ndarray) -> bool:
    return np.array_equal(EncodedImage(content).region(10, 20, 100, 100).numpy(), expected)


@pytest.mark.parametrize("name", made_images())
def test_other_images_decode_to_the_pixels_of_pillow(name: str) -> None:
    image, form, options = made_images()[name]
    content = encoded(image, form, **options)
    assert torch.equal(decode_to_tensor(content), as_tensor(decode_image(content)))


DAMAGED = {
    **UNREADABLE,
    "half.jpg": encoded(photo())[:20000],
    "headers.jpg": encoded(photo())[:300],
    "last_bytes.jpg": encoded(photo())[:-400],
    "unknown_marker.jpg": with_marker(encoded(photo()), b"\xff\xaf"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_pillow_refuses_is_refused_and_named(make_config: MakeConfig, tmp_path: Path, name: str) -> None:
    (tmp_path / "c").mkdir()
    path = tmp_path / "c" / name
    path.write_bytes(DAMAGED[name])
    decode_crop = fast_train_transform(make_config(*RELEASED)).decode_crop
    for number, decode in enumerate((decode_image, decode_to_tensor, *[decode_crop] * 8)):
        seed_everything(number)
        with pytest.raises(UserError, match="cannot be read as an image") as caught:
            ImageDataset(FolderSource(tmp_path), lambda image: image, decode)[0]
        assert str(path) in caught.value.one_line()


# ----------------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("size", [(375, 500), (1200, 900), (100, 80)], ids=str)
@pytest.mark.parametrize("opts", [(), ("TEST.CROP", "False")], ids=str)
def test_evaluation_differs_by_few_levels(
    make_config: MakeConfig, size: tuple[int, int], opts: tuple[str, ...]
) -> None:
    config = make_config(*RELEASED, "--opts", "DATA.IMG_SIZE", "224", *opts)
    content = encoded(photo(*size), quality=95)
    exact = eval_transform(config)(decode_image(content))
    quick = normalize(fast_views_transform(config)(decode_to_tensor(content)))[0]
    levels = (exact - quick).abs() * 255 * 0.229  # 0.229: the largest standard deviation, so at least as many levels
    assert levels.mean() < 0.5
    assert levels.max() < 3


def test_images_of_the_right_size_have_the_bits_of_the_exact_way(make_config: MakeConfig) -> None:
    config = make_config(*RELEASED, "--opts", "TEST.CROP", "False")
    content = encoded(photo(224, 224))
    exact = eval_transform(config)(decode_image(content))
    assert torch.equal(normalize(fast_views_transform(config)(decode_to_tensor(content))), exact[None])


def test_normalising_a_batch_gives_the_bits_of_normalising_images() -> None:
    images = torch.randint(0, 256, (2, 16, 12, 3), dtype=torch.uint8)
    one_by_one = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    expected = torch.stack([one_by_one(image.numpy()) for image in images])
    assert torch.equal(normalize(images), expected)
    assert normalize(expected) is expected, "what is normalised stays as it is"


# ------------------------------------------------------------------------------------------------------------- training
def coordinates(width: int = 160, height: int = 120) -> Image.Image:
    """Red tells x, green tells y: what a crop has seen can be read off its pixels."""
    y, x = np.mgrid[:height, :width]
    values = np.stack([x, y, np.zeros_like(x)], axis=2)
    return Image.fromarray(values.astype(np.uint8))


def crops(transform: Callable[[object], object], image: object, count: int) -> np.ndarray:
    """(count, 5): left, top, width and height of each crop, in pixels, and whether it is mirrored."""
    rows = []
    for _ in range(count):
        result = transform(image)
        result = (as_tensor(result) if isinstance(result, Image.Image) else result).float()
        red, green = result[..., 0].mean(0), result[..., 1].mean(1)
        mirrored = float(red[0] > red[-1])
        rows.append([red.min(), green.min(), red.max() - red.min(), green.max() - green.min(), mirrored])
    return np.array(rows)


def test_crops_and_mirroring_are_distributed_as_in_the_exact_way(make_config: MakeConfig) -> None:
    config = make_config(*RELEASED, "--opts", "DATA.IMG_SIZE", "64", "AUG.AUTO_AUGMENT", "none", "AUG.REPROB", "0.0")
    config.defrost()
    config.AUG.COLOR_JITTER = 0.0
    random.seed(0)
    torch.manual_seed(0)
    exact = transforms.Compose(train_transform(config).transforms[:2])
    expected = crops(exact, coordinates(), 1000)
    fast = fast_train_transform(config)
    got = crops(lambda content: augment(fast, content), encoded(coordinates(), "PNG"), 1000)
    for column, name in enumerate(("left", "top", "width", "height")):
        assert ks_2samp(got[:, column], expected[:, column]).pvalue > 1e-3, name
    assert got[:, 4].mean() == pytest.approx(0.5, abs=0.05) and expected[:, 4].mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("hflip", ["0.5", "0.0"])
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_the_same_random_state_gives_the_image_of_the_exact_way(
    make_config: MakeConfig, hflip: str, interpolation: str
) -> None:
    opts = ("AUG.REPROB", "0.0", "AUG.HFLIP", hflip, "DATA.INTERPOLATION", interpolation)
    config = make_config(*RELEASED, "--opts", "DATA.IMG_SIZE", "128", *opts)
    exact, fast = train_transform(config), fast_train_transform(config)
    content, far = encoded(photo(), quality=95), 0
    ways = (lambda: exact(decode_image(content)), lambda: augment(fast, content))
    for number in range(40):
        results, states = [], []
        for way in ways:
            seed_everything(0, number)
            results.append(way())
            states.append((random.random(), np.random.rand(), torch.rand(1).item()))
        assert states[0] == states[1]
        levels = (results[0] - normalize(results[1][None])[0]).abs() * 255 * 0.225
        far += levels.mean().item() > 1.5  # few levels may become many in an operation of the policy
    assert far <= 4


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 50)], ids=str)
def test_images_of_a_pixel_are_no_error(make_config: MakeConfig, size: tuple[int, int]) -> None:
    transform = fast_train_transform(make_config(*RELEASED))
    for number in range(30):
        seed_everything(0, number)
        for form in ("PNG", "JPEG"):
            assert augment(transform, encoded(Image.new("RGB", size, (9, 8, 7)), form)).shape == (224, 224, 3)


def test_the_policy_is_that_of_the_exact_way(make_config: MakeConfig) -> None:
    config = make_config(*RELEASED)
    policy = fast_train_transform(config).steps
    expected = train_transform(config).transforms[2]
    assert [str(step) for step in policy] == [str(expected)]
    jitter = make_config(*RELEASED, "--opts", "AUG.AUTO_AUGMENT", "none")
    assert [type(step).__name__ for step in fast_train_transform(jitter).steps] == ["ColorJitter"]
    nothing = make_config(*RELEASED, "--opts", "AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", "0.0")
    assert fast_train_transform(nothing).steps == []


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_training_images_are_uint8_of_the_right_size(make_config: MakeConfig, size: int, interpolation: str) -> None:
    config = make_config(*RELEASED, "--opts", "DATA.IMG_SIZE", str(size), "DATA.INTERPOLATION", interpolation)
    image = augment(fast_train_transform(config), encoded(photo(48, 40)))
    assert image.dtype == torch.uint8 and image.shape == (size, size, 3)


def test_erasing_is_as_frequent_and_as_large_as_in_the_exact_way(make_config: MakeConfig) -> None:
    config = make_config(*RELEASED, "--opts", "AUG.REMODE", "const")
    random.seed(0)
    grey = torch.full((3000, 32, 32, 3), 100, dtype=torch.uint8)
    erased = fast_train_transform(config).normalize_batch(grey)
    exact = train_transform(config).transforms[-1]
    expected = torch.stack([exact(torch.ones(3, 32, 32)) for _ in range(3000)])
    areas, expected_areas = ((x[:, 0] == 0).float().mean((1, 2)) for x in (erased, expected))
    assert (areas > 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert ks_2samp(areas[areas > 0], expected_areas[expected_areas > 0]).pvalue > 1e-3
    off = fast_train_transform(make_config(*RELEASED, "--opts", "AUG.REPROB", "0.0"))
    assert torch.equal(off.normalize_batch(grey[:9]), normalize(grey[:9]))


def _own_step(image: object) -> object:
    return image


OWN_STEPS = [
    (2, transforms.Grayscale(3), ""),  # on Pillow images: any step may stand here
    (0, transforms.CenterCrop(8), "CenterCrop as the first step"),
    (-1, _own_step, "_own_step after the conversion"),
    (6, transforms.GaussianBlur(3), "GaussianBlur after the conversion"),
]


@pytest.mark.parametrize(("place", "step", "refused"), OWN_STEPS, ids=["Pillow", "first", "late", "last"])
def test_a_step_of_ones_own_is_done_or_refused(
    make_config: MakeConfig, place: int, step: Callable[[object], object], refused: str
) -> None:
    steps = train_transform(make_config(*RELEASED)).transforms
    steps.insert(len(steps) + place if place < 0 else place, step)
    if refused:
        with pytest.raises(UserError, match=rf"^DATA\.FAST_LOADING: cannot do the step {refused}[^\n]*$"):
            FastTrainTransform(steps)
    else:
        image = augment(FastTrainTransform(steps), encoded(photo()))
        assert torch.equal(image[..., 0], image[..., 1])


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"Normalize": transforms.Normalize((0.5,) * 3, (0.5,) * 3)}, "Normalize with other values"),
        ({"Normalize": None, "RandomErasing": None}, "no Normalize"),
        ({"MaybeToTensor": None}, "no MaybeToTensor"),
    ],
    ids=["other values", "not normalised", "no tensor"],
)
def test_without_the_usual_ending_it_is_refused(
    make_config: MakeConfig, replace: dict[str, object], message: str
) -> None:
    steps = [replace.get(type(s).__name__, s) for s in train_transform(make_config(*RELEASED)).transforms]
    with pytest.raises(UserError, match=message):
        FastTrainTransform([step for step in steps if step is not None])


def test_validation_does_or_refuses_every_step(make_config: MakeConfig) -> None:
    config = make_config(*RELEASED)
    for place, step, message in (
        (1, transforms.Grayscale(3), "Grayscale in validation"),
        (4, transforms.RandomErasing(), "RandomErasing after the conversion"),
    ):
        steps = eval_transform(config).transforms
        steps.insert(place, step)
        with pytest.raises(UserError, match=f"cannot do the step {message}"):
            FastEvalTransform(steps)


def test_views_are_those_of_the_exact_way(make_config: MakeConfig) -> None:
    config = make_config(*RELEASED, "--opts", "TEST.TTA", "five-crop")
    content = encoded(photo(), quality=95)
    exact = views_transform(config)(decode_image(content))
    quick = normalize(fast_views_transform(config)(decode_to_tensor(content)))
    assert exact.shape == quick.shape == (5, 3, 224, 224)
    assert (exact - quick).abs().max() * 255 * 0.229 < 3


def test_interpolation_that_tensors_do_not_have_is_one_line(make_config: MakeConfig) -> None:
    config = make_config(*RELEASED, "--opts", "DATA.INTERPOLATION", "lanczos")
    for transform in (fast_train_transform, fast_views_transform):
        with pytest.raises(UserError, match=r"DATA\.INTERPOLATION = 'lanczos': .*'bicubic'"):
            transform(config)


# ----------------------------------------------------------------------------------------------------------------- runs
def test_a_stopped_run_ends_with_the_same_bits_whatever_the_workers(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opts = ("DATA.FAST_LOADING", "all")
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path / "whole", *opts)) == 0
    stopped = runs.arguments(data, tmp_path / "stopped", *opts)
    assert runs.train_here(monkeypatch, stopped, stop_at=3) == 75
    assert runs.train_here(monkeypatch, [*stopped, "DATA.NUM_WORKERS", "2"]) == 0
    name = "ckpt_epoch_1.pth"
    whole, continued = (runs.run_folder(tmp_path / run) / name for run in ("whole", "stopped"))
    assert runs.digest(whole) == runs.digest(continued)
