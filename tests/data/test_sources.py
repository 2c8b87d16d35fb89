"""Where images come from: folders and zip files."""

import io
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import message_of, pixels, png, write_zip, zip_image_folder
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from configs import UserError
from data import build_eval_loader
from data.datasets import ImageDataset, decode_image
from data.sources import FolderSource, SampleList, ZipSource, fingerprint
from tasks.classification.images import eval_dataset, open_split


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
    (image_folder / "train" / "dog" / "x.svg").write_bytes(b"")
    message = message_of(FolderSource, image_folder / "train")
    assert "class dog" in message and ".jpeg" in message and str(image_folder / "train") in message


def test_folder_without_classes(tmp_path):
    assert str(tmp_path) in message_of(FolderSource, tmp_path)
    assert str(tmp_path / "no") in message_of(FolderSource, tmp_path / "no")


def test_a_class_folder_that_links_to_itself_is_no_class(image_folder):
    (image_folder / "train" / "loop").symlink_to("loop")
    assert FolderSource(image_folder / "train").classes == ["ant", "bee", "cat"]


def test_links_are_followed_and_loops_refused(image_folder, tmp_path):
    before = [Path(path).name for path, _ in FolderSource(image_folder / "train").samples]
    (image_folder / "train" / "ant").rename(tmp_path / "elsewhere")
    (image_folder / "train" / "ant").symlink_to(tmp_path / "elsewhere")
    assert [Path(path).name for path, _ in FolderSource(image_folder / "train").samples] == before
    # Two classes that lead to each other twice: followed blindly, these are more than 2 ** 40 folders.
    for here, there in (("bee", "cat"), ("cat", "bee")):
        for name in ("x", "y"):
            (image_folder / "train" / here / name).symlink_to(f"../{there}")
    message = message_of(FolderSource, image_folder / "train")
    assert "bee/" in message and "a link that leads back to" in message


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


@pytest.mark.parametrize("rank", [0, 1])
def test_validation_caches_the_batches_that_its_process_gets(make_config, image_folder, tmp_path, rank):
    zip_image_folder(image_folder, tmp_path / "z")
    config = make_config(
        "--data-path", str(tmp_path / "z"), "--zip", "--batch-size", "2", "--opts", "TEST.CROP", "False"
    )
    source = open_split(config, "val", rank, 2)
    (tmp_path / "z" / "val.zip").unlink()
    loader, batches = build_eval_loader(config, eval_dataset(config, source), rank, 2, pin_memory=False)
    assert sum(len(labels) for _, labels in loader) == (4, 2)[rank] and len(batches) == 3


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


def test_a_member_of_a_zip_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.MAX_MEMBER_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/bomb.png", bytes(1001))
    (tmp_path / "train_map.txt").write_text("a/bomb.png\t0\n")
    with pytest.raises(UserError, match=r"train_map.txt:1: a/bomb.png: 1,001 bytes are too many for an image"):
        ZipSource(tmp_path, "train")
