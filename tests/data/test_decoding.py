"""From bytes to an image: every mode, what is lost on the way, and what cannot be read."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import UNREADABLE, deep_images, made_images, message_of, png, tiff
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader
from torchvision.datasets.folder import pil_loader

from configs import UserError
from data.datasets import ImageDataset, decode_image
from data.decoding import lost_content
from data.fast.decoding import decode_to_tensor
from data.sources import FolderSource

DEEP = deep_images()


@pytest.mark.parametrize("name", made_images())
def test_decoding_equals_torchvision(tmp_path, name):
    image, form, options = made_images()[name]
    image.save(tmp_path / name, form, **options)
    ours, theirs = decode_image((tmp_path / name).read_bytes()), pil_loader(str(tmp_path / name))
    assert ours.mode == "RGB" and ours.size == theirs.size
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_upper_bits(form):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    decoded = np.asarray(decode_image(buffer.getvalue()))
    assert np.array_equal(decoded, np.repeat((values >> 8)[..., None], 3, axis=2))
    assert len(np.unique(decoded)) == 256, "neither clipped to white nor coarser"


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_image_is_named(tmp_path, name):
    (tmp_path / "c").mkdir()
    path = tmp_path / "c" / name
    path.write_bytes(UNREADABLE[name])
    message = message_of(ImageDataset(FolderSource(tmp_path), np.array).__getitem__, 0)
    assert message.startswith(f"{path}: cannot be read as an image: ") and not message.rstrip().endswith(":")
    assert " object at " not in message


def test_vanished_image_is_named(image_folder):
    source = FolderSource(image_folder / "train")
    path = Path(source.samples[4][0])
    path.unlink()
    assert str(path) in message_of(ImageDataset(source, np.array).__getitem__, 4)


def test_decompression_bomb_is_named_before_it_takes_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # the guard itself, at a size that a test can write
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "bomb.png").write_bytes(png(1, (30, 30)))
    assert "bomb.png" in message_of(ImageDataset(FolderSource(tmp_path), np.array).__getitem__, 0)


def test_error_in_a_worker_is_one_clean_line(image_folder):
    source = FolderSource(image_folder / "train")
    path = Path(source.samples[7][0])
    path.write_bytes(path.read_bytes()[:200])
    expected = message_of(ImageDataset(source, np.array).__getitem__, 7)
    loader = DataLoader(ImageDataset(source, lambda image: torch.from_numpy(np.array(image))), 4, num_workers=1)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert "Traceback" in str(caught.value), "torch has wrapped it"
    assert caught.value.one_line() == expected
    assert UserError(expected).one_line() == expected


def test_formats_that_start_other_programs_are_refused():
    with pytest.raises(UnidentifiedImageError):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


# ------------------------------------------------------------------------------------------------------ unusual depths
@pytest.mark.parametrize("name", DEEP)
def test_an_image_that_comes_out_nearly_constant_is_told(name):
    content, lost = DEEP[name]
    decoded = np.asarray(decode_image(content))
    assert bool(lost_content(content)) == lost
    assert decoded.shape == (32, 32, 3) and (lost or "constant" in name or np.ptp(decoded) > 200 or "shape" in name)
    assert np.array_equal(decode_to_tensor(content), decoded), "the fast way gives the same"


@pytest.mark.parametrize("name", [name for name in DEEP if not name.startswith(("16", "12", "8", "mask"))])
def test_modes_without_a_wide_range_are_decoded_as_torchvision_does(tmp_path, name):
    (tmp_path / name).write_bytes(DEEP[name][0])
    assert decode_image(DEEP[name][0]).tobytes() == pil_loader(str(tmp_path / name)).tobytes()


def test_a_tiff_of_12_bits_is_scaled_by_them():
    values = np.arange(0, 4096, 4).reshape(32, 32)
    assert np.array_equal(np.asarray(decode_image(tiff(values, 12)))[..., 0], values >> 4)


def test_transparency_of_less_common_modes():
    la = Image.merge("LA", (Image.linear_gradient("L"), Image.linear_gradient("L")))
    content = io.BytesIO()
    la.save(content, "TIFF")
    content = content.getvalue()
    extra_samples = 338  # 2 is transparency, 1 such that colours are multiplied by it, which Pillow opens as La
    entry = content.index(extra_samples.to_bytes(2, "little") + b"\3\0")
    content = content[: entry + 8] + b"\1" + content[entry + 9 :]
    assert Image.open(io.BytesIO(content)).mode == "La" and np.ptp(np.asarray(decode_image(content))) > 200


def test_photographs_cost_no_second_look(monkeypatch):
    """Neither JPEGs nor other images of 8 bits are decoded again."""
    (jpeg, form, options), buffer = made_images()["rgb.jpeg"], io.BytesIO()
    jpeg.save(buffer, form, **options)
    monkeypatch.setattr("data.decoding.to_rgb", None)
    assert lost_content(png(3)) == ""
    monkeypatch.setattr("data.decoding.Image", None)
    assert lost_content(buffer.getvalue()) == ""
