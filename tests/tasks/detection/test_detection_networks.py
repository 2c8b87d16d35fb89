"""Parameters and FLOPs of the table, with ResNet-50 as its anchor; weights in, and what test.py shows without data."""

import json

import detection_data
import pytest
import torch
import yaml
from image_data import message_of
from PIL import Image
from ranks import run_ranks
from torchvision.models import detection

from configs import with_values
from tasks.detection.detectors import build_detector
from tasks.detection.inference import detect
from tasks.detection.measurement import count_flops, flops_by_part
from tasks.detection.pictures import count_mistakes, draw
from tasks.detection.weights import load_detector, load_pretrained
from tasks.networks import build_model
from utils.precision import Precision
from utils.schedule import scaled_learning_rates

FLOAT32 = Precision("cpu", torch.float32, enabled=False)
# detector and variant -> millions of parameters and GFLOPs, as printed
SIZES = {
    ("mask_rcnn", "miny"): (25.6, 196.5),
    ("mask_rcnn", "tiny"): (30.8, 245.5),
    ("mask_rcnn", "small"): (42.2, 275.2),
    ("mask_rcnn", "base"): (65.6, 528.4),
    ("retinanet", "miny"): (14.9, 178.1),
    ("retinanet", "tiny"): (20.2, 226.5),
    ("retinanet", "small"): (31.9, 256.2),
    ("retinanet", "base"): (55.5, 507.6),
    ("faster_rcnn", "miny"): (23.0, 143.5),
    ("faster_rcnn", "tiny"): (28.1, 192.5),
    ("faster_rcnn", "small"): (39.6, 222.2),
    ("faster_rcnn", "base"): (62.9, 475.4),
}


@pytest.mark.launch
@pytest.mark.parametrize(("name", "variant"), SIZES)
def test_parameters_and_flops_at_800_x_1280(name, variant):
    path = detection_data.ROOT / "configs" / "detection" / f"{name}_groupmixformer_{variant}_1x.yaml"
    config = detection_data.config_of("--cfg", path)
    parts, parameters = count_flops(config)
    expected = SIZES[name, variant]
    assert (round(parameters / 1e6, 1), round(sum(parts.values()) / 1e9, 1)) == expected
    assert f"{expected[0]} M parameters, {expected[1]} GFLOPs" in path.read_text()


def test_the_count_gives_resnet_50_its_published_size():
    with torch.device("meta"):
        network = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=81).eval()
    parts = flops_by_part(network)
    assert round(sum(parts.values()) / 1e9, 1) == 259.3
    assert round((parts["backbone"] + parts["pyramid"]) / 1e9, 1) == 141.4
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == 44.4


@pytest.mark.launch
def test_the_count_gives_swin_t_its_published_size():
    """Swin-T's blocks give channels last; a norm on every map, as in its own detectors."""
    import timm
    from torch import nn
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    class SwinPyramid(nn.Module):
        out_channels = 256

        def __init__(self):
            super().__init__()
            options = dict(features_only=True, img_size=(800, 1280), strict_img_size=False)
            self.body = timm.create_model("swin_tiny_patch4_window7_224", **options)
            channels = self.body.feature_info.channels()
            self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in channels)
            self.fpn = FeaturePyramidNetwork(channels, 256, LastLevelMaxPool())

        def maps(self, images):
            return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, self.body(images))]

    network = detection.MaskRCNN(SwinPyramid(), 81).to("meta").eval()
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == 47.8
    assert sum(flops_by_part(network).values()) / 1e9 == pytest.approx(266.6, abs=0.1)


def save(network, path, **more):
    torch.save({"model": network.state_dict(), **more}, path)
    return str(path)


def test_a_classifier_becomes_the_backbone_and_a_detector_all_but_its_classes(tmp_path):
    config = detection_data.tiny_config()
    classifier = build_model(config)
    network = build_detector(config, 2)
    loaded = load_pretrained(network, save(classifier, tmp_path / "classifier.pth"))
    assert "for the backbone" in loaded
    assert torch.equal(network.backbone.maps.body.conv_stem.proj1.weight, classifier.conv_stem.proj1.weight)

    other = build_detector(config, 5)
    loaded = load_pretrained(other, save(network, tmp_path / "detector.pth"))
    assert "layers' weights are fresh (roi_heads.box_predictor.cls_score.weight" in loaded
    assert torch.equal(other.roi_heads.box_head.fc6.weight, network.roi_heads.box_head.fc6.weight)
    boxes = build_detector(detection_data.tiny_config("MODEL.DETECTOR", "faster_rcnn"), 2)
    load_pretrained(boxes, str(tmp_path / "detector.pth"))  # masks are left out
    assert "fresh" in load_pretrained(other, save(boxes, tmp_path / "boxes.pth"))  # and here are fresh
    wide = build_detector(detection_data.tiny_config("MODEL.PYRAMID_CHANNELS", "16"), 2)
    assert "of another shape" in message_of(load_pretrained, wide, str(tmp_path / "detector.pth"))


def test_classes_come_from_the_checkpoint(tmp_path):
    config = detection_data.tiny_config()
    path = save(build_detector(config, 2), tmp_path / "a.pth", classes=["bar", "dot"], category_ids=[2, 7])
    network, known, _ = load_detector(config, path, None)
    assert known == {"classes": ["bar", "dot"], "category_ids": [2, 7]}
    assert network.roi_heads.box_predictor.cls_score.out_features == 3
    bare = save(build_detector(config, 2), tmp_path / "bare.pth")
    assert "--data-path" in message_of(load_detector, config, bare, None)


