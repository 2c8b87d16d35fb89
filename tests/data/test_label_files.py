"""Images that a CSV or Parquet file names, instead of class folders."""

import shutil
import sys
from pathlib import Path

import pyarrow
import pytest
import runs
from image_data import message_of
from pyarrow import parquet

from data import fingerprint
from data.label_files import LabelFileSource
from data.sources import count_images
from tasks.classification.images import open_for_evaluation, open_split, open_train_and_val


def lines_of(root: Path, split: str) -> list[str]:
    """A line for every image of class folders."""
    return [f"{path.relative_to(root)},{path.parent.name}" for path in sorted((root / split).rglob("*.png"))]


def write_csv(file: Path, lines: list[str], header: str = "path,class") -> Path:
    file.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def files(image_folder, tmp_path) -> tuple[str, ...]:
    """Options that name files with the images of the folders."""
    train, val = (write_csv(tmp_path / f"{split}.csv", lines_of(image_folder, split)) for split in ("train", "val"))
    return ("DATA.TRAIN_LABELS", str(train), "DATA.VAL_LABELS", str(val))


def test_a_file_gives_the_images_and_classes_of_the_folders(make_config, image_folder, files):
    by_folder, by_file = (
        open_train_and_val(make_config("--data-path", image_folder, *opts), 0, 1, print)
        for opts in ((), ("--opts", *files))
    )
    for expected, got in zip(by_folder, by_file):
        assert got.classes == expected.classes and list(got.samples) == list(expected.samples)
        assert fingerprint(got) == fingerprint(expected)
        assert got.read(3) == expected.read(3)


def test_parquet_is_as_csv(image_folder, tmp_path):
    lines = lines_of(image_folder, "train")
    table = pyarrow.table(
        {"class": [line.split(",")[1] for line in lines], "path": [line.split(",")[0] for line in lines]}
    )
    parquet.write_table(table, tmp_path / "train.parquet")
    source = LabelFileSource(image_folder, tmp_path / "train.parquet")
    expected = LabelFileSource(image_folder, write_csv(tmp_path / "train.csv", lines))
    assert (source.classes, list(source.samples)) == (expected.classes, list(expected.samples))


def test_parquet_without_pyarrow_is_one_line(image_folder, tmp_path, monkeypatch):
    (tmp_path / "train.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = message_of(LabelFileSource, image_folder, tmp_path / "train.parquet")
    assert message == f"{tmp_path}/train.parquet: Parquet needs pyarrow; pip install pyarrow, or write CSV"


def test_numbers_are_sorted_as_numbers_and_other_columns_passed_over(image_folder, tmp_path):
    paths = [line.split(",")[0] for line in lines_of(image_folder, "train")]
    lines = [f"x,{number % 12},{path}" for number, path in enumerate(paths)]
    source = LabelFileSource(image_folder, write_csv(tmp_path / "a.csv", lines, "\ufeffwho,class,path"))
    assert source.classes == [str(number) for number in range(12)]
    assert [label for _, label in source.samples] == [number % 12 for number in range(18)]
    assert count_images(source) == [2] * 6 + [1] * 6


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["train/ant/0.png,a", "train/ant/9.png,b"], ":3: train/ant/9.png: no such file below "),
        (["train/ant/0.png,a", "train/ant/0.png,b"], ":3: train/ant/0.png is named a second time"),
        (["train/ant/0.png,"], ":2: has 0 classes instead of one"),
        (["train/ant/0.png"], ":2: has other fields than the header"),
        (["train/ant/0.png,a,b"], ":2: has other fields than the header"),
        (["/train/ant/0.png,a"], ":2: the path '/train/ant/0.png' does not lie below"),
        ([",a"], ":2: the path '' does not lie below"),
        (["train/ant/0.png,a", "train/../../data.png,b"], ":3: the path 'train/../../data.png' does not lie below"),
        (["train/ant/0.png,a", "./train//ant/0.png,b"], ":3: ./train//ant/0.png is named a second time"),
        (['"train/ant/0.png,a'], ": cannot be read: "),
        (["train/ant/0.png,a", "train/ant/1.png,a"], ": has 2 images of 1 classes; a classifier needs two"),
        ([], ": has 0 images of 0 classes"),
    ],
)
def test_mistakes_are_one_line_with_their_place(image_folder, tmp_path, lines, message):
    file = write_csv(tmp_path / "a.csv", lines)
    assert message_of(LabelFileSource, image_folder, file).startswith(f"{file}{message}")


