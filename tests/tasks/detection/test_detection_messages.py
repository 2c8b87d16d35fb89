"""Every mistake in the data or settings is one line that says what to do."""

import copy
import json
from types import SimpleNamespace

import detection_data
import pytest
import torch
from image_data import message_of
from PIL import Image

from tasks.backbone import check_frozen_norms
from tasks.detection.coco import check_masks, match_classes, open_split, read_json
from tasks.detection.images import TrainImages
from tasks.detection.task import check_settings, open_checked

MASK = {"size": [40, 40], "counts": [1600]}
# what is wrong in the first annotation, or in the list that is named -> words of the message
WRONG = [
    ("annotations", {"bbox": [1, 2, 3]}, "annotation 1: bbox [1, 2, 3] must be four numbers"),
    ("annotations", {"bbox": [1, 2, float("nan"), 3]}, "four numbers"),
    ("annotations", {"bbox": None, "segmentation": None}, "bbox None"),
    ("annotations", {"category_id": 3}, "annotation 1: category_id 3 is not among the categories"),
    ("annotations", {"category_id": [3]}, "category_id [3] is not among the categories"),
    ("annotations", {"iscrowd": "no"}, "iscrowd 'no' must be 0 or 1"),
    ("annotations", {"id": 2}, "id 2 is there twice"),
    ("annotations", {"id": "a"}, "annotations[0]: id 'a' must be a whole number"),
    ("annotations", {"area": "large"}, "area 'large' must be a number"),
    ("annotations", {"segmentation": [[1, 2, 3]]}, "a polygon must be a list of numbers"),
    ("annotations", {"segmentation": "mask"}, "segmentation must be a list of polygons, or run lengths"),
    ("annotations", {"segmentation": {"size": [1, 1], "counts": [1]}}, "run lengths of size [1, 1], its image has"),
    ("annotations", {"segmentation": {"counts": "zz"}}, "run lengths of size None"),
    ("images", {"id": 20}, "images[1]: id 20 is there twice"),
    ("images", {"file_name": 7}, "image 10: needs a file_name"),
    ("images", {"width": 0}, "width 0 and height"),
    ("images", {"file_name": "absent.png"}, "its first image, absent.png, is not in"),
    ("categories", {"name": None}, "category 7: needs a name"),
]


@pytest.fixture
def content(tmp_path):
    return detection_data.make_split(tmp_path, "train", 3)


def read(tmp_path, content):
    return read_json(detection_data.write(tmp_path, "train", content), [tmp_path / "train"])


