"""`python -m tools.check`: every kind of defect is found and named, and no file of a data set stops the check."""

import io
import json
import multiprocessing
import os
import select
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_data import UNREADABLE, made_images, zip_image_folder
from PIL import Image

from configs import UserError
from data.datasets import ImageDataset
from data.sources import FolderSource, ZipSource, fingerprint
from tools import check
from tools.check import KINDS, main

CLASSES = ("cat", "dog")
IMAGES_PER_CLASS = {"train": 3, "val": 2}


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photo(seed: int, form: str = "JPEG") -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)), form)


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
    zip_image_folder(root, root.parent / "zipped")
    return root.parent / "zipped"


class Result:
    """What one run of the check gave."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture, *flags: str) -> None:
        output = root.parent / "report.json"
        self.exit_code = main(["--data-path", str(root), "--workers", "2", "--json", str(output), *flags])
        captured = capsys.readouterr()
        self.console, self.stderr = captured.out, captured.err
        self.json = json.loads(output.read_text())
        self.problems = {(p["kind"], p["path"]): p["reason"] for p in self.json["problems"]}
        assert multiprocessing.active_children() == [], "a worker outlived the check"


@pytest.mark.parametrize("zipped", [False, True])
def test_clean_data_set(root, zip_root, capsys, zipped):
    result = Result(zip_root if zipped else root, capsys, *["--zip"] * zipped, "--strict")
    assert result.exit_code == 0 and result.json["problems"] == []
    assert result.stderr == "", "no progress bar where there is no terminal"
    assert "0 errors, 0 warnings: ready" in result.console
    for split, content in result.json["splits"].items():
        source = ZipSource(zip_root, split) if zipped else FolderSource(root / split)
        assert list(content["classes"].values()) == [IMAGES_PER_CLASS[split]] * 2
        assert content["fingerprint"] == fingerprint(source), "what training notes"


def test_one_folder_is_checked_as_training_splits_it(root, capsys):
    """With a configuration that sets DATA.VAL_SHARE; what belongs to the whole folder is named once."""
    shutil.rmtree(root / "val")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    cfg = str(Path(__file__).resolve().parents[2] / "configs" / "recipes" / "fine_tuning.yaml")
    for folder in (root, root / "train"):  # which may hold the classes itself
        result = Result(folder, capsys, "--cfg", cfg, "--opts", "DATA.BATCH_SIZE", "4")
        assert {name: list(split["classes"].values()) for name, split in result.json["splits"].items()} == {
            "train": [2, 2],
            "val": [1, 1],
        }
        assert [problem["kind"] for problem in result.json["problems"]] == ["not-image"] and result.exit_code == 0
    assert Result(root, capsys).exit_code == 1, "without it, validation images are missing"
    result = Result(root, capsys, "--cfg", cfg)
    assert result.problems["few-images", "train"].startswith("4 images, and an update takes 64: add --opts DATA.BATCH")
    assert "1 errors, 1 warnings: do not train on it as it is" in result.console and result.exit_code == 1


def test_progress_bar_on_a_terminal(root, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["--data-path", str(root)]) == 0
    assert "6/6" in sys.stderr.getvalue() and "4/4" in sys.stderr.getvalue()


# --------------------------------------------------------------------------------------------- each defect, by its name
def write(path: str, content: bytes) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)

    return plant


def link(path: str, target: str) -> Callable[[Path], None]:
    return lambda root: (root / path).symlink_to(target)


def sparse(root: Path) -> None:
    with (root / "train/cat/x.JPEG").open("wb") as file:
        file.truncate(2**30)


JPEG = photo(90)
TWELVE_BITS = encoded(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)), "PNG")
BOMB = encoded(Image.new("1", (20_000, 20_000)), "PNG")  # 50 kB that would take 1.2 GB


def deepen(root: Path) -> None:
    """The classes cat and dog below two folders each: train/a/cat, train/a/dog, train/b/cat, ..."""
    for split in ("train", "val"):
        (root / split).rename(root / "old")
        for name in "ab":
            for label in CLASSES:
                (root / split / name / label).mkdir(parents=True)
                for path in list((root / "old" / label).iterdir())[:1]:
                    path.rename(root / split / name / label / path.name)
        shutil.rmtree(root / "old")


# (kind, path that is named, part of the reason, how to make it)
DEFECTS = [
    ("split", "val", "has validation/ for val/: run ln -s", lambda root: (root / "val").rename(root / "validation")),
    ("split", "train", "leads back to", link("train/dog/again", "../..")),
    ("classes", ".", "only in val: emu", write("val/emu/0.JPEG", photo(70))),
    ("class-not-in-val", ".", "1 of 3 classes have no validation images (emu)", write("train/emu/0.JPEG", photo(70))),
    ("levels", "train", "folders cat, dog: if these are the classes", deepen),
    ("nearly-constant", "train/cat/x.png", "0 to 4095 become levels 0 to 15", write("train/cat/x.png", TWELVE_BITS)),
    ("split", "train", "in class emu", lambda root: (root / "train" / "emu").mkdir()),
    ("unread-image", "train/cat/x.large", "another suffix", write("train/cat/x.large", photo(71))),
    ("unread-image", "val/loose.JPEG", "in no class folder", write("val/loose.JPEG", photo(72))),
    ("unreadable", "train/cat/x.JPEG", "a link to nothing", link("train/cat/x.JPEG", "nowhere.JPEG")),
    ("unreadable", "train/emu", "a link to nothing", link("train/emu", "nowhere")),
    ("unreadable", "train/cat/x.JPEG", "not a regular file", lambda root: os.mkfifo(root / "train/cat/x.JPEG")),
    ("unreadable", "train/cat/pipe", "not a regular file", lambda root: os.mkfifo(root / "train/cat/pipe")),
    ("empty", "train/cat/x.JPEG", "0 bytes", write("train/cat/x.JPEG", b"")),
    ("damaged", "val/cat/x.JPEG", "begins b'<!DOCTYPE html>", write("val/cat/x.JPEG", b"<!DOCTYPE html>")),
    ("damaged", "train/cat/x.JPEG", "truncated", write("train/cat/x.JPEG", JPEG[:-2])),
    ("bomb", "val/cat/x.png", "exceeds limit", write("val/cat/x.png", BOMB)),
    ("bomb", "train/cat/x.JPEG", "1,073,741,824 bytes, more than", sparse),
    ("train-and-val", "val/cat/x.JPEG", "same content as train/cat/0.JPEG", write("val/cat/x.JPEG", photo(0))),
    ("duplicate", "train/cat/x.JPEG", "same content as train/cat/0.JPEG", write("train/cat/x.JPEG", photo(0))),
    ("duplicate", "val/dog/x.JPEG", ", but class dog instead of cat", write("val/dog/x.JPEG", photo(1000))),
    ("misnamed", "train/cat/x.JPEG", "PNG, not JPEG", write("train/cat/x.JPEG", photo(70, "PNG"))),
    ("not-image", "train/cat/notes.txt", "another suffix", write("train/cat/notes.txt", b"remember")),
]


@pytest.mark.parametrize("kind, path, reason, plant", DEFECTS, ids=[f"{d[0]}:{d[1]}" for d in DEFECTS])
def test_each_defect_is_named(root, capsys, kind, path, reason, plant):
    plant(root)
    result = Result(root, capsys)
    assert reason in result.problems[kind, path]
    assert f"    {path}: {result.problems[kind, path]}\n" in result.console
    assert result.exit_code == (1 if KINDS[kind][0] == "error" else 0)
    if result.exit_code == 0:
        assert {found for found, _ in result.problems} == {kind}, "one planted, one found"
        assert Result(root, capsys, "--strict").exit_code == 1


def test_every_kind_is_planted_by_a_test():
    assert {kind for kind, *_ in DEFECTS} == set(KINDS) - {"few-images"}  # which needs a recipe, above


def test_the_check_and_training_agree(root, capsys):
    """On which files are images, and on which of them decode."""
    odd = {**{name: encoded(image, form, **options) for name, (image, form, options) in made_images().items()}}
    odd |= {**UNREADABLE, ".hidden.png": photo(3, "PNG"), "no_image.txt": b"", "end.jpeg": JPEG[:-2], "gif.gif": b""}
    for name, content in odd.items():
        write(f"train/cat/sub/{name}", content)(root)
    source = FolderSource(root / "train")
    images, broken = ImageDataset(source, np.asarray), set()
    for index, (path, _) in enumerate(source.samples):
        try:
            images[index]
        except UserError:
            broken.add(str(Path(path).relative_to(root)))
    result = Result(root, capsys)
    assert {path for kind, path in result.problems if kind in ("empty", "damaged")} == broken and len(broken) == 7
    assert sum(result.json["splits"]["train"]["classes"].values()) == len(source.samples)
    assert {path for kind, path in result.problems if kind == "not-image"} == {"train/cat/sub/no_image.txt"}


def test_a_file_that_may_not_be_read(root, capsys, monkeypatch):
    def refuse(self: FolderSource, index: int) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FolderSource, "read", refuse)
    assert Result(root, capsys).problems["unreadable", "val/dog/1.JPEG"] == "Permission denied"


def test_names_can_not_fake_lines(root, capsys):
    name = "x\n    train: fine\x1b[2J\\\udcff.JPEG"
    (root / "train" / "cat" / name).write_bytes(b"")
    result = Result(root, capsys)
    assert "    train/cat/x\\n    train: fine\\x1b[2J\\\\udcff.JPEG: 0 bytes\n" in result.console
    assert ("empty", f"train/cat/{name}") in result.problems, "JSON holds the name as it is"


def test_the_console_is_limited_and_names_errors_first(root, capsys):
    write("train/cat/notes.txt", b"remember")(root)
    for number in range(25):
        (root / "train" / "cat" / f"empty{number:02}.JPEG").write_bytes(b"")
    result = Result(root, capsys)
    assert result.console.count(": 0 bytes\n") == 10 and "    and 15 more; " in result.console
    assert result.console.index("error: empty: ") < result.console.index("warning: not-image: ")
    assert len(result.problems) == 26 and result.json["counts"] == {"error": 25, "warning": 1}


# ------------------------------------------------------------------------------------------------------------ zip files
def replace_zip(root: Path, split: str, changes: dict[str, bytes]) -> None:
    """Write the zip file again, with members changed."""
    with zipfile.ZipFile(root / f"{split}.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(root / f"{split}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**members, **changes}.items():
            archive.writestr(name, content)


def append_to_map(root: Path) -> None:
    with (root / "val_map.txt").open("a") as file:
        file.write("dog/9.JPEG\t1\n")


def flip_byte(root: Path) -> None:
    content = bytearray((root / "train.zip").read_bytes())
    content[100] ^= 255  # within the first member
    (root / "train.zip").write_bytes(content)


ZIP_DEFECTS = [
    ("split", "val.zip", "no such file", lambda root: (root / "val.zip").unlink()),
    ("split", "val.zip", "val_map.txt:5: dog/9.JPEG is not in", append_to_map),
    ("damaged", "train.zip/cat/0.JPEG", "", flip_byte),
    ("damaged", "val.zip/cat/0.JPEG", "truncated", lambda r: replace_zip(r, "val", {"cat/0.JPEG": JPEG[:-9]})),
    (
        "train-and-val",
        "val.zip/cat/0.JPEG",
        "train.zip/cat/0",
        lambda r: replace_zip(r, "val", {"cat/0.JPEG": photo(0)}),
    ),
]


@pytest.mark.parametrize("kind, path, reason, plant", ZIP_DEFECTS, ids=[f"{d[0]}:{d[1]}" for d in ZIP_DEFECTS])
def test_each_defect_of_zip_files_is_named(zip_root, capsys, kind, path, reason, plant):
    plant(zip_root)
    result = Result(zip_root, capsys, "--zip")
    assert result.exit_code == 1 and reason in result.problems[kind, path]


def test_other_dataset_names(root, capsys):
    for split in IMAGES_PER_CLASS:
        (root / split).rename(root / f"imagenet21k_{split}")
    assert Result(root, capsys, "--dataset", "imagenet_21k", "--strict").exit_code == 0


# ---------------------------------------------------------------------------------------------- nothing stops the check
def replace_decoder(monkeypatch: pytest.MonkeyPatch, victim: bytes, act: Callable[[], object]) -> None:
    """Workers are forked, so they too decode `victim` by calling `act`."""
    decode_image = check.decode_image
    monkeypatch.setattr(check, "decode_image", lambda content: act() if content == victim else decode_image(content))


@pytest.mark.parametrize("act", [lambda: os.kill(os.getpid(), signal.SIGKILL), signal.pause], ids=["dies", "hangs"])
def test_a_decoder_that_dies_or_hangs_is_named(root, capfd, monkeypatch, act):
    monkeypatch.setattr(check, "SECONDS_PER_TASK", 2 if act is signal.pause else 600)
    monkeypatch.setattr(check, "FILES_PER_TASK", 1)
    replace_decoder(monkeypatch, photo(1), act)
    assert main(["--data-path", str(root), "--workers", "1"]) == 2
    line = capfd.readouterr().err
    assert line.startswith("tools.check: error: train/cat/") and line.count("\n") == 1
    assert "or an image soon after it, ends or blocks the process that decodes it: DataLoader" in line


def test_decoders_print_nothing(root, capfd, monkeypatch):
    replace_decoder(monkeypatch, photo(1), lambda: (os.write(2, b"libtiff"), Image.new("RGB", (1, 1)))[1])
    assert main(["--data-path", str(root), "--workers", "1"]) == 0
    assert capfd.readouterr().err == ""


def test_the_report_does_not_depend_on_the_number_of_processes(root, capsys, monkeypatch):
    monkeypatch.setattr(check, "FILES_PER_TASK", 1)
    for number in range(12):
        write(f"train/cat/n{number}.JPEG", photo(2000 + number % 6) if number % 3 else b"text")(root)
    one, three = (Result(root, capsys, "--workers", workers) for workers in ("1", "3"))
    assert (one.console, one.json) == (three.console, three.json) and len(one.problems) == 8


# ------------------------------------------------------------------------------------------------------------ wrong use
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data-path", "{root}/nowhere"], "nowhere: no such folder"),
        (["--data-path", "{root}", "--data-set", "imagenet"], "--data-set"),
        (["--data-path", "{root}", "--workers", "0"], "--workers 0"),
        (["--data-path", "{root}", "--json", "{root}/nowhere/report.json"], "nowhere/report.json: cannot be written"),
        (["--data-path", "{root}", "--json", "{root}"], "cannot be written: Is a directory"),
    ],
)
def test_wrong_use_is_one_line(root, capsys, flags, message):
    assert main([flag.format(root=root) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("tools.check: error: ") and message in error


def test_json_on_standard_output_is_nothing_but_json(root, capsys):
    expected = Result(root, capsys)
    assert main(["--data-path", str(root), "--workers", "1", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == expected.json
    assert expected.console in captured.err


def test_interrupt_ends_the_check_and_its_processes(root, capsys, monkeypatch):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    parent = os.getpid()
    replace_decoder(monkeypatch, photo(1), lambda: (os.kill(parent, signal.SIGINT), Image.new("RGB", (1, 1)))[1])
    try:
        assert main(["--data-path", str(root), "--workers", "2"]) == 130
    finally:
        signal.signal(signal.SIGINT, previous)
    assert capsys.readouterr().err == "tools.check: interrupted\n"
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a process that is not its own child")
def test_processes_do_not_outlive_a_killed_check(root, monkeypatch):
    read_end, write_end = os.pipe()
    replace_decoder(monkeypatch, photo(1), lambda: (os.write(write_end, f"{os.getpid()}\n".encode()), signal.pause()))
    process = multiprocessing.get_context("fork").Process(target=main, args=(["--data-path", str(root)],))
    process.start()
    os.close(write_end)
    with os.fdopen(read_end) as lines:
        worker = os.pidfd_open(int(lines.readline()))
    process.kill()
    process.join()
    assert select.select([worker], [], [], 30)[0], "a worker goes on without the check"
    os.close(worker)
