"""`tasks.load_model`: a network of each task with its classes, which computes what test.py does of a picture."""

import json

import detection_data
import numpy as np
import pytest
import runs
import segmentation_data
import torch
import yaml
from image_data import message_of
from PIL import Image

import tasks
from configs.load import to_dict
from tasks.detection.detectors import build_detector
from tasks.segmentation.network import Segmenter
from tools.convert import convert
from utils.session import start_session


def write_checkpoint(path, network, config, classes, **more):
    """What the engine saves, of a network that has learned nothing."""
    content = {"model": network.state_dict(), "config": yaml.safe_dump(to_dict(config)), "classes": list(classes)}
    torch.save(content | more, path)
    return path


@pytest.fixture(params=["RGB", "16 bits", "turned"])
def picture(tmp_path, request):
    path = tmp_path / "picture.png"
    noise = Image.effect_noise((61, 47), 90)
    turned = Image.Exif()
    turned[0x0112] = 6
    if request.param == "16 bits":
        Image.fromarray(np.asarray(noise).astype(np.uint16) * 257).save(path)
    else:
        noise.convert("RGB").save(path, **({"exif": turned} if request.param == "turned" else {}))
    return path


def what_test_py_says(monkeypatch, tmp_path, checkpoint, picture):
    report = tmp_path / "report.json"
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        words = ("--resume", str(checkpoint), "--images", str(picture), "--json", str(report))
        patch.setattr("sys.argv", ["test.py", *words, "--output", str(tmp_path / "out")])
        tasks.evaluate(start_session("", tasks.keys_of))
    return json.loads(report.read_text())["pictures"][0]


def test_a_classifier(data, tmp_path, monkeypatch, picture):
    arguments = runs.arguments(data, tmp_path, "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    assert runs.train_here(monkeypatch, arguments) == 0
    checkpoint = runs.run_folder(tmp_path) / "ckpt_best.pth"
    convert(checkpoint, "hub", tmp_path / "hub")
    reported = what_test_py_says(monkeypatch, tmp_path, checkpoint, picture)
    for path in (checkpoint, tmp_path / "hub"):
        network, classes, predict, config = tasks.load_model(path)
        assert classes == ["ant", "bee", "cat"] and not network.training and config.DATA.IMG_SIZE == 32
        probabilities = predict(Image.open(picture))
        best = reported["top"][0]
        assert best["class"] == probabilities.argmax()
        assert best["probability"] == pytest.approx(probabilities.max().item(), abs=1e-6)


@pytest.mark.parametrize("detector", ["mask_rcnn", "retinanet"])
def test_a_detector(tmp_path, monkeypatch, picture, detector):
    config = detection_data.config_of("--opts", *detection_data.TINY, "MODEL.DETECTOR", detector)
    torch.manual_seed(0)
    network = build_detector(config, 2)
    if detector == "retinanet":  # its fresh classifier is sure of nothing
        torch.nn.init.zeros_(network.head.classification_head.cls_logits.bias)
    path = write_checkpoint(tmp_path / "ckpt.pth", network, config, ["bar", "dot"], category_ids=[2, 7])
    loaded = tasks.load_model(path)
    assert loaded.classes == ["bar", "dot"] and not loaded.network.training
    found = loaded.predict(Image.open(picture))
    reported = what_test_py_says(monkeypatch, tmp_path, path, picture)["detections"]
    assert len(found.boxes) == len(reported) > 0
    assert [loaded.classes[label] for label in found.labels] == [entry["name"] for entry in reported]
    assert [round(score, 6) for score in found.scores.double().tolist()] == [entry["score"] for entry in reported]
    assert (found.masks is None) == (detector == "retinanet")


def test_a_segmenter(tmp_path, monkeypatch, picture):
    config = segmentation_data.small_config()
    torch.manual_seed(0)
    names = [f"c{i}" for i in range(config.MODEL.GMA.NUM_CLASSES)]
    path = write_checkpoint(tmp_path / "ckpt.pth", Segmenter(config), config, names)
    loaded = tasks.load_model(path)
    classes = loaded.predict(Image.open(picture))
    shape = (61, 47) if "exif" in Image.open(picture).info else (47, 61)
    assert classes.shape == shape and classes.dtype == torch.int64 and loaded.classes == names
    reported = what_test_py_says(monkeypatch, tmp_path, path, picture)["classes"]
    shares = {entry["class"]: entry["share"] for entry in reported}
    counted = classes.flatten().bincount().double() / classes.numel()
    assert shares == pytest.approx({i: share for i, share in enumerate(counted.tolist()) if share}, rel=1e-5)


def test_weights_without_a_configuration_are_refused(tmp_path):
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "bare.pth")
    assert "holds no configuration of its network" in message_of(tasks.load_model, tmp_path / "bare.pth")
    assert "must be one of best, raw, ema" in message_of(tasks.load_model, tmp_path / "bare.pth", "newest")
