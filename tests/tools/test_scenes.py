"""Scenes of digits: what the two data sets say of them agrees, and nothing of validation is trained on."""

import numpy as np
import pytest
from detection_data import config_of
from PIL import Image
from segmentation_data import small_config

from tasks.detection.check import check as check_detection
from tasks.detection.coco import encode_mask, open_split
from tasks.detection.coco import run_length as coco
from tasks.segmentation.check import check as check_segmentation
from tools.scenes import main, write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    assert write_scenes(folder, {"train": 12, "val": 4})
    return folder


def test_boxes_masks_and_class_maps_agree(scenes):
    split = open_split(config_of("--data-path", scenes / "detection"), "train")
    assert len(split) == 12 and list(split.categories.values()) == list("0123456789")
    for index, image in enumerate(split.images):
        class_map = np.array(Image.open(scenes / "segmentation" / "annotations" / "training" / image.file_name))
        for entry in split.objects(index):
            encoded = encode_mask(entry["segmentation"], image.height, image.width)
            mask = coco.decode(encoded).astype(bool)
            assert coco.toBbox(encoded).tolist() == entry["bbox"] and mask.sum() == entry["area"] > 0
            assert (class_map[mask] == entry["category_id"]).all()  # no digit hides another
            class_map[mask] = 0
        assert not class_map.any()


def test_training_finds_nothing_wrong_with_them(scenes):
    config = config_of("--data-path", scenes / "detection", "--opts", "DATA.NUM_WORKERS", "0")
    assert {problem.kind for problem in check_detection(config)} <= {"unused-class"}
    config = small_config(flags=("--data-path", str(scenes / "segmentation")))
    assert {problem.kind for problem in check_segmentation(config)} <= {"classes"}


def test_they_are_the_same_each_time_and_written_once(scenes, tmp_path, capsys):
    write_scenes(tmp_path / "again", {"train": 12, "val": 4})
    for path in scenes.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(scenes)).read_bytes()
    assert main(["--output", str(scenes)]) == 0
    assert "already there" in capsys.readouterr().out
