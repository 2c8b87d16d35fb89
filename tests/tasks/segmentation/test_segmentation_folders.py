"""Every layout of a data set, and one line for each that is malformed."""

import re
import shutil
import struct
import zlib

import numpy as np
import pytest
from image_data import message_of
from PIL import Image
from segmentation_data import ADE20K, CLASSES, IGNORED, draw, small_config, write_folder, write_samples

from tasks.segmentation.folders import CITYSCAPES, check_first_masks, fingerprint, open_masks

CITY_FOLDERS = {"train": ("leftImg8bit/train", "gtFine/train"), "val": ("leftImg8bit/val", "gtFine/val")}
PAIR_FOLDERS = {"train": ("train/images", "train/masks"), "val": ("val/images", "val/masks")}


def opened(root, *opts, split="train"):
    return open_masks(small_config("DATA.DATA_PATH", str(root), *opts), split)


def expected_classes(number: int) -> np.ndarray:
    mask = draw(number, (48, 64))[1].astype(np.int16)
    return np.where(mask == IGNORED, -1, mask)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


def test_ade20k_layout(folder):
    images = opened(folder)
    assert len(images) == 6 and images.classes == list(CLASSES)
    assert images.samples[0] == ("images/training/000.png", "annotations/training/000.png")
    image, classes = images.load(0)
    assert image.size == (64, 48) and np.array_equal(classes, expected_classes(0))
    assert len(opened(folder, split="val")) == 5


def test_zero_label_counts_nowhere_and_the_others_move_down(tmp_path):
    root = write_samples(tmp_path, values=lambda mask: np.where(mask == IGNORED, 0, mask + 1).astype(np.uint8))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    images = opened(root, "DATA.REDUCE_ZERO_LABEL", "True")
    classes = images.load(0)[1]
    assert np.array_equal(classes, expected_classes(0))
    # A saved mask has the values of the data set's own, as ADE20K's server wants them: class + 1.
    saved = np.asarray(images.to_mask(np.maximum(classes, 0)))
    assert saved.dtype == np.uint8 and np.array_equal(saved, np.maximum(classes, 0) + 1)


def test_ade20k_names_its_classes_in_a_table(folder):
    (folder / "classes.txt").unlink()
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t.1\twall, side\n2\t.1\tsky\n")
    assert opened(folder).classes == ["wall, side", "sky"]


@pytest.mark.parametrize("kind", ["labelTrainIds", "labelIds"])
def test_cityscapes_names(tmp_path, kind):
    ids = np.full(256, 0, np.uint8)
    ids[:3] = [0, 1, 2] if kind == "labelTrainIds" else list(CITYSCAPES.values())[:3]
    ids[IGNORED] = IGNORED if kind == "labelTrainIds" else 4  # 4 is none of the 19 classes
    root = write_samples(
        tmp_path,
        CITY_FOLDERS,
        name=lambda n: (f"city{n % 2}/{n}_leftImg8bit.png", f"city{n % 2}/{n}_gtFine_{kind}.png"),
        values=lambda mask: ids[mask],
    )
    (root / "gtFine" / "train" / "city0" / "0_gtFine_color.png").write_bytes(b"of no interest")
    images = opened(root)
    assert len(images) == 6 and images.classes[:3] == ["road", "sidewalk", "building"] and len(images.classes) == 19
    classes = images.load(0)[1]
    assert np.array_equal(classes, expected_classes(0))
    assert set(np.unique(images.to_mask(np.maximum(classes, 0)))) == set(ids[:3].tolist())
    assert images.mask_name(0) == f"city0/0_gtFine_{kind}.png"


def test_two_folders_of_images_and_masks(tmp_path):
    names = lambda number: (f"{number}.bmp", f"{number}.png")  # noqa: E731
    root = write_samples(tmp_path / "a", PAIR_FOLDERS, name=names)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    assert np.array_equal(opened(root).load(0)[1], expected_classes(0))
    # Folders of any other names are keys.
    other = write_samples(tmp_path / "b", {"train": ("pics/t", "labels/t"), "val": ("pics/v", "labels/v")}, name=names)
    keys = ("DATA.TRAIN_IMAGES", "pics/t", "DATA.TRAIN_MASKS", "labels/t", "DATA.VAL_IMAGES", "pics/v")
    keys += ("DATA.VAL_MASKS", "labels/v", "DATA.CLASSES", str(root / "classes.txt"))
    assert [len(opened(other, *keys, split=split)) for split in ("train", "val")] == [6, 5]


