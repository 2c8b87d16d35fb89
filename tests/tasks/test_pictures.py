"""`test.py --images` of detectors and segmenters: where results go, and which way up pictures are."""

import json
from pathlib import Path

import detection_data
import pytest
import segmentation_data
import torch
from PIL import Image

import tasks
from tasks import keys_of
from tasks.detection.detectors import build_detector
from tasks.pictures import result_files
from tasks.segmentation.network import Segmenter
from utils.page import with_titles
from utils.session import start_session


def files(pictures, out):
    return [str(file) for (file,) in result_files([Path(picture) for picture in pictures], [".json"], out).values()]


def test_results_of_pictures_of_one_name_do_not_overwrite_each_other():
    assert files(["a/x.jpg", "b/y.jpg"], None) == ["a/x.jpg.json", "b/y.jpg.json"]
    assert files(["a/x.jpg", "b/y.jpg"], "out") == ["out/x.jpg.json", "out/y.jpg.json"]
    assert files(["a/x.jpg", "b/c/../x.jpg", "x.jpg"], "out") == [
        f"out/{path}.json" for path in ("a/x.jpg", "b/x.jpg", "x.jpg")
    ]
    assert files(["/a/b/x.jpg", "/a/c/x.jpg"], "out") == ["out/b/x.jpg.json", "out/c/x.jpg.json"]


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_new_folder_gets_the_results_of_upright_pictures(tmp_path, monkeypatch, task):
    if task == "detection":
        weights = {"model": build_detector(detection_data.tiny_config(), 2).state_dict(), "classes": ["bar", "dot"]}
        arguments, suffix = detection_data.arguments(tmp_path, tmp_path / "runs"), "detections.json"
    else:
        weights = {"model": Segmenter(segmentation_data.small_config(), auxiliary=False).state_dict()}
        arguments = ["--cfg", segmentation_data.CARD, "--output", str(tmp_path), "--opts", *segmentation_data.SMALL]
        suffix = "classes.json"
    torch.save(weights, tmp_path / "a.pth")
    turned = Image.Exif()
    turned[0x0112] = 6
    for folder, exif in (("one", turned), ("two", b"Exif\0\0damaged")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 48), "red").save(tmp_path / folder / "a.jpg", exif=exif)
    shown = [str(tmp_path / "one"), str(tmp_path / "two")]
    arguments += ["--resume", str(tmp_path / "a.pth"), "--images", *shown, "--out", str(tmp_path / "new")]
    monkeypatch.setattr("sys.argv", ["test.py", *arguments])
    tasks.evaluate(start_session("", keys_of))
    drawing = "detections.jpg" if task == "detection" else "mask.png"
    sizes = [Image.open(tmp_path / "new" / folder / f"a.jpg.{drawing}").size for folder in ("one", "two")]
    assert sizes == [(48, 64), (64, 48)]
    assert json.loads((tmp_path / "new" / "one" / f"a.jpg.{suffix}").read_text())["picture"] == f"{shown[0]}/a.jpg"


def test_each_column_of_a_sheet_has_its_title():
    sheet = Image.new("RGB", (180, 60), "grey")
    titled = with_titles(sheet, ["image", "mask", "prediction"])
    above = titled.height - sheet.height
    assert titled.crop((0, above, 180, titled.height)).tobytes() == sheet.tobytes()
    for left in (0, 60, 120):
        darkest, _ = titled.crop((left, 0, left + 60, above)).convert("L").getextrema()
        assert darkest < 100, "nothing is written above this column"
