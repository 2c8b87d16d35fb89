"""`python -m tools.export` of detectors and segmenters, and what is refused because ONNX or torch cannot do it."""

import detection_data
import pytest
import segmentation_data
import torch
import yaml

from configs.load import to_dict
from tasks.detection.detectors import build_detector
from tasks.segmentation.network import Segmenter
from tools.export import main


def write(path, network, config, classes):
    content = {"model": network.state_dict(), "config": yaml.safe_dump(to_dict(config)), "classes": classes}
    torch.save(content, path)
    return path


def segmenter(path, head):
    torch.manual_seed(0)
    config = segmentation_data.small_config("MODEL.HEAD", head)
    network = Segmenter(config, auxiliary=False).eval()
    return write(path, network, config, [str(i) for i in range(config.MODEL.GMA.NUM_CLASSES)]), network


def detector(path, kind="faster_rcnn"):
    torch.manual_seed(0)
    network = build_detector(tiny_detector(kind), 2).eval()
    return write(path, network, tiny_detector(kind), ["bar", "dot"]), network


def tiny_detector(kind):
    return detection_data.config_of("--opts", *detection_data.TINY, "MODEL.DETECTOR", kind)


@pytest.mark.compile
@pytest.mark.parametrize(("head", "form"), [("semantic_fpn", "onnx"), ("upernet", "pt2")])
def test_a_segmenter_of_any_size(head, form, tmp_path):
    path, network = segmenter(tmp_path / "ckpt.pth", head)
    out = tmp_path / f"network.{form}"
    assert main(["--resume", str(path), "--format", form, "--img-size", "64", "--output", str(out)]) == 0
    images = torch.randn(2, 3, 70, 101)
    if form == "pt2":
        logits = torch.export.load(out).module()(images)
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(str(out), providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    torch.testing.assert_close(logits, network(images).detach(), rtol=0, atol=1e-4)


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["mask_rcnn", "retinanet"])
def test_a_detector_of_one_image_finds_the_same_objects(kind, tmp_path):
    """Also in images that it was not exported with."""
    runtime = pytest.importorskip("onnxruntime")
    path, network = detector(tmp_path / "ckpt.pth", kind)
    if kind == "retinanet":  # fresh, all its scores are nearly the same, and their order is chance
        for layer in network.head.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
        torch.nn.init.zeros_(network.head.classification_head.cls_logits.bias)
        write(path, network, tiny_detector(kind), ["bar", "dot"])
    out = tmp_path / "detector.onnx"
    assert main(["--resume", str(path), "--format", "onnx", "--img-size", "96", "--output", str(out)]) == 0
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for scale in (0.5, 3.0):
        image = scale * torch.randn(3, 96, 96)
        with torch.no_grad():
            (found,) = network([image])
        names = [output.name for output in session.get_outputs()]
        got = dict(zip(names, map(torch.from_numpy, session.run(None, {"images": image[None].numpy()}))))
        assert set(got) == set(found) and len(found["boxes"])
        torch.testing.assert_close(got["boxes"], found["boxes"], rtol=0, atol=1e-2)
        assert torch.equal(got["labels"], found["labels"] - network.first_label)


def test_what_cannot_be_exported_is_one_line(tmp_path, capsys):
    boxes, _ = detector(tmp_path / "boxes.pth")
    upernet, _ = segmenter(tmp_path / "upernet.pth", "upernet")
    for words, expected in (
        ([boxes, "--format", "pt2"], "torch.export does not take torchvision's detectors"),
        ([upernet, "--format", "onnx"], "use --format pt2"),
        ([upernet, "--format", "pt2", "--features"], "only its whole network is exported"),
    ):
        assert main(["--resume", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and expected in error