@pytest.mark.parametrize("name", ["mask_rcnn", "retinanet"])
def test_detections_are_at_the_size_of_the_image(name):
    torch.manual_seed(0)
    network = build_detector(detection_data.tiny_config("MODEL.DETECTOR", name), 2).eval()
    if name == "mask_rcnn":
        network.roi_heads.score_thresh = 0.0
    else:
        network.score_thresh = 0.0
    image = torch.randint(0, 256, (3, 33, 75), dtype=torch.uint8)
    found = detect(network, image, (99, 150), FLOAT32)
    assert len(found.boxes) > 5 and set(found.labels.tolist()) <= {0, 1}
    assert found.boxes[:, 2].max() <= 150 and found.boxes[:, 3].max() <= 99 and found.boxes.max() > 100
    if name == "mask_rcnn":
        assert all(mask["size"] == [99, 150] for mask in found.masks)
        network.roi_heads.score_thresh = 1.0
        assert detect(network, image, (99, 150), FLOAT32).masks == []
    else:
        assert found.masks is None


def test_mistakes_are_counted_as_coco_counts_them():
    truth = [{"bbox": [0, 0, 10, 10], "category_id": 1, "iscrowd": 0}, {"bbox": [50, 0, 40, 40], "category_id": 1}]
    truth[1]["iscrowd"] = 1
    hit = {"bbox": [1, 0, 10, 10], "category_id": 1, "score": 0.9}
    within_crowd = {"bbox": [60, 5, 10, 10], "category_id": 1, "score": 0.8}
    assert count_mistakes(truth, [hit, within_crowd], 0.5) == 0
    assert count_mistakes(truth, [], 0.5) == 1
    assert count_mistakes(truth, [hit, hit], 0.5) == 1
    assert count_mistakes(truth, [{**hit, "category_id": 2}], 0.5) == 2
    assert count_mistakes([], [hit, {**hit, "score": 0.1}], 0.5) == 1


def test_drawing_changes_boxes_and_masks_alone():
    image = Image.new("RGB", (80, 60), "white")
    mask = {"size": [60, 80], "counts": [10 * 60 + 20, 20, 4160]}
    from tasks.detection.coco import encode_mask

    objects = [{"bbox": [40, 20, 30, 30], "category_id": 3, "score": 0.5, "segmentation": encode_mask(mask, 60, 80)}]
    drawn = draw(image, objects, {3: "a name"})
    assert drawn.getpixel((10, 30)) != (255, 255, 255)  # the mask
    assert drawn.getpixel((40, 40)) == (230, 25, 75)  # the box
    # A class has its colour wherever it comes, so that annotations and detections can be compared.
    other = draw(image, [{"bbox": [2, 20, 9, 30], "category_id": 5}, *objects], {3: "a name", 5: "other"})
    assert other.getpixel((40, 40)) == (230, 25, 75) != other.getpixel((2, 40))
    assert draw(image, [{"bbox": [40, 20, -30, 30], "category_id": 3}], {3: "a name"}).size == image.size
    assert drawn.getpixel((5, 55)) == image.getpixel((5, 55)) == (255, 255, 255)


@pytest.mark.launch
def test_pictures_flops_and_speed_without_data(tmp_path):
    config = detection_data.tiny_config()
    weights = save(build_detector(config, 2), tmp_path / "a.pth", classes=["bar", "dot"], category_ids=[2, 7])
    (tmp_path / "shown").mkdir()
    Image.new("RGB", (64, 48), "red").save(tmp_path / "shown" / "a.png")
    (tmp_path / "shown" / "b.png").write_bytes(b"no picture")
    args = [*detection_data.arguments(tmp_path, tmp_path / "out"), "--resume", weights]
    ended = run_ranks("test.py", [*args, "--images", str(tmp_path / "shown")])
    assert ended.returncode == 1 and "b.png: cannot be read as an image" in ended.stdout
    written = json.loads((tmp_path / "shown" / "a.png.detections.json").read_text())
    assert {"picture", "width", "height", "detections", "weights"} <= set(written)
    assert Image.open(tmp_path / "shown" / "a.png.detections.jpg").size == (64, 48)
    ended = run_ranks("test.py", [*args, "--flops", "--json", str(tmp_path / "flops.json")])
    assert "80 classes, 1000 proposals, 100 masks" in ended.stdout
    assert json.loads((tmp_path / "flops.json").read_text())["height"] == 800
    ended = run_ranks("test.py", [*args, "--throughput", "--opts", "DATA.BATCH_SIZE", "1"])
    assert ended.returncode == 0 and "800 x 1280, float32: throughput" in ended.stdout


def test_every_card_is_a_recipe_that_reads():
    cards = sorted((detection_data.ROOT / "configs" / "detection").glob("*_groupmixformer_*.yaml"))
    assert len(cards) == 16
    for path in cards:
        content = yaml.safe_load(path.read_text())
        assert content["MODEL"]["NAME"] == path.stem and f"--cfg configs/detection/{path.name}" in path.read_text()
        config = detection_data.config_of("--cfg", path)
        long = path.stem.endswith("3x")
        updates = 270_000 if long else 90_000
        assert updates == config.TRAIN.UPDATES
        assert config.TRAIN.WARMUP_UPDATES == 1000
        assert list(config.DATA.CROP) == ([384, 600] if long else [])
        assert (config.TRAIN.REFERENCE_BATCH, config.TRAIN.BASE_LR, config.TRAIN.CLIP_GRAD) == (16, 1e-4, 1.0)
        assert not config.EMA.ENABLED
        # Of the page: what one GPU learns at, and what it needs to learn as eight do.
        assert scaled_learning_rates(config, 1).base == 1.25e-5
        eight = with_values(config, {"TRAIN.ACCUMULATION_STEPS": 8})
        assert scaled_learning_rates(eight, 1) == scaled_learning_rates(config, 8)