@pytest.mark.parametrize(("where", "change", "words"), WRONG)
def test_a_wrong_entry_is_named(tmp_path, content, where, change, words):
    content[where][0] |= change
    message = message_of(read, tmp_path, content)
    assert words in message and "instances_train.json" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
        ("{}", "has no list of images"),
        ('{"images": []}', "has no images"),
        ('{"images": [3]}', "images[0]: must be an object"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_file_that_is_no_coco_json_is_one_line(tmp_path, text, words):
    assert words in message_of(read, tmp_path, text)


def test_damaged_run_lengths_are_one_line(tmp_path, content):
    size = [content["images"][0]["height"], content["images"][0]["width"]]
    for counts, words in (([3], "do not fill the image"), ("\x01\x02", "damaged run lengths"), (None, "need counts")):
        content["annotations"][0]["segmentation"] = {"size": size, "counts": counts}
        assert words in message_of(read, tmp_path, content)
    content["annotations"][0]["segmentation"] = {"size": size, "counts": "zz"}  # too few: found when it is decoded
    images = TrainImages(read(tmp_path, content), {2: 1, 7: 2}, lambda *sample: sample, with_masks=True)
    assert "damaged mask" in message_of(images.check, 0)


def test_what_is_left_out_is_noted(tmp_path, content):
    content["annotations"][0] |= {"image_id": 5}
    content["annotations"][1] |= {"id": 0}
    notes = read(tmp_path, content).notes
    assert "id 0: COCO's evaluators never count it" in notes[0]
    assert "1 annotations of images that it does not list" in notes[1]


def test_masks_are_needed_by_mask_rcnn_alone(tmp_path, content):
    del content["annotations"][1]["segmentation"]
    split = read(tmp_path, content)
    message = message_of(check_masks, split, "mask_rcnn")
    assert "1 of 6 objects have no mask (the first is annotation 2)" in message and "faster_rcnn" in message
    check_masks(split, "faster_rcnn")


def test_classes_go_by_name_and_an_unknown_one_is_refused(tmp_path, content):
    split = read(tmp_path, content)
    assert match_classes(split, ["bar", "dot"]) == {2: 0, 7: 1}
    assert match_classes(split, ["dot", "more", "bar"]) == {2: 2, 7: 0}
    assert "3 objects are of category 'dot', which is none of the 1 classes" in message_of(
        match_classes, split, ["bar"]
    )
    content["categories"].append({"id": 9, "name": "unused"})
    assert match_classes(read(tmp_path, content), ["bar", "dot"]) == {2: 0, 7: 1}
    content["categories"][2]["name"] = "dot"
    assert list(read(tmp_path, content).categories.values()) == ["bar", "dot (7)", "dot (9)"]


LAYOUTS = [
    ("annotations/instances_train2017.json", "train2017"),
    ("annotations/instances_train.json", "train"),
    ("instances_train.json", "train"),
    ("train.json", "images"),
    ("train/_annotations.coco.json", "train"),
    ("annotations/train.json", "."),
]


@pytest.mark.parametrize(("json_name", "folder"), LAYOUTS)
def test_layouts_are_found(tmp_path, content, json_name, folder):
    root = tmp_path / "other"
    (root / folder).mkdir(parents=True)
    for path in (tmp_path / "train").iterdir():
        path.rename(root / folder / path.name)
    (root / json_name).parent.mkdir(exist_ok=True)
    (root / json_name).write_text(json.dumps(content))
    split = open_split(detection_data.config_of("--data-path", root), "train")
    assert split.file(0) == root / folder / "1.png" and split.file(0).is_file()


def test_any_file_and_folder_can_be_named(tmp_path, content):
    (tmp_path / "my.json").write_text(json.dumps(content))
    (tmp_path / "train").rename(tmp_path / "mine")
    named = ["--data-path", tmp_path, "--opts", "DATA.TRAIN_JSON", "my.json"]
    assert "name the images' folder with DATA.TRAIN_IMAGES" in message_of(
        open_split, detection_data.config_of(*named), "train"
    )
    assert len(open_split(detection_data.config_of(*named, "DATA.TRAIN_IMAGES", "mine"), "train")) == 3


def test_missing_data_is_named(tmp_path):
    assert "--data-path" in message_of(open_split, detection_data.config_of(), "train")
    config = detection_data.config_of("--data-path", tmp_path)
    assert "name the file with DATA.VAL_JSON" in message_of(open_split, config, "val")
    gone = detection_data.config_of("--data-path", tmp_path / "gone")
    assert "no such folder" in message_of(open_split, gone, "val")


def test_a_split_without_objects_is_refused(tmp_path, content):
    detection_data.write(tmp_path, "train", content | {"annotations": []})
    session = SimpleNamespace(config=detection_data.config_of("--data-path", tmp_path))
    assert "there is nothing to find" in message_of(open_checked, session, "train")


def test_an_image_of_another_size_is_named_unless_exif_turns_it(tmp_path, content):
    shape = content["images"][0]
    shape["width"], shape["height"] = shape["height"], shape["width"]
    for annotation in content["annotations"]:
        annotation.pop("segmentation")
    images = TrainImages(read(tmp_path, content), {2: 1, 7: 2}, lambda *sample: sample, with_masks=False)
    assert f"says {shape['width']} x {shape['height']}" in message_of(images.check, 0)
    path = tmp_path / "train" / "1.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    assert images[0][0].shape == (3, shape["height"], shape["width"])


def test_an_image_that_exif_turns_upside_down_is_upright_as_programs_show_it(tmp_path, content):
    images = TrainImages(read(tmp_path, content), {2: 1, 7: 2}, lambda *sample: sample, with_masks=False)
    before = images[0][0]
    path = tmp_path / "train" / "1.png"
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path, exif=exif)
    assert torch.equal(images[0][0], before)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("COMPILE", "True"), "COMPILE: detectors are not compiled"),
        (("TEST.FUSE", "True"), "TEST.FUSE: detectors are not fused"),
        (("DATA.ZIP_MODE", "True"), "DATA.ZIP_MODE: detection reads folders"),
    ],
)
def test_settings_that_detection_cannot_follow(opts, words):
    assert words in message_of(check_settings, detection_data.tiny_config(*opts))


def test_fresh_batch_norms_are_not_frozen():
    assert "--pretrained" in message_of(check_frozen_norms, detection_data.tiny_config("MODEL.BATCH_NORM", "frozen"))


def test_crop_sizes_are_a_pair():
    message = message_of(detection_data.tiny_config, "DATA.CROP", "[600, 384]")
    assert "DATA.CROP = [600, 384]: must be [] or two sizes" in message
    assert "one per level" in message_of(detection_data.tiny_config, "MODEL.ANCHOR_SIZES", "[32, 64]")


def test_content_is_not_changed_by_reading(tmp_path, content):
    before = copy.deepcopy(content)
    read(tmp_path, content)
    assert content == before
