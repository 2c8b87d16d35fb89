"""tools.check for data in COCO's format."""

import json
import shutil

import detection_data

from tools import check

CFG = str(detection_data.ROOT / "configs" / "detection" / "digits.yaml")


def run(data, *arguments):
    return check.main(["--cfg", CFG, "--data-path", str(data), "--workers", "1", *arguments])


def test_good_data_are_ready(tmp_path, capsys):
    data = detection_data.make_data(tmp_path / "data", train=4, val=3)
    assert run(data) == 0
    assert "0 errors, 0 warnings: ready" in capsys.readouterr().out


def test_an_image_that_is_listed_twice_is_found(tmp_path, capsys):
    data = detection_data.make_data(tmp_path / "data", train=4, val=3)
    content = json.loads((data / "annotations" / "instances_train.json").read_text())
    content["images"].append({**content["images"][0], "id": 999})
    detection_data.write(data, "train", content)
    assert run(data) == 0
    assert "train/1.png: same content as train/1.png" in capsys.readouterr().out


def test_every_kind_of_fault_is_found(tmp_path, capsys):
    data = detection_data.make_data(tmp_path / "data", train=4, val=3)
    content = json.loads((data / "annotations" / "instances_train.json").read_text())
    first, second, third = content["annotations"][:3]
    first["bbox"], first["area"] = [-9, 0, 20, 20], 0
    second["bbox"] = [1, 1, 0, 4]
    third["image_id"] = 999
    content["categories"].append({"id": 9, "name": "unused"})
    detection_data.write(data, "train", content)
    shutil.copy(data / "train" / "2.png", data / "train" / "3.png")
    content["images"][2] |= {key: content["images"][1][key] for key in ("width", "height")}
    for annotation in content["annotations"]:
        if annotation["image_id"] == 30:
            annotation["segmentation"] = None
    detection_data.write(data, "train", content)
    val = json.loads((data / "annotations" / "instances_val.json").read_text())
    val["categories"][0]["name"] = "stranger"
    val["images"][0] |= {key: content["images"][1][key] for key in ("width", "height")}
    shutil.copy(data / "train" / "2.png", data / "val" / "1.png")
    (data / "val" / "2.png").write_bytes(b"no image")
    detection_data.write(data, "val", val)
    report = tmp_path / "report.json"
    assert run(data, "--json", str(report), "--opts", "MODEL.DETECTOR", "faster_rcnn") == 1
    kinds = {problem["kind"] for problem in json.loads(report.read_text())["problems"]}
    assert {"classes", "image", "outside", "no-extent", "empty-area", "note", "unused-class", "duplicate"} <= kinds
    assert "train-and-val" in kinds
    (data / "annotations" / "instances_val.json").unlink()
    assert run(data) == 1
    text = capsys.readouterr().out
    assert "split that training cannot open" in text and "objects without masks" in text
