"""The splits of a data set: where they are, and classes that training and validation share."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from image_data import message_of, png, write_zip, zip_image_folder

from configs import SPLIT_NAMES
from data import fingerprint
from data.sources import FolderSource, ZipSource
from data.splits import one_level_too_many, with_classes, without_images
from tasks.classification.images import open_for_evaluation, open_split, open_validation
from tools.check import main as check


def open_train(make_config, root, *arguments, rank=0, world_size=1):
    return open_split(make_config("--data-path", str(root), *arguments), "train", rank, world_size)


def test_missing_data_path(make_config, tmp_path):
    assert "--data-path" in message_of(open_train, make_config, "")
    message = message_of(open_train, make_config, tmp_path / "nowhere")
    assert "--data-path" in message and str(tmp_path / "nowhere") in message


@pytest.mark.parametrize(
    ("present", "hint"),
    [
        (["train.zip"], "add --zip"),
        (["ILSVRC/Data/CLS-LOC/train/"], "ILSVRC/Data/CLS-LOC"),
        (["training/", "validation/"], "it has training/ for train/: run ln -s training "),
        (["trained/", "validated/"], "found trained, validated"),
        (["notes/", "imagenet/train/"], "imagenet, which has it"),
        (["../train/"], "give --data-path"),
        ([], "has no folder train/"),
    ],
)
def test_missing_split_comes_with_a_hint(make_config, tmp_path, present, hint):
    root = tmp_path / "root"
    root.mkdir()
    for name in present:
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        else:
            (root / name).touch()
    message = message_of(open_train, make_config, root)
    assert "train/" in message and hint in message


def test_imagenet_21k_has_folders_of_its_own(make_config, image_folder):
    opts = ["--opts", "DATA.DATASET", "imagenet_21k"]
    assert "imagenet21k_train" in message_of(open_train, make_config, image_folder, *opts)
    for split in ("train", "val"):
        (image_folder / split).rename(image_folder / f"imagenet21k_{split}")
    config = make_config("--data-path", str(image_folder), *opts)
    train, val = (open_split(config, split, 0, 1) for split in ("train", "val"))
    assert (len(train.samples), len(val.samples)) == (18, 6)
    open_for_evaluation(config, [], print)
    shutil.rmtree(image_folder / "imagenet21k_train" / "cat")
    assert "cat" in message_of(open_for_evaluation, config, [], print)


def test_every_data_set_with_names_for_its_splits_can_be_configured(make_config):
    for name in SPLIT_NAMES:
        make_config("--opts", "DATA.DATASET", name)  # UserError where it is not allowed


def test_imagenet_21k_zipped(make_config, image_folder, tmp_path):
    zip_image_folder(image_folder, tmp_path / "zipped")
    for path in list((tmp_path / "zipped").iterdir()):
        path.rename(path.with_name(f"imagenet21k_{path.name}"))
    opts = ["--zip", "--opts", "DATA.DATASET", "imagenet_21k"]
    assert len(open_train(make_config, tmp_path / "zipped", *opts).samples) == 18


# ----------------------------------------------------------------------------------------------------- names of classes
def test_classes_of_a_zip_file_are_called_by_their_folders(image_folder, tmp_path):
    zip_image_folder(image_folder, tmp_path / "z")
    packed = ZipSource(tmp_path / "z", "train")
    assert packed.classes == FolderSource(image_folder / "train").classes
    assert fingerprint(packed) == fingerprint(FolderSource(image_folder / "train")), "as before"


@pytest.mark.parametrize(
    ("lines", "classes"),
    [
        (["cat/1\t0", "dog/2\t1"], ["cat", "dog"]),
        (["dog/1\t0", "cat/2\t1"], ["dog", "cat"]),
        (["train/cat/a/1\t0", "train/cat/b/2\t0", "train/dog/3\t1"], ["cat", "dog"]),
        (["1\t0", "2\t1"], ["0", "1"]),  # no folders
        (["x/1\t0", "x/2\t1"], ["0", "1"]),  # one folder for all
        (["cat/1\t0", "2\t1"], ["0", "1"]),  # one class lies in none
        (["cat/1\t0", "dog/2\t0", "cow/3\t1"], ["0", "1"]),  # a class of two folders
        (["cat/1\t0", "cat/2\t1", "dog/3\t2"], ["0", "1", "2"]),  # a folder of two classes
    ],
)
def test_names_of_a_zip_file_that_are_not_one_to_one_are_numbers(tmp_path, lines, classes):
    write_zip(tmp_path, "train", {line.split("\t")[0]: png(1) for line in lines}, lines)
    assert ZipSource(tmp_path, "train").classes == classes


# --------------------------------------------------------------------------------------------------- one class is none
@pytest.mark.parametrize("split", ["train", "val"])
def test_one_class_is_an_error_that_names_what_lies_below(make_config, image_folder, split, capsys):
    config = make_config("--data-path", str(image_folder))
    (image_folder / split).rename(image_folder / "moved")
    (image_folder / split).mkdir()
    (image_folder / "moved").rename(image_folder / split / "inner")
    message = message_of(open_split, config, split, 0, 1)
    assert f"{image_folder / split}: has images of one class, inner" in message and "ant, bee, cat" in message
    assert check(["--data-path", str(image_folder), "--workers", "1"]) == 1
    assert message in capsys.readouterr().out


def test_one_class_whose_folder_is_the_data_set(make_config, image_folder):
    (image_folder / "train").rename(image_folder / "inner")
    (image_folder / "train").mkdir()
    (image_folder / "inner").rename(image_folder / "train" / "data")
    (image_folder / "train" / "data" / "train").mkdir()
    shutil.copytree(image_folder / "val", image_folder / "train" / "data" / "val")
    message = message_of(open_split, make_config("--data-path", str(image_folder)), "train", 0, 1)
    assert message.endswith(f"give --data-path {image_folder / 'train' / 'data'}")


def test_one_class_of_a_zip_file(make_config, tmp_path):
    write_zip(tmp_path, "train", {"cat/1": png(1), "dog/2": png(2)}, ["cat/1\t0", "dog/2\t0"])
    message = message_of(open_train, make_config, tmp_path, "--zip")
    assert "class index 0" in message and "cat, dog" in message


def test_folders_of_one_image_each_are_no_level_too_many(image_folder):
    source = FolderSource(image_folder / "train")
    assert one_level_too_many(source) == ""
    for name in ("ant", "bee"):  # one class without
        for below in ("x", "y"):
            (image_folder / "train" / name / below).mkdir()
        for path in list((image_folder / "train" / name).glob("*.png")):
            path.rename(path.parent / "x" / path.name)
    assert one_level_too_many(source) == ""
    for below in ("x", "y"):
        (image_folder / "train" / "cat" / below).mkdir()
    assert one_level_too_many(source) == ""
    for path in list((image_folder / "train" / "cat").glob("*.png")):
        path.rename(path.parent / "x" / path.name)
    assert "folders x, y" in one_level_too_many(source)


# -------------------------------------------------------------------------------- classes of training and of validation
def names_and_labels(source) -> set[tuple[str, str]]:
    return {(Path(path).parent.name, source.classes[label]) for path, label in source.samples}


@pytest.fixture(params=[False, True], ids=["folders", "zip"])
def subset(request, image_folder, tmp_path):
    """Arguments for a data set without validation images of ants, and for one with emus in their place."""
    for name, (old, new) in {"less": ("ant", None), "other": ("ant", "emu")}.items():
        shutil.copytree(image_folder, tmp_path / name)
        shutil.rmtree(tmp_path / name / "val" / old) if new is None else (tmp_path / name / "val" / old).rename(
            tmp_path / name / "val" / new
        )
        if request.param:
            zip_image_folder(tmp_path / name, tmp_path / f"{name}.z")
    suffix, flags = (".z", ["--zip"]) if request.param else ("", [])
    return {name: ["--data-path", str(tmp_path / f"{name}{suffix}"), *flags] for name in ("less", "other")}


def test_a_class_without_validation_images_is_a_warning_that_counts(make_config, subset, capsys):
    config = make_config(*subset["less"])
    lines: list[str] = []
    classes = open_split(config, "train", 0, 1).classes
    source = open_validation(config, classes, 0, 1, lines.append)
    assert source.classes == classes and names_and_labels(source) == {("bee", "bee"), ("cat", "cat")}
    assert len(lines) == 1 and "1 of 3 classes have no validation images (ant)" in lines[0]
    assert check([*subset["less"], "--workers", "1"]) == 0
    assert "1 of 3 classes have no validation images (ant)" in capsys.readouterr().out


def test_an_unknown_class_in_validation_is_an_error(make_config, subset, capsys):
    config = make_config(*subset["other"])
    message = message_of(open_validation, config, ["ant", "bee", "cat"], 0, 1, print)
    assert "only in val: emu; only in train: ant" in message
    assert check([*subset["other"], "--workers", "1"]) == 1
    assert message in capsys.readouterr().out


def test_the_names_of_a_checkpoint_give_the_order_where_training_images_are_absent(make_config, subset):
    config = make_config(*subset["less"])
    for path in Path(config.DATA.DATA_PATH).glob("train*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines: list[str] = []
    source = open_for_evaluation(config, ["cow", "cat", "bee"], lines.append)
    assert source.classes == ["cow", "cat", "bee"] and names_and_labels(source) == {("bee", "bee"), ("cat", "cat")}
    assert "1 of 3 classes have no validation images (cow)" in lines[0]


def test_names_that_a_checkpoint_does_not_have_keep_their_places(make_config, image_folder):
    """Folders may have been renamed: `load_weights` says so."""
    shutil.rmtree(image_folder / "train")
    config = make_config("--data-path", str(image_folder))
    for trained_on in ([], ["0", "1", "2"], ["x", "y", "z"]):
        assert open_for_evaluation(config, trained_on, print).classes == ["ant", "bee", "cat"]


def test_an_empty_class_folder_of_validation(make_config, image_folder):
    shutil.rmtree(image_folder / "val" / "bee")
    (image_folder / "val" / "bee").mkdir()
    source = open_validation(make_config("--data-path", str(image_folder)), ["ant", "bee", "cat"], 0, 1, print)
    assert np.unique([label for _, label in source.samples]).tolist() == [0, 2]


def test_maps_without_names_keep_their_indices(tmp_path):
    write_zip(tmp_path, "val", {"1": png(1), "2": png(2)}, ["1\t0", "2\t3"])
    source = with_classes(ZipSource(tmp_path, "val", gaps=True), ["a", "b", "c", "d", "e"])
    assert source.samples == [("1", 0), ("2", 3)] and source.classes == ["a", "b", "c", "d", "e"]
    assert "3 of 5 classes have no validation images (b, c, e)" in without_images(source)
    assert "class index 3" in message_of(with_classes, ZipSource(tmp_path, "val", gaps=True), ["a", "b"])


def test_many_unknown_classes_are_cut_short(tmp_path):
    for number in range(1000):
        (tmp_path / f"n{number:04d}").mkdir()
    (tmp_path / "n0000" / "1.png").write_bytes(png(1))
    message = message_of(with_classes, FolderSource(tmp_path, gaps=True), ["a"], "D")
    assert "n0004 and 995 more" in message and len(message) < 200