@pytest.mark.parametrize("mode", ["P", "1", "I;16"])
def test_masks_of_other_modes(folder, mode):
    path = folder / "annotations" / "training" / "000.png"
    values = np.asarray(Image.open(path)) % 2
    mask = Image.fromarray(values.astype(np.uint16) if mode == "I;16" else values.astype(np.uint8))
    if mode == "P":
        mask.putpalette([200, 100, 50, 7, 7, 7])
    elif mode == "1":
        mask = Image.fromarray(values.astype(bool))
    mask.save(path)
    assert Image.open(path).mode == mode
    assert np.array_equal(opened(folder).load(0)[1], values)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_values_of_few_bits_are_classes(folder, bits):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    per_byte = 8 // bits
    values = np.arange(48 * 64).reshape(48, 64) % 3
    packed = sum(values[:, place::per_byte] << (8 - bits * (place + 1)) for place in range(per_byte)).astype(np.uint8)
    header = struct.pack(">IIBBBBB", 64, 48, bits, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    encoded = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (folder / "annotations" / "training" / "000.png").unlink()
    (folder / "annotations" / "training" / "000.PNG").write_bytes(encoded)
    assert np.array_equal(opened(folder).load(0)[1], values)


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_image_is_turned_as_its_mask_is(folder, orientation):
    before, classes = opened(folder).load(0)
    path = folder / "images" / "training" / "000.png"
    stored = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    before.transpose(stored).save(path, exif=exif)
    image, again = opened(folder).load(0)
    assert np.array_equal(image, before) and np.array_equal(again, classes)


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_image_and_its_mask_that_exif_turns_stay_together(folder, dtype, orientation):
    """A camera's orientation copied to the mask, as annotation programs do; grey pictures of 16 bits too."""
    stored = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = opened(folder).load(0)[1]
    levels = (expected + 1).astype(dtype) * (50 if dtype == np.uint8 else 50 * 257)
    for name, values in (("images", levels), ("annotations", expected.clip(0).astype(dtype))):
        picture = Image.fromarray(values).transpose(stored)
        picture.save(folder / name / "training" / "000.png", exif=exif)
    image, classes = opened(folder).load(0)
    assert np.array_equal(classes, expected.clip(0))
    assert np.array_equal(np.asarray(image), np.stack([(expected + 1) * 50] * 3, -1))


def test_the_fingerprint_covers_names_sizes_and_meanings(folder):
    before = fingerprint(opened(folder))
    assert fingerprint(opened(folder)) == before != fingerprint(opened(folder, split="val"))
    assert fingerprint(opened(folder, "DATA.IGNORE_LABEL", "254")) != before
    mask = folder / "annotations" / "training" / "003.png"
    content = mask.read_bytes()
    mask.write_bytes(content + b"\0")
    assert fingerprint(opened(folder)) != before
    mask.write_bytes(content)
    moved = shutil.move(folder, folder.with_name("elsewhere"))
    assert fingerprint(opened(moved)) == before


def _save_mask(path, values):
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


FIRST = "annotations/training/000.png"
MALFORMED = {
    "no data set": (lambda root: shutil.rmtree(root / "images"), "has none of images/training/ .ADE20K., leftImg8bit"),
    "no mask": (lambda root: (root / FIRST).unlink(), r"images/training/000.png: has no mask .*training/000.png"),
    "no masks": (lambda root: shutil.rmtree(root / "annotations"), "annotations/training: No such file or directory"),
    "no images": (lambda root: [p.unlink() for p in (root / "images/training").iterdir()], "training: holds no images"),
    "two images": (
        lambda root: shutil.copy(root / "images/training/000.png", root / "images/training/000.jpg"),
        "000.png: has the same mask as 000.jpg; give it another name",
    ),
    "no classes": (lambda root: (root / "classes.txt").unlink(), "classes.txt: no such file; it names the classes"),
    "empty classes": (lambda root: (root / "classes.txt").write_text("\n"), "names no class; it needs one a line"),
    "gap in classes": (lambda root: (root / "classes.txt").write_text("a\n\nb\n"), "classes.txt:2: is empty"),
    "class twice": (lambda root: (root / "classes.txt").write_text("a\nb\na\n"), "names 'a' twice"),
    "binary classes": (lambda root: (root / "classes.txt").write_bytes(b"\xff\xfe\x00"), "classes.txt: cannot be read"),
    "other size": (
        lambda root: _save_mask(root / FIRST, np.zeros((7, 9))),
        "000.png: is 9 x 7 pixels, its image 000.png 64 x 48; they must be of one size",
    ),
    "unknown value": (
        lambda root: _save_mask(root / FIRST, np.full((48, 64), 3)),
        r"000.png: the value 3 is no class; the 3 classes have 0 to 2, 255 is ignored; where 0 is no class, set "
        "DATA.REDUCE_ZERO_LABEL True",
    ),
    "colours": (
        lambda root: Image.new("RGB", (64, 48)).save(root / FIRST),
        r"000.png: holds colours \(RGB\); a mask has one channel",
    ),
    "damaged mask": (lambda root: (root / FIRST).write_bytes(b"\x89PNG..."), "000.png: cannot be read as a PNG mask"),
    "damaged image": (
        lambda root: (root / "images/training/000.png").write_bytes(b"no image"),
        "images/training/000.png: cannot be read as an image",
    ),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_data_set_is_one_line(folder, kind):
    change, expected = MALFORMED[kind]
    change(folder)

    def begin():
        check_first_masks(opened(folder))

    message = message_of(begin)
    assert re.search(expected, message), message


def test_keys_that_do_not_go_together(folder, tmp_path):
    assert "DATA.DATA_PATH is empty" in message_of(opened, "")
    assert "no such folder" in message_of(opened, tmp_path / "nowhere")
    some = message_of(opened, folder, "DATA.TRAIN_IMAGES", "images/training")
    assert "DATA.TRAIN_MASKS is empty; where one of" in some
    assert message_of(opened, folder, "DATA.IGNORE_LABEL", "1") == "DATA.IGNORE_LABEL = 1: is also class 1"
    assert "must be False" not in message_of(small_config, "DATA.ZIP_MODE", "True")


def test_layout_without_validation_is_named(folder):
    shutil.rmtree(folder / ADE20K["val"][0])
    assert "images/validation: No such file or directory" in message_of(opened, folder, split="val")
