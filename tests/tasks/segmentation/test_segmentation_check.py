"""What tools.check says about a segmentation data set."""

import shutil

import numpy as np
import pytest
from PIL import Image
from segmentation_data import CLASSES, small_config, write_folder

from tasks.segmentation.check import ERROR, KINDS, check


def found(root, *opts) -> list[tuple[str, str, str]]:
    return [tuple(problem) for problem in check(small_config("DATA.DATA_PATH", str(root), *opts))]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


def test_nothing_is_wrong_with_a_good_data_set(folder):
    assert found(folder) == []


def test_every_kind_of_problem_is_found(folder):
    train_masks, val_masks = (folder / "annotations" / split for split in ("training", "validation"))
    Image.fromarray(np.full((48, 64), 9, np.uint8)).save(train_masks / "000.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(train_masks / "001.png")
    (folder / "images" / "training" / "002.png").write_bytes(b"damaged")
    Image.fromarray(np.full((48, 64), 255, np.uint8)).save(train_masks / "003.png")
    shutil.copy(train_masks / "004.png", train_masks / "alone.png")
    shutil.copy(folder / "images/training/005.png", folder / "images/training/copy.png")
    shutil.copy(train_masks / "005.png", train_masks / "copy.png")
    shutil.copy(folder / "images/training/005.png", folder / "images/validation/seen.png")
    shutil.copy(train_masks / "005.png", val_masks / "seen.png")
    (folder / "classes.txt").write_text("\n".join([*CLASSES, "ghost"]))
    problems = found(folder)
    assert [(kind, path) for kind, path, _ in problems] == [
        ("sample", "images/training/000.png"),
        ("sample", "images/training/001.png"),
        ("sample", "images/training/002.png"),
        ("train-and-val", "images/validation/seen.png"),
        ("classes", "train"),
        ("classes", "val"),
        ("duplicate", "images/training/copy.png"),
        ("nothing-counts", "annotations/training/003.png"),
        ("unused-mask", "annotations/training/alone.png"),
    ]
    reasons = [reason for *_, reason in problems]
    assert "the value 9 is no class" in reasons[0] and "is 5 x 5 pixels" in reasons[1]
    assert reasons[3] == "same content as images/training/005.png" and reasons[4] == "no pixel of 'ghost'"


def test_one_folder_for_both_splits_is_found(folder):
    keys = [f"DATA.{split}_{what}" for split in ("TRAIN", "VAL") for what in ("IMAGES", "MASKS")]
    folders = ["images/training", "annotations/training"] * 2
    problems = found(folder, *(word for pair in zip(keys, folders) for word in pair))
    assert [kind for kind, *_ in problems] == ["train-and-val"] * 6


def test_a_split_that_cannot_be_opened_is_a_problem(folder):
    shutil.rmtree(folder / "annotations" / "validation")
    (problem,) = found(folder)
    assert problem[:2] == ("split", "val") and KINDS["split"][0] == ERROR
