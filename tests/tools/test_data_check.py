"""`python -m tools.check`: every kind of defect is found and named, and no file of a data set stops the check."""

import hashlib
import io
import json
import multiprocessing
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sources import FolderSource, ZipSource, fingerprint
from tools import inspection
from tools.check import KINDS, main

REPOSITORY = Path(__file__).parents[2]
CLASSES = ("cat", "dog")
IMAGES_PER_CLASS = {"train": 3, "val": 2}


def pixels(seed: int, channels: int = 3, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, channels), np.uint8)


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photo(seed: int, form: str = "JPEG") -> bytes:
    return encoded(Image.fromarray(pixels(seed)), form)


def sixteen_bit_colour() -> bytes:
    """A PNG of one pixel; Pillow reads such files, as RGB, but does not write them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = zlib.compress(bytes(7))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb(width: int, height: int) -> bytes:
    """A PNG of one bit per pixel that is small and decodes to much."""
    return encoded(Image.new("1", (width, height)), "PNG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set without a defect; all images differ."""
    root = tmp_path / "photos"
    for split, count in IMAGES_PER_CLASS.items():
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                seed = 1000 * (split == "val") + 100 * label + number
                (root / split / name / f"{number}.JPEG").write_bytes(photo(seed))
    return root


@pytest.fixture
def zip_root(root: Path) -> Path:
    for split in IMAGES_PER_CLASS:
        write_zip(root, split)
        shutil.rmtree(root / split)
    return root


