"""Data: where images come from, how they are decoded and augmented, and which process sees which image when."""

import io
import os
import pickle
import random
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import InterpolationMode

import data
from configs import SPLIT_NAMES, UserError
from data import digits, randomness
from data.datasets import AugmentedDataset, ImageDataset, decode_image
from data.samplers import SampleKey, TrainingOrder
from data.sources import FolderSource, SampleList, ZipSource, check_same_classes, fingerprint
from data.transforms import build_mixup, eval_transform, train_transform


def png(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_zip(root: Path, split: str, members: dict[str, bytes], lines: list[str], **options) -> None:
    root.mkdir(exist_ok=True)
    with zipfile.ZipFile(root / f"{split}.zip", "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    (root / f"{split}_map.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def zip_image_folder(folder: Path, zipped: Path) -> None:
    """Zip an image folder as the released tools do: train.zip and train_map.txt, val.zip and val_map.txt."""
    for split in ("train", "val"):
        source = FolderSource(folder / split)
        names = [os.path.relpath(path, folder / split) for path, _ in source.samples]
        members = {name: source.read(index) for index, name in enumerate(names)}
        lines = [f"{name}\t{label}" for name, (_, label) in zip(names, source.samples)]
        write_zip(zipped, split, members, lines)


def pixels(source) -> list[bytes]:
    return [decode_image(source.read(index)).tobytes() for index in range(len(source.samples))]


def message_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- folders
def test_folder_is_listed_as_torchvision_lists_it(image_folder):
    for name in ("Zebra", "10", "9", "a b", "é"):
        shutil.copytree(image_folder / "train" / "ant", image_folder / "train" / name)
    nested = image_folder / "train" / "bee" / "more" / "still more"
    shutil.copytree(image_folder / "train" / "cat", nested)
    (image_folder / "train" / "bee" / "notes.txt").write_text("no image")
    ours, theirs = FolderSource(image_folder / "train"), ImageFolder(str(image_folder / "train"))
    assert ours.classes == theirs.classes == sorted(ours.classes)
    assert ours.samples == theirs.samples
    assert sum(str(nested) in path for path, _ in ours.samples) == 6


def test_hidden_folder_is_no_class(image_folder):
    before = FolderSource(image_folder / "train")
    (image_folder / "train" / ".ipynb_checkpoints").mkdir()
    shutil.copytree(image_folder / "train" / "ant", image_folder / "train" / ".aaa")
    after = FolderSource(image_folder / "train")
    assert (after.classes, after.samples) == (before.classes, before.samples)


def test_files_beside_the_classes_are_no_classes(image_folder):
    (image_folder / "train" / "README").write_text("x")
    assert FolderSource(image_folder / "train").classes == ["ant", "bee", "cat"]


def test_empty_class_is_named(image_folder):
    (image_folder / "train" / "dog").mkdir()
    (image_folder / "train" / "dog" / "x.gif").write_bytes(b"")
    message = message_of(FolderSource, image_folder / "train")
    assert "class dog" in message and ".jpeg" in message and str(image_folder / "train") in message


def test_folder_without_classes(tmp_path):
    assert str(tmp_path) in message_of(FolderSource, tmp_path)
    assert str(tmp_path / "no") in message_of(FolderSource, tmp_path / "no")


def open_train(make_config, root, *arguments, rank=0, world_size=1):
    return data.open_split(make_config("--data-path", str(root), *arguments), "train", rank, world_size)


def test_missing_data_path(make_config, tmp_path):
    assert "--data-path" in message_of(open_train, make_config, "")
    message = message_of(open_train, make_config, tmp_path / "nowhere")
    assert "--data-path" in message and str(tmp_path / "nowhere") in message


@pytest.mark.parametrize(
    ("present", "hint"),
    [
        (["train.zip"], "add --zip"),
        (["ILSVRC/Data/CLS-LOC/train/"], "ILSVRC/Data/CLS-LOC"),
        (["training/", "validation/"], "found training, validation"),
        ([], "has no folder train/"),
    ],
)
def test_missing_split_comes_with_a_hint(make_config, tmp_path, present, hint):
    for name in present:
        if name.endswith("/"):
            (tmp_path / name).mkdir(parents=True)
        else:
            (tmp_path / name).touch()
    message = message_of(open_train, make_config, tmp_path)
    assert "train/" in message and hint in message


def test_imagenet_21k_has_folders_of_its_own(make_config, image_folder):
    opts = ["--opts", "DATA.DATASET", "imagenet_21k"]
    assert "imagenet21k_train" in message_of(open_train, make_config, image_folder, *opts)
    for split in ("train", "val"):
        (image_folder / split).rename(image_folder / f"imagenet21k_{split}")
    config = make_config("--data-path", str(image_folder), *opts)
    train, val = (data.open_split(config, split, 0, 1) for split in ("train", "val"))
    assert (len(train.samples), len(val.samples)) == (18, 6)
    data.check_val_classes(config, None, val)
    shutil.rmtree(image_folder / "imagenet21k_train" / "cat")
    assert "cat" in message_of(data.check_val_classes, config, None, val)


def test_every_data_set_with_names_for_its_splits_can_be_configured(make_config):
    for name in SPLIT_NAMES:
        make_config("--opts", "DATA.DATASET", name)  # UserError where it is not allowed


def test_imagenet_21k_zipped(make_config, image_folder, tmp_path):
    zip_image_folder(image_folder, tmp_path / "zipped")
    for path in list((tmp_path / "zipped").iterdir()):
        path.rename(path.with_name(f"imagenet21k_{path.name}"))
    opts = ["--zip", "--opts", "DATA.DATASET", "imagenet_21k"]
    assert len(open_train(make_config, tmp_path / "zipped", *opts).samples) == 18


def test_classes_that_differ_are_named(make_config, image_folder):
    config = make_config("--data-path", str(image_folder))
    train, val = (data.open_split(config, split, 0, 1) for split in ("train", "val"))
    data.check_val_classes(config, train, val)
    data.check_val_classes(config, None, val)
    (image_folder / "val" / "cat").rename(image_folder / "val" / "cow")
    val = data.open_split(config, "val", 0, 1)
    for known_train in (train, None):
        message = message_of(data.check_val_classes, config, known_train, val)
        assert "only in train: cat" in message and "only in val: cow" in message
    shutil.rmtree(image_folder / "train")
    data.check_val_classes(config, None, val)  # a machine that only evaluates has no training images


def test_many_differing_classes_are_cut_short():
    message = message_of(check_same_classes, [f"n{i:04d}" for i in range(1000)], [], "D")
    assert "n0004 and 995 more" in message and len(message) < 200


# ----------------------------------------------------------------------------------------------------------- zip files
@pytest.mark.parametrize("mode", ["no", "full", "part"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_zip_gives_the_pixels_of_the_folder(image_folder, tmp_path, mode, compression):
    folder = FolderSource(image_folder / "train")
    names = [os.path.relpath(path, image_folder / "train") for path, _ in folder.samples]
    members = {name: folder.read(index) for index, name in enumerate(names)}
    lines = [f"{name}\t{label}" for name, (_, label) in zip(names, folder.samples)]
    write_zip(tmp_path / "z", "train", members, lines, compression=compression)
    for rank in range(2):
        zipped = ZipSource(tmp_path / "z", "train", mode, rank, world_size=2)
        assert [label for _, label in zipped.samples] == [label for _, label in folder.samples]
        assert pixels(zipped) == pixels(folder), "the images of other ranks too: they are read from the file"
        assert len(zipped.classes) == len(folder.classes)


@pytest.mark.parametrize(("mode", "kept"), [("no", [0, 0, 0]), ("full", [18, 18, 18]), ("part", [6, 6, 6])])
def test_cache_holds_what_its_mode_says(image_folder, tmp_path, mode, kept, monkeypatch):
    zip_image_folder(image_folder, tmp_path / "z")
    for rank in range(3):
        source = ZipSource(tmp_path / "z", "train", mode, rank, world_size=3)
        from_file = []
        read = source._read_from_archive
        monkeypatch.setattr(source, "_read_from_archive", lambda i, read=read, log=from_file: log.append(i) or read(i))
        pixels(source)
        cached = set(range(18)) - set(from_file)
        assert len(cached) == kept[rank]
        if mode == "part":
            assert cached == set(range(rank, 18, 3))
        members = zipfile.ZipFile(tmp_path / "z" / "train.zip").infolist()
        assert source._cache.nbytes == sum(members[index].file_size for index in cached)


def test_cached_images_need_no_file(image_folder, tmp_path):
    zip_image_folder(image_folder, tmp_path / "z")
    source = ZipSource(tmp_path / "z", "train", "full")
    expected = pixels(source)
    (tmp_path / "z" / "train.zip").unlink()
    assert pixels(source) == expected
    assert pixels(pickle.loads(pickle.dumps(source))) == expected, "for loader workers that do not fork"


@pytest.mark.parametrize("mode", ["no", "part"])
def test_zip_across_forked_workers(image_folder, tmp_path, mode):
    """Two workers that shared the parent's file handle would read each other's bytes."""
    zip_image_folder(image_folder, tmp_path / "z")
    source = ZipSource(tmp_path / "z", "train", mode, rank=0, world_size=4)
    source.read(1)  # the parent has the file open before it forks
    dataset = ImageDataset(source, lambda image: torch.from_numpy(np.array(image)))
    expected = torch.stack([dataset[i][0] for i in range(18)])
    loader = DataLoader(dataset, batch_size=3, num_workers=2, persistent_workers=True)
    for _ in range(2):
        assert torch.equal(torch.cat([images for images, _ in loader]), expected)


def test_a_zip_file_after_other_bytes_is_read(image_folder, tmp_path):
    """Positions in it then count from where it begins."""
    zip_image_folder(image_folder, tmp_path / "z")
    expected = pixels(ZipSource(tmp_path / "z", "train"))
    path = tmp_path / "z" / "train.zip"
    path.write_bytes(b"a program that unpacks what follows" + path.read_bytes())
    assert pixels(ZipSource(tmp_path / "z", "train")) == expected


def test_samples_are_a_list(tmp_path):
    plain = [("a/é.png", 0), ("b", 3), (os.fsdecode(b"not utf-8 \xff"), 1)]
    samples = SampleList(iter(plain))
    assert samples == plain and plain == list(samples) and samples != plain[:2] and len(samples) == 3
    assert samples[-1] == plain[-1] and samples[1:] == plain[1:] and samples[::2] == plain[::2]
    assert samples[np.int64(1)] == plain[1] and all(type(label) is int for _, label in samples)
    for index in (3, -4):
        with pytest.raises(IndexError):
            samples[index]
    assert list(SampleList([])) == [] and pickle.loads(pickle.dumps(samples)) == plain


def private_mib():
    """Memory that this process shares with no other."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"Private_(?:Dirty|Clean): +(\d+) kB", text))) / 1024


def test_reading_samples_copies_nothing_into_a_worker():
    """A worker is a fork: what it writes to, and be it a count of references, it gets a copy of."""
    samples = SampleList((f"n{i:08d}/n{i:08d}_{i}.JPEG", i % 1000) for i in range(200_000))
    pid = os.fork()
    if pid == 0:
        before = private_mib()
        for _ in samples:
            pass
        os._exit(private_mib() - before > 4)
    assert os.waitpid(pid, 0)[1] == 0, "it grows by more than 4 MiB: a plain list lets it grow by 30"


def test_a_worker_does_not_list_a_zip_file_again(image_folder, tmp_path, monkeypatch):
    """The list takes half a gigabyte for ImageNet, and every worker would have its own."""
    zip_image_folder(image_folder, tmp_path / "z")
    source = ZipSource(tmp_path / "z", "train")
    monkeypatch.setattr(zipfile, "ZipFile", None)
    assert len(pixels(pickle.loads(pickle.dumps(source)))) == 18


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a.png\t0", "b.png 1"], ":2: 'b.png 1'"),
        (["a.png\t0", "b.png\tone"], ":2:"),
        (["a.png\t0", "b.png\t-1"], ":2:"),
        (["a.png\t0", "b.png\t²"], ":2:"),
        (["a.png\t0", "b.png\t"], ":2:"),
        (["a.png\t0", "", "missing.png\t1"], ":3: missing.png is not in"),
        (["a.png\t0", "b.png\t2"], "class index 1"),
        (["a.png\t0", "b.png\t999999999999"], "class index 1"),  # must not count to there
        (["a.png\t1"], "class index 0"),
        ([], "names no images"),
        (["", "  "], "names no images"),
    ],
)
def test_malformed_map_names_file_and_line(tmp_path, lines, expected):
    write_zip(tmp_path, "train", {"a.png": png(1), "b.png": png(2)}, lines)
    message = message_of(ZipSource, tmp_path, "train")
    assert f"{tmp_path / 'train_map.txt'}" in message and expected in message


def test_map_of_another_encoding_is_named(tmp_path):
    write_zip(tmp_path, "train", {"a.png": png(1)}, [])
    (tmp_path / "train_map.txt").write_bytes("é.png\t0\n".encode("latin-1"))
    assert "train_map.txt" in message_of(ZipSource, tmp_path, "train")


@pytest.mark.parametrize(
    "text", ["a b/é.png\t0\r\nb.png\t1\r\n", "\ufeffa b/é.png\t0\nb.png\t1", "./a b/é.png\t0\n/b.png\t1\n\n"]
)
def test_map_written_elsewhere_is_read(tmp_path, text):
    """Windows line ends, a byte order mark, no last line end, leading ./ and /, as tools write them."""
    write_zip(tmp_path, "train", {"a b/é.png": png(1), "b.png": png(2)}, [])
    (tmp_path / "train_map.txt").write_bytes(text.encode())
    assert ZipSource(tmp_path, "train").samples == [("a b/é.png", 0), ("b.png", 1)]


def test_missing_zip_or_map(tmp_path):
    for name in ("train.zip", "train_map.txt"):
        write_zip(tmp_path, "train", {"a.png": png(1)}, ["a.png\t0"])
        (tmp_path / name).unlink()
        assert str(tmp_path / name) in message_of(ZipSource, tmp_path, "train")


def test_names_that_lead_out_of_the_zip_are_harmless(tmp_path):
    """Members are read into memory by their names; nothing is ever unpacked, and no name reaches the file system."""
    (tmp_path / "secret.png").write_bytes(png(9))
    root = tmp_path / "data"
    write_zip(root, "train", {"../evil.png": png(1), "x/../../evil2.png": png(2)}, [])
    before = sorted(tmp_path.rglob("*"))
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        (root / "train_map.txt").write_text(f"{name}\t0\n")
        assert "is not in" in message_of(ZipSource, root, "train")
    (root / "train_map.txt").write_text("../evil.png\t0\nx/../../evil2.png\t1\n")
    source = ZipSource(root, "train", "full")
    assert pixels(source) == [Image.open(io.BytesIO(png(value))).tobytes() for value in (1, 2)]
    assert sorted(tmp_path.rglob("*")) == before


def test_not_a_zip_file(tmp_path):
    write_zip(tmp_path, "train", {"a.png": png(1)}, ["a.png\t0"])
    whole = (tmp_path / "train.zip").read_bytes()
    for content in (b"", b"text", whole[:-30]):
        (tmp_path / "train.zip").write_bytes(content)
        assert str(tmp_path / "train.zip") in message_of(ZipSource, tmp_path, "train")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("mode", ["no", "full", "part"])
def test_damaged_member_is_named_as_a_sample(tmp_path, mode, compression):
    """With every cache mode alike: the damage is told by the sample, and the other images can be read."""
    members = {f"{i}.png": png(i) for i in range(3)}
    write_zip(tmp_path, "train", members, [f"{name}\t0" for name in members], compression=compression)
    content = bytearray((tmp_path / "train.zip").read_bytes())
    position = content.index(b"1.png") + len(b"1.png") + 20
    content[position : position + 8] = bytes(8 * [0xFF])
    (tmp_path / "train.zip").write_bytes(content)
    dataset = ImageDataset(ZipSource(tmp_path, "train", mode), np.array)
    assert "1.png" in message_of(dataset.__getitem__, 1)
    for index in (0, 2):
        assert dataset[index][0].tobytes() == decode_image(members[f"{index}.png"]).tobytes()


def test_fingerprint_tells_data_sets_apart(image_folder, tmp_path):
    before = fingerprint(FolderSource(image_folder / "train"))
    assert fingerprint(FolderSource(image_folder / "train")) == before
    moved = tmp_path / "elsewhere"
    shutil.copytree(image_folder, moved)
    assert fingerprint(FolderSource(moved / "train")) == before
    (moved / "train" / "ant" / "0.png").rename(moved / "train" / "bee" / "new.png")
    assert fingerprint(FolderSource(moved / "train")) != before


# ------------------------------------------------------------------------------------------------------------ decoding
def made_images() -> dict[str, tuple[Image.Image, str, dict]]:
    rng = np.random.default_rng(3)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 31, 3), dtype=np.uint8))
    rgba = Image.fromarray(rng.integers(0, 256, (20, 31, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated; the reference does not turn it
    return {
        "rgb.png": (rgb, "PNG", {}),
        "rgb.jpeg": (rgb, "JPEG", {}),
        "grey.png": (rgb.convert("L"), "PNG", {}),
        "grey.jpeg": (rgb.convert("L"), "JPEG", {}),
        "bilevel.png": (rgb.convert("1"), "PNG", {}),
        "grey_alpha.png": (rgba.convert("LA"), "PNG", {}),
        "cmyk.jpeg": (rgb.convert("CMYK"), "JPEG", {}),
        "rgba.png": (rgba, "PNG", {}),
        "palette.png": (rgb.convert("P"), "PNG", {}),
        "palette_transparent.png": (rgb.convert("P"), "PNG", {"transparency": 3}),
        "rotated.jpeg": (rgb, "JPEG", {"exif": exif}),
        "one_pixel.png": (rgb.crop((0, 0, 1, 1)), "PNG", {}),
        "lossy.webp": (rgb, "WEBP", {}),
        "lossless.webp": (rgba, "WEBP", {"lossless": True}),
        "rgb.bmp": (rgb, "BMP", {}),
        "rgb.tiff": (rgb, "TIFF", {}),
        "rgb.ppm": (rgb, "PPM", {}),
    }


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


UNREADABLE = {
    "truncated.png": png(5, (64, 64))[:90],
    "empty.png": b"",
    "text.png": b"this is no image",
    "header_only.png": png(5)[:16],
    "zeros.png": bytes(1000),
}


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


# ---------------------------------------------------------------------------------------------------------- transforms
def released(make_config, *opts):
    config = make_config("--cfg", str(Path(__file__).resolve().parents[1] / "configs" / "groupmixformer_small.yaml"))
    config = config.clone()
    config.merge_from_list(list(opts))
    return config


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


# --------------------------------------------------------------------------------------------------- order of training
def indices(order: TrainingOrder) -> list[int]:
    return [key.index for key in order]


def per_update(orders: list[TrainingOrder], global_batch: int) -> list[list[int]]:
    """The images of each update, over all ranks, sorted."""
    share = global_batch // len(orders)
    lists = [indices(order) for order in orders]
    updates = len(lists[0]) // share
    return [sorted(index for mine in lists for index in mine[u * share : (u + 1) * share]) for u in range(updates)]


def orders_of(world_size: int, num_samples: int = 50, global_batch: int = 8, **options) -> list[TrainingOrder]:
    return [TrainingOrder(num_samples, global_batch, rank, world_size, seed=3, **options) for rank in range(world_size)]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_samples", [8, 15, 48, 50])
def test_no_image_is_seen_twice_in_an_epoch(world_size, num_samples, sharded):
    orders = orders_of(world_size, num_samples, sharded=sharded)
    seen = [index for order in orders for index in indices(order)]
    assert len(seen) == len(set(seen)) == num_samples // 8 * 8
    assert set(seen) <= set(range(num_samples))
    assert all(len(order) == len(indices(order)) == len(seen) // world_size for order in orders)
    assert all(order.updates_per_epoch == num_samples // 8 for order in orders)


def test_updates_do_not_depend_on_the_number_of_processes():
    for epoch in range(3):
        updates = []
        for world_size in (1, 2, 4, 8):
            orders = orders_of(world_size)
            for order in orders:
                order.set_position(epoch)
            updates.append(per_update(orders, 8))
        assert updates[0] == updates[1] == updates[2] == updates[3]
        assert len(updates[0]) == 6


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_continuing_at_any_update_is_exact(world_size, sharded):
    for rank in range(world_size):
        whole = orders_of(world_size, sharded=sharded)[rank]
        whole.set_position(epoch=4)
        keys = list(whole)
        for update in range(whole.updates_per_epoch + 1):
            rest = orders_of(world_size, sharded=sharded)[rank]
            rest.set_position(epoch=4, update=update)
            assert list(rest) == keys[update * 8 // world_size :]
            assert len(rest) == len(list(rest))


def test_epochs_seeds_and_ranks_differ():
    order = TrainingOrder(200, 8, 0, 1, seed=0)
    epochs = []
    for epoch in range(4):
        order.set_position(epoch)
        assert [key.epoch for key in order] == [epoch] * 200
        epochs.append(indices(order))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(200)), "shuffled"
    assert indices(TrainingOrder(200, 8, 0, 1, seed=1)) != epochs[0]
    order.set_position(0)
    assert indices(order) == epochs[0], "and the same again"


@pytest.mark.parametrize("world_size", [2, 3])
def test_sharded_order_stays_in_its_share(world_size):
    for rank, order in enumerate(orders_of(world_size, num_samples=50, global_batch=12, sharded=True)):
        assert all(index % world_size == rank for index in indices(order))


def test_what_is_left_behind_differs_between_epochs():
    """Images after the last whole update must not be the same ones in every epoch."""
    order = TrainingOrder(15, 8, 0, 1, seed=0)
    left = set()
    for epoch in range(10):
        order.set_position(epoch)
        left |= {frozenset(set(range(15)) - set(indices(order)))}
    assert len(left) > 5


def test_order_ignores_and_leaves_the_global_random_state():
    order = TrainingOrder(50, 8, 0, 1, seed=0)
    expected = indices(order)
    data.seed_everything(99)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert indices(order) == expected
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_indices_of_an_update():
    for order in orders_of(2):
        order.set_position(epoch=2)
        keys = indices(order)
        assert [order.indices_of(update) for update in range(6)] == [keys[u * 4 : (u + 1) * 4] for u in range(6)]


def test_too_small_a_training_set_names_the_numbers(make_config, image_folder):
    config = make_config("--data-path", str(image_folder), "--batch-size", "16", "--accumulation-steps", "2")
    message = message_of(data.TrainingData, config, data.open_split(config, "train", 0, 1), 0, 1, False, print)
    assert "18 images" in message and "32" in message and "--batch-size" in message


# -------------------------------------------------------------------------------------------------- augmented batches
def train_data(make_config, root: Path, workers: int, *arguments: str, notify=print, rank=0, world_size=1):
    small = released(make_config).clone()
    opts = ["DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", str(workers), "TRAIN.ACCUMULATION_STEPS", "1"]
    config = make_config("--data-path", str(root), "--batch-size", "4", *arguments).clone()
    config.defrost()
    config.AUG = small.AUG  # the full recipe: every source of randomness
    config.merge_from_list(opts)
    config.freeze()
    return data.TrainingData(
        config, data.open_split(config, "train", rank, world_size), rank, world_size, False, notify
    )


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


def test_same_bits_for_any_number_of_workers(make_config, image_folder, two_cores):
    reference = list(train_data(make_config, image_folder, 0).batches(epoch=1, update=0))
    assert len(reference) == 4
    assert not torch.equal(reference[0][0], reference[1][0])
    for workers in (1, 2):
        data.seed_everything(1000 + workers)
        batches = train_data(make_config, image_folder, workers).batches(epoch=1, update=0)
        for (images, labels), (expected_images, expected_labels) in zip(batches, reference, strict=True):
            assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


def test_continuing_gives_the_same_batches(make_config, image_folder, two_cores):
    training = train_data(make_config, image_folder, 2)
    reference = list(training.batches(epoch=0, update=0))
    for update in (3, 1, 4, 0):  # one loader, whose workers live on
        batches = list(training.batches(epoch=0, update=update))
        assert len(batches) == 4 - update
        assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, reference[update:]))


def test_sample_depends_on_seed_epoch_and_index_alone(make_config, image_folder):
    images = ImageDataset(FolderSource(image_folder / "train"), train_transform(released(make_config)))
    dataset = AugmentedDataset(images, seed=5)
    keys = [SampleKey(epoch, index) for epoch in (0, 1) for index in (0, 7, 3)]
    expected = {key: dataset[key] for key in keys}
    for key in reversed(keys):
        data.seed_everything(int(torch.randint(1000, ())))
        image, label, index = dataset[key]
        assert torch.equal(image, expected[key][0]) and (label, index) == (key.index // 6, key.index)
    assert not torch.equal(expected[keys[0]][0], expected[keys[3]][0]), "another epoch"
    assert not torch.equal(AugmentedDataset(images, seed=6)[keys[0]][0], expected[keys[0]][0]), "another seed"


def test_world_sizes_see_the_same_images_augmented_alike(make_config, image_folder):
    """One process with batch 8 and two with batch 4 make the same updates."""
    one = train_data(make_config, image_folder, 0, "--batch-size", "8")
    two = [train_data(make_config, image_folder, 0, rank=rank, world_size=2) for rank in range(2)]
    halves = [list(training.batches(0, 0)) for training in two]
    for update, (images, labels) in enumerate(one.batches(0, 0)):
        ranks = [half[update] for half in halves]
        assert torch.equal(torch.stack([r[0] for r in ranks], 1).flatten(0, 1), images)
        assert torch.equal(torch.stack([r[1] for r in ranks], 1).flatten(), labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_training_image_is_named_and_replaced(make_config, image_folder, two_cores, workers):
    path = image_folder / "train" / "ant" / "5.png"
    path.write_bytes(path.read_bytes()[:100])
    notices: list[str] = []
    training = train_data(make_config, image_folder, workers, notify=notices.append)
    for epoch in range(3):  # 16 of 18 images are seen in an epoch, so one epoch may miss it
        for images, labels in training.batches(epoch, 0):
            assert images.isfinite().all() and len(labels) == 4
    assert len(notices) == 1, "once a run"
    assert str(path) in notices[0] and str(image_folder / "train" / "bee" / "0.png") in notices[0]


def test_substitute_keeps_its_own_label(image_folder, make_config):
    for name in ("4.png", "5.png"):
        (image_folder / "train" / "ant" / name).write_bytes(b"")
    dataset = AugmentedDataset(
        ImageDataset(FolderSource(image_folder / "train"), train_transform(released(make_config))), seed=0
    )
    image, label, index = dataset[SampleKey(0, 4)]
    assert (label, index) == (1, 6), "the first bee"
    assert torch.equal(image, dataset[SampleKey(0, 6)][0])


def test_too_many_unreadable_images_end_the_run(make_config, image_folder):
    for path in (image_folder / "train" / "bee").iterdir():
        path.write_bytes(b"")
    training = train_data(make_config, image_folder, 0, "--opts", "DATA.MAX_UNREADABLE", "2", notify=lambda line: None)
    message = message_of(lambda: [list(training.batches(epoch, 0)) for epoch in range(3)])
    assert "DATA.MAX_UNREADABLE = 2" in message and "/bee/" in message
    training = train_data(make_config, image_folder, 0, "--opts", "DATA.MAX_UNREADABLE", "6", notify=lambda line: None)
    assert all(len(list(training.batches(epoch, 0))) == 4 for epoch in range(3))


# ----------------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_covers_every_image_exactly_once(make_config, tmp_path, world_size):
    config = make_config("--batch-size", "4", "--opts", "DATA.NUM_WORKERS", "0")
    folder = tmp_path / "val" / "c"
    folder.mkdir(parents=True)
    for count in range(1, 18):
        (folder / f"{count:02d}.png").write_bytes(png(count))
        source = FolderSource(tmp_path / "val")
        reference = eval_transform(config)
        seen = []
        for rank in range(world_size):
            loader = data.build_eval_loader(config, source, rank, world_size, pin_memory=False)
            batches = [images for images, _ in loader]
            assert len(batches) == len(loader)
            seen += [image for images in batches for image in images]
        assert len(seen) == count
        # The red channel of image n is n: which ones were seen can be read from the pixels.
        red = sorted(round(float(data.denormalize(image[None])[0, 0, 0, 0]) * 255) for image in seen)
        assert red == list(range(1, count + 1))
    assert torch.equal(seen[0], reference(decode_image(source.read(0))))


def test_unreadable_validation_image_is_never_replaced(make_config, image_folder):
    path = image_folder / "val" / "bee" / "1.png"
    path.write_bytes(b"")
    config = make_config("--opts", "DATA.NUM_WORKERS", "0")
    loader = data.build_eval_loader(config, FolderSource(image_folder / "val"), 0, 1, pin_memory=False)
    assert message_of(list, loader).startswith(str(path))


def test_usable_workers(make_config, monkeypatch):
    def workers(asked: int, cores: int, processes: str | None) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        return data.usable_workers(make_config("--opts", "DATA.NUM_WORKERS", str(asked)))

    assert workers(32, 64, None) == 32
    assert workers(32, 64, "8") == 8
    assert workers(32, 2, None) == 2
    assert workers(32, 2, "8") == 1
    assert workers(0, 64, "1") == 0
    assert workers(3, 64, "8") == 3


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


# -------------------------------------------------------------------------------------------------------------- digits
@pytest.fixture(scope="session")
def written_digits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits") / "set"
    assert digits.write_digits(root)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_digits_data_set(written_digits):
    train, val = FolderSource(written_digits / "train"), FolderSource(written_digits / "val")
    assert train.classes == val.classes == [str(digit) for digit in range(10)]
    assert (len(train.samples), len(val.samples)) == (1442, 355)
    assert not {Path(p).name for p, _ in train.samples} & {Path(p).name for p, _ in val.samples}
    assert min(sum(label == digit for _, label in val.samples) for digit in range(10)) >= 34
    sizes = {(image.size, image.mode) for image in (Image.open(path) for path, _ in train.samples[::100])}
    assert sizes == {((32, 32), "L")}


def test_digits_are_the_right_pictures(written_digits):
    """Shrunk again, a picture is the original that its number and folder name."""
    from sklearn.datasets import load_digits

    original = load_digits()
    for path, label in FolderSource(written_digits / "val").samples[::20]:
        number = int(Path(path).stem)
        assert original.target[number] == label
        small = np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BOX), float).ravel()
        assert np.corrcoef(small, original.data[number])[0, 1] > 0.97


def test_digits_are_written_once_and_always_alike(written_digits, tmp_path):
    again = tmp_path / "deep" / "down" / "set"
    assert digits.write_digits(again)
    assert contents(again) == contents(written_digits)
    (again / "train" / "0" / "mine.png").write_bytes(b"kept")
    assert not digits.write_digits(again), "what is there is left alone"
    assert (again / "train" / "0" / "mine.png").exists()
    assert [path.name for path in again.parent.iterdir()] == ["set"]


def test_digits_written_by_two_processes_at_once(written_digits, tmp_path, monkeypatch):
    """The slower one finds the data set complete, and takes its own away."""
    rmtree = shutil.rmtree

    def the_other_is_faster(path, **options):  # the first thing that a writer does
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        shutil.copytree(written_digits, tmp_path / "set")

    monkeypatch.setattr(shutil, "rmtree", the_other_is_faster)
    assert not digits.write_digits(tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert contents(tmp_path / "set") == contents(written_digits)


def test_digits_that_cannot_be_written_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert digits.main(["--output", str(tmp_path / "file" / "set")]) == 2
    assert digits.main(["--output", str(tmp_path / "file")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing half-written stays"
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert digits.main(["--output", str(tmp_path / "set")]) == 2
    folder, file, missing = capsys.readouterr().err.splitlines()
    assert folder == f"data.digits: error: --output {tmp_path}/file/set: cannot be written: Not a directory"
    assert "file: cannot be written" in file and "pip install scikit-learn" in missing


def test_interrupted_digits_never_look_complete(tmp_path, monkeypatch):
    save, calls = Image.Image.save, []

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 300:
            raise KeyboardInterrupt
        return save(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            digits.write_digits(tmp_path / "set")
    assert not (tmp_path / "set").exists()
    assert digits.write_digits(tmp_path / "set")
    assert len(contents(tmp_path / "set")) == 1797


def test_formats_that_start_other_programs_are_refused():
    with pytest.raises(UnidentifiedImageError):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


def test_a_member_of_a_zip_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.MAX_MEMBER_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/bomb.png", bytes(1001))
    (tmp_path / "train_map.txt").write_text("a/bomb.png\t0\n")
    with pytest.raises(UserError, match=r"train_map.txt:1: a/bomb.png: 1,001 bytes are too many for an image"):
        ZipSource(tmp_path, "train")


def test_a_class_folder_that_links_to_itself_is_no_class(image_folder):
    (image_folder / "train" / "loop").symlink_to("loop")
    assert FolderSource(image_folder / "train").classes == ["ant", "bee", "cat"]


def test_seeding_is_torchs_own():
    """The short way round torch.manual_seed gives the same numbers, for the whole range of seeds."""
    for key in range(20):
        randomness.seed_everything(7, key)
        quick = torch.rand(5)
        torch.manual_seed(randomness.derive_seed(7, key))
        assert torch.equal(quick, torch.rand(5))
