"""What is an image, a class or a companion: one answer in folders, zip files, --images, check and pack."""

import json
from pathlib import Path

import pytest
from image_data import deep_images, message_of, png, write_zip
from PIL import Image

from configs import UserError
from data.datasets import ImageDataset
from data.files import IMAGE_FORMATS, IMAGE_SUFFIXES, count_suffixes, describe_left_out, is_companion, is_image_name
from data.sources import FolderSource, ZipSource
from tasks.pictures import find_pictures
from tools.check import main as check
from tools.pack import main as pack

COMPANIONS = (
    *("._1.png", ".DS_Store", ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", "__MACOSX/cat/._1.png"),
    *("Thumbs.db", "THUMBS.DB", "ehthumbs.db", "desktop.ini", "$RECYCLE.BIN/1.png", "System Volume Information/1.png"),
    *("@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "1.png@SynoEAStream", "#recycle/1.png", "lost+found/1.png", "Icon\r"),
    "1.png:Zone.Identifier",
)


@pytest.mark.parametrize("path", COMPANIONS)
def test_companions(path):
    assert is_companion(path) and is_companion(f"cat/{path}")


@pytest.mark.parametrize(
    "path", ["cat/1.png", "../cat/1.png", "./1.png", "a.b/c.d.png", "thumbs.db.png", "__MACOSX2", "Icon"]
)
def test_no_companions(path):
    assert not is_companion(path)


def test_suffixes_are_those_that_pillow_opens_by_content():
    known = Image.registered_extensions()
    assert {known[suffix] for suffix in IMAGE_SUFFIXES} == set(IMAGE_FORMATS)
    assert is_image_name("A.JFIF") and is_image_name("a.gif") and not is_image_name("a.heic")


def test_left_out_files_are_counted_by_suffix():
    counts = count_suffixes(["a.HEIC", "b.heic", "c.txt", "README", "d.x y", *(f"e.{i}" for i in range(8))])
    assert describe_left_out(counts) == "2 without a suffix, 2 .heic, 1 .0, 1 .1, 1 .2, 1 .3, 1 .4, 1 .5, 3 others"
    assert describe_left_out(count_suffixes([])) == ""


@pytest.fixture
def littered(image_folder) -> Path:
    """A data set with every companion in each split and class, and 3 HEIC and 2 text files that are not read."""
    for split in ("train", "val"):
        for below in (".", "ant", "cat"):
            for path in COMPANIONS:
                (image_folder / split / below / path).parent.mkdir(parents=True, exist_ok=True)
                (image_folder / split / below / path).write_bytes(b"no image")
        for number in range(3):
            (image_folder / split / "bee" / f"{number}.heic").write_bytes(b"ftypheic")
        for below in (".", "bee"):
            (image_folder / split / below / "list.txt").write_text("x")
    return image_folder


def test_a_littered_data_set_is_the_same_data_set(image_folder, littered, tmp_path, capsys):
    source = FolderSource(littered / "train")
    assert source.classes == ["ant", "bee", "cat"] and len(source.samples) == 18
    assert source.left_out == "3 .heic, 2 .txt"
    assert len(find_pictures([str(littered / "train")], lines := [].append)) == 18 and lines
    assert pack(["--data-path", str(littered), "--out", str(tmp_path / "z"), "--workers", "0"]) == 0
    assert ZipSource(tmp_path / "z", "train").classes == source.classes
    assert "train: left out: 3 .heic, 2 .txt" in capsys.readouterr().out
    assert check(["--data-path", str(littered), "--workers", "1", "--json", str(tmp_path / "report")]) == 0
    out = capsys.readouterr().out
    assert "train    left out: 3 .heic, 2 .txt" in out
    kinds = {(p["kind"], Path(p["path"]).suffix) for p in json.loads((tmp_path / "report").read_text())["problems"]}
    assert kinds == {("not-image", ".heic"), ("not-image", ".txt")}


def test_a_map_that_names_companions(tmp_path):
    members = {name: png(number) for number, name in enumerate(("cat/1.png", "dog/1.png", "__MACOSX/cat/._1.png"))}
    write_zip(
        tmp_path, "train", members, ["__MACOSX/cat/._1.png\t1", "cat/1.png\t0", "cat/.hidden.png\t0", "dog/1.png\t1"]
    )
    source = ZipSource(tmp_path, "train")
    assert source.samples == [("cat/1.png", 0), ("dog/1.png", 1)] and source.classes == ["cat", "dog"]
    assert source.left_out == "2 lines that name hidden files or companions"
    write_zip(tmp_path, "train", members, ["__MACOSX/cat/._1.png\t0", "cat/1.png\t1", "dog/1.png\t2"])
    assert message_of(ZipSource, tmp_path, "train").endswith("left out: 1 lines that name hidden files or companions")


def test_pictures_are_what_training_reads(tmp_path):
    for name in ("a.jfif", "b.gif", "c.heic", ".d.png", "._e.png", "__MACOSX/f.png", "a.jfif.top5.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    lines = []
    assert [path.name for path in find_pictures([str(tmp_path)], lines.append)] == ["a.jfif", "b.gif"]
    assert lines == [f"--images {tmp_path}: left out: 1 .heic"]
    assert find_pictures([str(tmp_path / "._e.png")]) == [tmp_path / "._e.png"], "a file that is named is tried"


@pytest.mark.parametrize("zipped", [False, True])
def test_check_and_training_agree_on_every_odd_file(image_folder, tmp_path, capsys, zipped):
    """On what is read, on what decodes, and on what comes out nearly constant."""
    odd = {name: content for name, (content, _) in deep_images().items()}
    odd |= {
        "text.png": b"no image",
        "empty.gif": b"",
        "cut.jfif": odd["photo.jfif"][:-200],
        "a.heic": b"",
        "._1.png": b"x",
    }
    for name, content in odd.items():
        (image_folder / "train" / "bee" / name).write_bytes(content)
    root, flags = image_folder, []
    source = FolderSource(image_folder / "train")
    if zipped:
        root, flags = tmp_path / "z", ["--zip"]
        names = [Path(path).relative_to(image_folder / "train").as_posix() for path, _ in source.samples]
        lines = [f"{name}\t{label}" for name, (_, label) in zip(names, source.samples)]
        write_zip(root, "train", {name: source.read(i) for i, name in enumerate(names)}, lines)
        val = [f"{name}/0.png" for name in source.classes]
        write_zip(root, "val", {name: png(i) for i, name in enumerate(val)}, [f"{n}\t{i}" for i, n in enumerate(val)])
        source = ZipSource(root, "train")
    images = ImageDataset(source, lambda image: image)
    broken, constant = set(), set()
    for index, (path, _) in enumerate(source.samples):
        try:
            images[index]
        except UserError:
            broken.add(Path(path).name)
        else:
            constant |= {Path(path).name} if images.remark(index) else set()
    assert broken == {"text.png", "empty.gif", "cut.jfif"}
    assert constant == {name for name, (_, lost) in deep_images().items() if lost}
    check(["--data-path", str(root), "--workers", "1", "--json", str(tmp_path / "report"), *flags])
    found: dict[str, set[str]] = {}
    for problem in json.loads((tmp_path / "report").read_text())["problems"]:
        found.setdefault(problem["kind"], set()).add(Path(problem["path"]).name)
    assert found.pop("damaged") | found.pop("empty") == broken and found.pop("nearly-constant") == constant
    assert found.pop("not-image", set()) == (set() if zipped else {"a.heic"})
    assert not found
    assert "ready" not in capsys.readouterr().out