def test_numbers_of_one_value_have_one_order(image_folder, tmp_path):
    """In a set, the order of names is another one in every process."""
    lines = lines_of(image_folder, "train")
    names = ["1", "01", "001", "0001", "00001", "000001", "2"]
    file = write_csv(tmp_path / "a.csv", [f"{line.split(',')[0]},{name}" for line, name in zip(lines, names)])
    assert LabelFileSource(image_folder, file).classes == sorted(names)
    write_csv(file, [f"{lines[0].split(',')[0]},{'9' * 5000}", f"{lines[1].split(',')[0]},2"])
    assert LabelFileSource(image_folder, file).classes == ["2", "9" * 5000], "too long for int()"


def test_files_that_are_no_label_files_are_one_line(image_folder, tmp_path):
    file = write_csv(tmp_path / "a.csv", [], header="path,class,class")
    assert message_of(LabelFileSource, image_folder, file) == f"{file}: has 2 columns class; keep one of them"
    file = write_csv(tmp_path / "a.csv", [], header="image,label")
    assert message_of(LabelFileSource, image_folder, file).endswith(
        "has no column path and none class; its columns are image, label"
    )
    for name in ("b.csv", "b.parquet"):
        (tmp_path / name).write_bytes(b"\xff\xfe\0PAR")
        assert message_of(LabelFileSource, image_folder, tmp_path / name).startswith(f"{tmp_path / name}: cannot be")
        assert "cannot be read" in message_of(LabelFileSource, image_folder, tmp_path / "nowhere" / name)


def test_combinations_that_cannot_work_are_refused(make_config, image_folder, files):
    assert "leave --zip out" in message_of(make_config, "--zip", "--opts", *files)
    config = make_config("--data-path", image_folder, "--opts", *files[:2])
    assert message_of(open_split, config, "val", 0, 1).endswith("needs DATA.VAL_LABELS too, or DATA.VAL_SHARE 0.1")
    assert message_of(open_split, make_config("--opts", *files), "val", 0, 1).startswith("DATA.DATA_PATH is empty")


def test_a_share_of_a_file_validates(make_config, image_folder, files):
    """Although there is a folder val/: files are used instead of folders."""
    config = make_config("--data-path", image_folder, "--opts", *files[:2], "DATA.VAL_SHARE", "0.3")
    train, val = open_train_and_val(config, 0, 1, print)
    assert (count_images(train), count_images(val)) == ([4] * 3, [2] * 3)
    assert list(open_split(config, "val", 0, 1).samples) == list(val.samples)


def test_a_validation_file_is_used_instead_of_a_share(make_config, image_folder, files):
    notices = []
    config = make_config("--data-path", image_folder, "--opts", *files, "DATA.VAL_SHARE", "0.3")
    train, val = open_train_and_val(config, 0, 1, notices.append)
    assert (count_images(train), count_images(val)) == ([6] * 3, [2] * 3)
    assert notices == ["DATA.VAL_SHARE = 0.3: is not used, the data have a validation set"]


def test_classes_of_an_evaluation(make_config, image_folder, files, tmp_path):
    """The checkpoint's, else those of the training file, whatever part of them the validation file has."""
    few = write_csv(tmp_path / "few.csv", lines_of(image_folder, "val")[2:])
    config = make_config("--data-path", image_folder, "--opts", *files[:2], "DATA.VAL_LABELS", few)
    source = open_for_evaluation(config, [], lambda line: None)
    assert source.classes == ["ant", "bee", "cat"] and count_images(source) == [0, 2, 2]
    source = open_for_evaluation(config, ["cat", "bee", "ant"], lambda line: None)
    assert count_images(source) == [2, 2, 0]


def test_a_run_from_files_has_the_bits_of_one_from_folders(image_folder, files, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    shutil.copytree(image_folder, moved)
    short = ("TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path / "a", *short)) == 0
    assert runs.train_here(monkeypatch, runs.arguments(moved, tmp_path / "b", *short, *files)) == 0
    assert runs.final_state(tmp_path / "a", 1) == runs.final_state(tmp_path / "b", 1)