def write_zip(root: Path, split: str) -> None:
    source = FolderSource(root / split)
    lines = []
    with zipfile.ZipFile(root / f"{split}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, label in source.samples:
            name = str(Path(path).relative_to(root / split))
            archive.write(path, name)
            lines.append(f"{name}\t{label}\n")
    (root / f"{split}_map.txt").write_text("".join(lines))


class Result:
    """What one run of the check gave."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture, *flags: str) -> None:
        outputs = [root.parent / name for name in ("report.txt", "manifest.txt", "report.json")]
        named = [
            word for flag, path in zip(("--report", "--manifest", "--json"), outputs) for word in (flag, str(path))
        ]
        self.exit_code = main(["--data-path", str(root), "--workers", "2", *named, *flags])
        captured = capsys.readouterr()
        self.console, self.stderr = captured.out, captured.err
        self.report, self.manifest, content = (path.read_text() for path in outputs)
        self.json = json.loads(content)
        self.problems = {(p["kind"], p["path"]): p["reason"] for p in self.json["problems"]}
        assert multiprocessing.active_children() == [], "a worker outlived the check"

    def names(self, kind: str) -> list[str]:
        return [path for found, path in self.problems if found == kind]


# ------------------------------------------------------------------------------------------------------------ no defect


@pytest.mark.parametrize("zipped", [False, True])
def test_clean_data_set(root, request, capsys, zipped):
    if zipped:
        request.getfixturevalue("zip_root")
    result = Result(root, capsys, *["--zip"] * zipped, "--strict")
    assert result.exit_code == 0
    assert result.json["problems"] == []
    assert result.stderr == ""  # no progress bar where there is no terminal
    assert "0 errors, 0 warnings, 0 notes: ready" in result.console
    assert result.json["modes"] == {"RGB": 10}
    sizes = {split: list(content["classes"].values()) for split, content in result.json["splits"].items()}
    assert sizes == {"train": [3, 3], "val": [2, 2]}


def test_progress_bar_on_a_terminal(root, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["--data-path", str(root)]) == 0
    assert "10/10" in sys.stderr.getvalue()


def test_class_sizes(root, capsys):
    for number in range(10, 14):
        (root / "train" / "cat" / f"{number}.JPEG").write_bytes(photo(number))
    (root / "train" / "emu").mkdir()
    (root / "val" / "emu").mkdir()
    (root / "train" / "emu" / "0.JPEG").write_bytes(photo(50))
    (root / "val" / "emu" / "0.JPEG").write_bytes(photo(51))
    result = Result(root, capsys)
    train = result.json["splits"]["train"]
    assert (train["class_size_min"], train["class_size_median"], train["class_size_max"]) == (1, 3, 7)
    assert train["bytes"] == sum(path.stat().st_size for path in (root / "train").rglob("*.JPEG"))
    assert "11 images of 3 classes" in result.console and "1 / 3 / 7" in result.console


# --------------------------------------------------------------------------------------------- each defect, by its name


def write(path: str, content: bytes) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)

    return plant


def link(path: str, target: str) -> Callable[[Path], None]:
    return lambda root: (root / path).symlink_to(target)


def linked_twice(root: Path) -> None:
    write("train/dog/a/0.JPEG", photo(70))(root)
    (root / "train" / "dog" / "z").symlink_to("a")


def flat_val(root: Path) -> None:
    for path in sorted((root / "val").rglob("*.JPEG")):
        path.rename(root / "val" / f"{path.parent.name}{path.name}")
    for name in CLASSES:
        (root / "val" / name).rmdir()


def make_socket(root: Path) -> None:
    here = Path.cwd()
    os.chdir(root / "train" / "cat")  # the path of a socket may have 100 characters
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket.JPEG")
    finally:
        os.chdir(here)


def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(pixels(7)), exif=exif)


JPEG, PNG = photo(90), photo(91, "PNG")
START_OF_SCAN = JPEG.rfind(b"\xff\xda")

# (kind, path that is named, part of the reason, how to make it)
DEFECTS = [
    ("split", "val", "misnamed? rename validation to val", lambda root: (root / "val").rename(root / "validation")),
    ("split", "train", "no folder train", lambda root: shutil.rmtree(root / "train")),
    ("split", "val", "add --zip", lambda root: (write_zip(root, "val"), shutil.rmtree(root / "val"))),
    ("no-classes", "val", "4 images lie directly in it", flat_val),
    ("class", "train/emu", "not in val", write("train/emu/0.JPEG", photo(70))),
    ("class", "val/emu", "not in train", write("val/emu/0.JPEG", photo(70))),
    ("empty-class", "train/emu", "no file with the suffix", lambda root: (root / "train" / "emu").mkdir()),
    ("unread-image", "train/cat/x.gif", "GIF of 16 x 16, but the suffix", write("train/cat/x.gif", photo(71, "GIF"))),
    ("unread-image", "val/loose.JPEG", "in no class folder", write("val/loose.JPEG", photo(72))),
    ("broken-link", "train/cat/x.JPEG", "leads to nowhere.JPEG", link("train/cat/x.JPEG", "nowhere.JPEG")),
    ("broken-link", "train/emu", "leads to nowhere", link("train/emu", "nowhere")),
    ("link-loop", "train/cat/x.JPEG", "leads to x.JPEG", link("train/cat/x.JPEG", "x.JPEG")),
    ("link-loop", "train/dog/again", "leads to ../..", link("train/dog/again", "../..")),
    ("link-loop", "train/emu", "leads to .", link("train/emu", ".")),
    ("link-loop", "train/dog/z", "leads to a, which is listed already", linked_twice),
    ("special-file", "train/cat/x.JPEG", "not a regular file", lambda root: os.mkfifo(root / "train/cat/x.JPEG")),
    ("special-file", "train/cat/socket.JPEG", "not a regular file", make_socket),
    ("zero-byte", "train/cat/x.JPEG", "0 bytes", write("train/cat/x.JPEG", b"")),
    ("text", "val/cat/x.JPEG", "begins '<!DOCTYPE html>", write("val/cat/x.JPEG", "<!DOCTYPE html>\n\tœuf".encode())),
    ("header-only", "train/cat/x.JPEG", "begin as an image", write("train/cat/x.JPEG", JPEG[:20])),
    ("header-only", "train/cat/x.JPEG", "no pixels", write("train/cat/x.JPEG", JPEG[: START_OF_SCAN + 14])),
    ("header-only", "train/cat/x.png", "begin as an image", write("train/cat/x.png", PNG[:33])),
    ("truncated", "train/cat/x.JPEG", "truncated", write("train/cat/x.JPEG", JPEG[:-2])),
    ("truncated", "train/cat/x.png", "truncated", write("train/cat/x.png", PNG[: len(PNG) // 2])),
    ("corrupt", "train/cat/x.JPEG", "begins 00 01 02", write("train/cat/x.JPEG", bytes(range(256)))),
    ("corrupt", "train/cat/x.png", "", write("train/cat/x.png", PNG[:60] + bytes(40) + PNG[100:])),
    ("bomb", "val/cat/x.png", "exceeds limit", write("val/cat/x.png", bomb(20_000, 20_000))),
    ("bomb", "val/cat/x.png", "resized to 256", write("val/cat/x.png", bomb(4000, 1))),
    ("train-and-val", "val/cat/x.JPEG", "same content as train/cat/0.JPEG", write("val/cat/x.JPEG", photo(0))),
    ("train-and-val", "val/dog/x.JPEG", ", but class 1 instead of 0", write("val/dog/x.JPEG", photo(0))),
    ("duplicate", "train/cat/x.JPEG", "same content as train/cat/0.JPEG", write("train/cat/x.JPEG", photo(0))),
    ("duplicate", "val/dog/x.JPEG", ", but class 1 instead of 0", write("val/dog/x.JPEG", photo(1000))),
    ("hidden", ".cache", "hidden folder", lambda root: (root / ".cache").mkdir()),
    ("hidden", "train/.trash", "which training does not read", write("train/.trash/0.JPEG", photo(70))),
    ("hidden", "train/cat/.x.JPEG", "which training reads", write("train/cat/.x.JPEG", photo(70))),
    ("not-image", "train/cat/notes.txt", "unknown suffix", write("train/cat/notes.txt", b"remember")),
    ("not-image", "train/cat/pipe", "not a regular file", lambda root: os.mkfifo(root / "train/cat/pipe")),
    ("not-image", "train/list.csv", "in no class folder", write("train/list.csv", b"a,b")),
    ("extra", "test", "only train and val are read", lambda root: (root / "test").mkdir()),
    ("cmyk", "train/cat/x.JPEG", "JPEG 16 x 16", write("train/cat/x.JPEG", encoded(Image.new("CMYK", (16, 16))))),
    ("deep", "train/cat/x.png", "I;16", write("train/cat/x.png", encoded(Image.new("I;16", (16, 16)), "PNG"))),
    ("deep", "train/cat/y.png", "PNG RGB 1 x 1", write("train/cat/y.png", sixteen_bit_colour())),
    ("palette", "train/cat/x.png", "PNG", write("train/cat/x.png", encoded(Image.new("P", (16, 16)), "PNG"))),
    ("alpha", "train/cat/x.png", "RGBA", write("train/cat/x.png", encoded(Image.new("RGBA", (16, 16)), "PNG"))),
    ("exif-orientation", "train/cat/x.JPEG", "6", write("train/cat/x.JPEG", exif_rotated())),
    ("other-format", "train/cat/x.JPEG", "PNG, not JPEG", write("train/cat/x.JPEG", photo(70, "PNG"))),
]


@pytest.mark.parametrize("kind, path, reason, plant", DEFECTS, ids=[f"{d[0]}:{d[1]}" for d in DEFECTS])
def test_each_defect_is_named(root, capsys, kind, path, reason, plant):
    plant(root)
    result = Result(root, capsys)
    assert (kind, path) in result.problems, result.problems
    assert reason in result.problems[kind, path]
    line = f"    {path}: {result.problems[kind, path]}\n"
    assert line in result.console and line in result.report
    assert result.exit_code == (1 if KINDS[kind][0] == "error" else 0)
    if KINDS[kind][0] != "error":
        assert [p["kind"] for p in result.json["problems"]] == [kind], "one planted, one found"
        assert Result(root, capsys, "--strict").exit_code == 1


def test_every_kind_is_planted_by_a_test():
    planted = {kind for kind, *_ in DEFECTS} | {kind for kind, *_ in ZIP_DEFECTS} | {"crash", "large", "unreadable"}
    assert planted == set(KINDS)


def test_large_image_is_a_warning(root, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 256 * 256)  # validation resizes to as many
    write("train/cat/x.png", bomb(300, 400))(root)
    result = Result(root, capsys)
    assert list(result.problems) == [("large", "train/cat/x.png")] and result.exit_code == 0
    assert result.problems["large", "train/cat/x.png"].startswith("300 x 400")
    assert Result(root, capsys, "--strict").exit_code == 1


def test_many_defects_do_not_hide_each_other(root, capsys):
    planted = [
        ("zero-byte", "train/cat/a.JPEG", write("train/cat/a.JPEG", b"")),
        ("zero-byte", "val/cat/a.JPEG", write("val/cat/a.JPEG", b"")),
        ("text", "train/dog/b.JPEG", write("train/dog/b.JPEG", b"sorry")),
        ("truncated", "val/dog/c.JPEG", write("val/dog/c.JPEG", JPEG[:-30])),
        ("link-loop", "val/dog/up", link("val/dog/up", "..")),
        ("broken-link", "train/cat/d.JPEG", link("train/cat/d.JPEG", "e.JPEG")),
        ("train-and-val", "val/dog/f.JPEG", write("val/dog/f.JPEG", photo(101))),
        ("hidden", "val/.g", write("val/.g", b"")),
    ]
    for *_, plant in planted:
        plant(root)
    result = Result(root, capsys)
    assert sorted(result.problems) == sorted((kind, path) for kind, path, _ in planted)
    assert len(result.manifest.splitlines()) == 10 + 6, "damaged images are in the manifest too"
    assert "train/cat/d.JPEG\t-\t-\t0\n" in result.manifest, "one that cannot be read has neither size nor hash"


def test_link_loops_in_every_folder_terminate(root, capsys):
    # Two links in each of two folders that lead to each other: followed blindly, these are more than 2 ** 40 folders.
    for here, there in (("cat", "dog"), ("dog", "cat")):
        for name in ("a", "b"):
            (root / "train" / here / name).symlink_to(f"../{there}")
    result = Result(root, capsys)
    assert result.exit_code == 1
    assert len(result.names("link-loop")) == 6  # in each class: the second link, and both of those behind the first
    assert all(len(path) < 30 for path in result.names("link-loop"))


def test_linked_class_folders_are_read(root, tmp_path, capsys):
    (root / "train" / "cat").rename(tmp_path / "elsewhere")
    (root / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    result = Result(root, capsys, "--strict")
    assert result.exit_code == 0
    assert len(result.manifest.splitlines()) == 10


def test_unreadable_files_and_folders(root, capsys):
    assert Result(root, capsys).exit_code == 0  # and Pillow's plugins are imported, which another user may not read
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        shared = Path(folder) / "photos"
        shutil.copytree(root, shared)
        Path(folder).chmod(0o777)
        (shared / "train" / "cat" / "0.JPEG").chmod(0)
        (shared / "train" / "cat" / "notes.txt").touch(mode=0)
        (shared / "val" / "dog").chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # permissions do not bind root
        try:
            result = Result(shared, capsys)
        finally:
            os.seteuid(user)
            (shared / "val" / "dog").chmod(0o755)
    assert result.exit_code == 1
    assert result.problems["unreadable", "train/cat/0.JPEG"] == "Permission denied"
    assert result.problems["unreadable", "train/cat/notes.txt"] == "Permission denied", "it may be an image"
    assert result.problems["unreadable", "val/dog"] == "Permission denied"


def test_names_can_not_fake_lines(root, capsys):
    name = "x\n    train: fine\x1b[2J\\\udcff.JPEG"
    (root / "train" / "cat" / name).write_bytes(b"")
    result = Result(root, capsys)
    escaped = "train/cat/x\\n    train: fine\\x1b[2J\\\\\\udcff.JPEG"
    assert f"    {escaped}: 0 bytes\n" in result.console
    assert len(result.manifest.splitlines()) == 11 and escaped in result.manifest
    assert result.names("zero-byte") == [f"train/cat/{name}"], "JSON holds the name as it is"


def test_console_is_limited_and_the_report_file_is_not(root, capsys):
    for number in range(25):
        (root / "train" / "cat" / f"empty{number:02}.JPEG").write_bytes(b"")
    result = Result(root, capsys)
    assert result.console.count(": 0 bytes\n") == 10 and "    and 15 more\n" in result.console
    assert result.report.count(": 0 bytes\n") == 25 and "more\n" not in result.report
    assert len(result.names("zero-byte")) == 25


def test_errors_come_first(root, capsys):
    write("train/.hidden", b"")(root)
    write("train/cat/x.png", encoded(Image.new("P", (16, 16)), "PNG"))(root)
    write("val/dog/x.JPEG", b"")(root)
    result = Result(root, capsys)
    positions = [result.console.index(f"  {kind}: ") for kind in ("zero-byte", "hidden", "palette")]
    assert positions == sorted(positions)
    assert result.json["counts"] == {"error": 1, "warning": 1, "note": 1}


# ------------------------------------------------------------------------------------------------------------ zip files


def drop_member(root: Path) -> None:
    replace_zip(root, "val", {"dog/1.JPEG": None})


def replace_zip(root: Path, split: str, changes: dict[str, bytes | None]) -> None:
    """Write the zip file anew with members changed, added or (None) left out."""
    with zipfile.ZipFile(root / f"{split}.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(root / f"{split}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**members, **changes}.items():
            if content is not None:
                archive.writestr(name, content)


def append_to_map(line: str) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        with (root / "val_map.txt").open("a") as file:
            file.write(line)

    return plant


def flip_byte(root: Path) -> None:
    content = bytearray((root / "train.zip").read_bytes())
    content[100] ^= 255  # within the first member
    (root / "train.zip").write_bytes(content)


ZIP_DEFECTS = [
    ("split", "val.zip", "no such file", lambda root: (root / "val.zip").unlink()),
    ("split", "val.zip", "rename validation.zip to val.zip", lambda r: (r / "val.zip").rename(r / "validation.zip")),
    ("split", "val_map.txt", "No such file", lambda root: (root / "val_map.txt").unlink()),
    ("no-classes", "val_map.txt", "names no image", lambda root: (root / "val_map.txt").write_text("\n")),
    ("class", "train/1", "not in val", lambda root: (root / "val_map.txt").write_text("cat/0.JPEG\t0\n")),
    ("empty-class", "val_map.txt", "index 2 to 999999999999", append_to_map("dog/0.JPEG\t1000000000000\n")),
    ("map-line", "val_map.txt:4", "dog/1.JPEG is not in val.zip", drop_member),
    ("map-line", "val_map.txt:5", "is not 'path inside the zip, tab, class index'", append_to_map("dog/1.JPEG 1\n")),
    ("map-line", "val_map.txt:5", "named in line 1 already", append_to_map("./cat/0.JPEG\t0\n")),
    ("corrupt", "val.zip", "not a readable zip", lambda root: (root / "val.zip").write_bytes(b"PK\3\4" + bytes(99))),
    ("corrupt", "train.zip/cat/0.JPEG", "", flip_byte),
    ("truncated", "val.zip/cat/0.JPEG", "truncated", lambda r: replace_zip(r, "val", {"cat/0.JPEG": JPEG[:-9]})),
    ("zero-byte", "val.zip/cat/0.JPEG", "0 bytes", lambda root: replace_zip(root, "val", {"cat/0.JPEG": b""})),
    (
        "train-and-val",
        "val.zip/cat/0.JPEG",
        "train.zip/cat/0",
        lambda r: replace_zip(r, "val", {"cat/0.JPEG": photo(0)}),
    ),
    ("unlisted", "val.zip/../evil", "does not read", lambda root: replace_zip(root, "val", {"../evil": b"x"})),
    ("extra", "old.zip", "only train.zip and val.zip", lambda root: (root / "old.zip").write_bytes(b"")),
]


@pytest.mark.parametrize("kind, path, reason, plant", ZIP_DEFECTS, ids=[f"{d[0]}:{d[1]}" for d in ZIP_DEFECTS])
def test_each_defect_of_zip_files_is_named(zip_root, capsys, kind, path, reason, plant):
    plant(zip_root)
    result = Result(zip_root, capsys, "--zip")
    assert (kind, path) in result.problems, result.problems
    assert reason in result.problems[kind, path]
    assert result.exit_code == (1 if KINDS[kind][0] == "error" else 0)
    assert not (zip_root.parent / "evil").exists()


def test_map_that_is_no_utf8(zip_root, capsys):
    (zip_root / "val_map.txt").write_bytes(b"\xef\xbb\xbf" + (zip_root / "val_map.txt").read_bytes())
    assert Result(zip_root, capsys, "--zip").exit_code == 0, "a byte order mark"
    with (zip_root / "val_map.txt").open("ab") as file:
        file.write(b"d\xf6g/0.JPEG\t1\n")
    assert list(Result(zip_root, capsys, "--zip").problems) == [("map-line", "val_map.txt:5")]


def test_member_named_twice_is_one_problem(zip_root, capsys):
    append_to_map("cat/0.JPEG\t0\n")(zip_root)
    assert list(Result(zip_root, capsys, "--zip").problems) == [("map-line", "val_map.txt:5")]


def test_workers_read_one_zip_file_at_once(zip_root, capsys, monkeypatch):
    monkeypatch.setattr(inspection, "FILES_PER_MESSAGE", 1)
    members = {f"cat/many{number}.JPEG": photo(3000 + number) for number in range(300)}
    replace_zip(zip_root, "train", members)
    with (zip_root / "train_map.txt").open("a") as file:
        file.writelines(f"{name}\t0\n" for name in members)
    result = Result(zip_root, capsys, "--zip", "--workers", "4")
    assert result.json["problems"] == [] and result.json["modes"] == {"RGB": 310}


def test_zip_bomb_is_not_unpacked(zip_root, capsys, monkeypatch):
    monkeypatch.setattr(inspection, "MAX_FILE_BYTES", 2**20)
    replace_zip(zip_root, "train", {"cat/0.JPEG": bytes(2**20 + 1)})
    result = Result(zip_root, capsys, "--zip")
    assert "1,048,577 bytes, more than 1,048,576; not read" in result.problems["bomb", "train.zip/cat/0.JPEG"]


def test_other_dataset_names(root, capsys):
    for split in IMAGES_PER_CLASS:
        (root / split).rename(root / f"imagenet21k_{split}")
    assert Result(root, capsys, "--dataset", "imagenet_21k", "--strict").exit_code == 0
    result = Result(root, capsys)
    assert result.names("split") == ["train", "val"] and result.names("extra") == []
    assert "rename imagenet21k_val to val" in result.problems["split", "val"]


# ---------------------------------------------------------------------------------------------- nothing stops the check


def test_bomb_takes_bounded_memory(root):
    # Decoded, this image would take 2 GiB.
    write("train/cat/x.png", bomb(20_000, 20_000))(root)
    command = [sys.executable, "-m", "tools.check", "--data-path", str(root), "--workers", "1"]
    # A child's peak starts with its parent's at exec: a small parent measures, not the one that runs all tests.
    measure = (
        "import resource, subprocess, sys; status = subprocess.run(sys.argv[1:]).returncode; "
        "print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    result = subprocess.run(
        [sys.executable, "-c", measure, *command], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    status, peak_kib = map(int, result.stdout.splitlines()[-1].split())  # of the process and its workers, the largest
    assert status == 1 and result.stderr == ""
    assert "    train/cat/x.png: Image size (400000000 pixels) exceeds limit" in result.stdout
    assert peak_kib * 1024 < 1.5 * 2**30


def test_memory_limit_binds_the_decoder(root):
    write("train/cat/x.png", bomb(9400, 9400))(root)  # within Pillow's limit; 337 MiB in memory
    # In a process of its own: what the one that runs all tests has freed would be had again, beside the limit.
    check = (
        "import sys; from data import check, inspection; inspection.WORKER_MEMORY_BYTES = 64 * 2**20; "
        "sys.exit(check.main(sys.argv[1:]))"
    )
    report = root.parent / "report.json"
    command = [sys.executable, "-c", check, "--data-path", str(root), "--workers", "2", "--json", str(report)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == ""
    (problem,) = json.loads(report.read_text())["problems"]
    assert (problem["kind"], problem["path"]) == ("bomb", "train/cat/x.png")
    assert "67,108,864 bytes of memory" in problem["reason"]


def test_elongated_image_harms_validation_only(root, capsys):
    write("train/cat/x.png", bomb(4000, 1))(root)  # training crops and resizes to a fixed size at once
    assert Result(root, capsys).json["problems"] == []


def replace_decoder(monkeypatch: pytest.MonkeyPatch, victim: bytes, act: Callable[[], object]) -> None:
    """Workers are forked, so they too decode `victim` by calling `act`."""
    decode_image = inspection.decode_image
    monkeypatch.setattr(
        inspection, "decode_image", lambda content: act() if content == victim else decode_image(content)
    )


def test_decoders_print_nothing(root, capfd, monkeypatch):
    replace_decoder(monkeypatch, photo(1), lambda: os.write(2, b"libtiff: the file is damaged"))
    assert main(["--data-path", str(root), "--workers", "1"]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("workers", ["1", "3"])
def test_crashing_decoder_loses_one_file_only(root, capsys, monkeypatch, workers):
    replace_decoder(monkeypatch, photo(1), lambda: os.kill(os.getpid(), signal.SIGKILL))
    result = Result(root, capsys, "--workers", workers)
    assert result.exit_code == 1
    assert list(result.problems) == [("crash", "train/cat/1.JPEG")]
    assert "SIGKILL" in result.problems["crash", "train/cat/1.JPEG"]
    assert result.json["modes"] == {"RGB": 9}
    assert sum("\t-\t" in line for line in result.manifest.splitlines()) == 1


def test_worker_that_is_killed_from_outside_costs_nothing(root, tmp_path, capsys, monkeypatch):
    expected = Result(root, capsys).manifest
    mark = tmp_path / "killed once"

    def die_once():
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.new("RGB", (1, 1))

    replace_decoder(monkeypatch, photo(1), die_once)
    result = Result(root, capsys, "--workers", "1")
    assert mark.exists()
    assert result.exit_code == 0 and result.json["problems"] == []
    assert result.manifest == expected


def test_decoder_that_never_ends_is_ended(root, capsys, monkeypatch):
    monkeypatch.setattr(inspection, "SECONDS_PER_FILE", 0.2)
    replace_decoder(monkeypatch, photo(1), signal.pause)
    previous = signal.signal(signal.SIGALRM, signal.SIG_IGN)  # as the parent process may have left it
    try:
        result = Result(root, capsys)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert result.problems == {("crash", "train/cat/1.JPEG"): "took longer than 0.2 s"}
    assert result.json["modes"] == {"RGB": 9}


# -------------------------------------------------------------------------------------------- manifest and fingerprints


def test_manifest_says_what_training_reads(root, capsys):
    write("train/cat/sub/deep.PNG", photo(60, "PNG"))(root)
    write("train/cat/sub-/deep.png", photo(61, "PNG"))(root)
    expected = []
    for split in IMAGES_PER_CLASS:
        for path, label in FolderSource(root / split).samples:
            content = Path(path).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            expected.append(f"{Path(path).relative_to(root)}\t{len(content)}\t{digest}\t{label}")
    result = Result(root, capsys)
    assert result.manifest.splitlines() == sorted(expected)
    assert result.json["fingerprint"] == hashlib.sha256(result.manifest.encode()).hexdigest()[:16]
    assert result.json["fingerprint"] in result.console


def test_output_does_not_depend_on_the_number_of_workers(root, capsys):
    for number in range(40):
        write(f"train/cat/n{number}.JPEG", photo(2000 + number) if number % 3 else b"text")(root)
    results = [Result(root, capsys, "--workers", workers) for workers in ("1", "2", "5")]
    assert len({result.manifest for result in results}) == 1
    assert len({result.report for result in results}) == 1
    assert len({json.dumps(result.json) for result in results}) == 1


def test_fingerprint_tells_data_sets_apart(root, tmp_path, capsys):
    original = Result(root, capsys).json["fingerprint"]
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(root, copy)
    assert Result(copy, capsys).json["fingerprint"] == original
    image = copy / "train" / "cat" / "0.JPEG"
    content = image.read_bytes()
    image.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit
    assert Result(copy, capsys).json["fingerprint"] != original
    image.write_bytes(content)
    image.rename(image.with_name("renamed.JPEG"))
    assert Result(copy, capsys).json["fingerprint"] != original


@pytest.mark.parametrize("zipped", [False, True])
def test_splits_have_the_fingerprint_that_training_notes(root, request, capsys, zipped):
    for path in ("train/cat/0sub/x.JPEG", "train/cat/0sub-/x.JPEG"):  # the order of folders is not that of paths
        write(path, photo(60))(root)
    if zipped:
        request.getfixturevalue("zip_root")
    result = Result(root, capsys, *["--zip"] * zipped)
    for split, content in result.json["splits"].items():
        source = ZipSource(root, split) if zipped else FolderSource(root / split)
        assert content["fingerprint"] == fingerprint(source)
        assert content["fingerprint"][:16] in result.console


# ------------------------------------------------------------------------------------------------------------ wrong use


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--data-path"),
        (["--data-path", "{root}/nowhere"], "nowhere: no such folder"),
        (["--data-path", "{root}/train/cat/0.JPEG"], "no such folder"),
        (["--data-path", "{root}", "--data-set", "imagenet"], "--data-set"),
        (["--data-path", "{root}", "--dataset", "cifar"], "cifar"),
        (["--data-path", "{root}", "--workers", "0"], "--workers 0"),
        (["--data-path", "{root}", "--workers", "many"], "many"),
        (["--data-path", "{root}", "--manifest", "{root}/nowhere/m.txt"], "nowhere/m.txt: cannot be written"),
        (["--data-path", "{root}", "--json", "{root}"], "cannot be written"),
    ],
)
def test_wrong_use_is_one_line(root, capsys, flags, message):
    assert main([flag.format(root=root) for flag in flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("tools.check: error: ")
    assert message in captured.err


def test_json_on_standard_output_is_nothing_but_json(root, capsys):
    expected = Result(root, capsys)
    assert main(["--data-path", str(root), "--workers", "1", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == expected.json
    assert expected.console in captured.err


def test_full_disk_is_one_line(root, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    assert main(["--data-path", str(root), "--workers", "1", "--report", "/dev/full"]) == 2
    assert capsys.readouterr().err == "tools.check: error: /dev/full: cannot be written: No space left on device\n"


@pytest.fixture
def interruptible():
    """Jobs in the background ignore SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_interrupt_ends_the_workers(root, capsys, monkeypatch, interruptible):
    parent = os.getpid()
    replace_decoder(monkeypatch, photo(1), lambda: (os.kill(parent, signal.SIGINT), signal.pause()))
    assert main(["--data-path", str(root), "--workers", "2"]) == 130
    assert capsys.readouterr().err == "tools.check: interrupted\n"
    assert multiprocessing.active_children() == []


def test_workers_leave_the_interrupt_to_their_parent(root, capsys, monkeypatch, interruptible):
    monkeypatch.setattr(inspection, "ATTEMPTS", 1)
    replace_decoder(monkeypatch, photo(1), lambda: os.kill(os.getpid(), signal.SIGINT))
    assert Result(root, capsys).exit_code == 0


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for processes that are not its own children")
def test_workers_do_not_outlive_a_killed_check(root, tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "FILES_PER_MESSAGE", 1)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    read_end, write_end = os.pipe()
    decode_image = inspection.decode_image

    def announce_and_wait(content: bytes) -> Image.Image:
        os.write(write_end, f"{os.getpid()}\n".encode())
        gate.open().close()  # waits for the other end
        return decode_image(content)

    monkeypatch.setattr(inspection, "decode_image", announce_and_wait)
    arguments = ["--data-path", str(root), "--workers", "3"]
    process = multiprocessing.get_context("fork").Process(target=main, args=(arguments,))
    process.start()
    os.close(write_end)
    with os.fdopen(read_end) as lines:
        workers = [os.pidfd_open(int(lines.readline())) for _ in range(3)]
    process.kill()
    process.join()
    with gate.open("w"):
        for worker in workers:
            assert select.select([worker], [], [], 30)[0], "a worker goes on without the check"
            os.close(worker)
