"""Other libraries take the backbone without an adapter."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import models  # noqa: F401  (registers the variants)
from tools.export import export


def squares(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright square each; images (B, 3, H, W) and masks (B, 1, H, W)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, height, width, generator=generator)
    masks = torch.zeros(count, 1, height, width)
    for number in range(count):
        top, left = (int(torch.randint(0, edge - 24, (), generator=generator)) for edge in (height, width))
        masks[number, :, top : top + 24, left : left + 24] = 1
    return images + 3 * masks, masks


@pytest.mark.long
def test_segmentation_models_pytorch_trains_it_as_an_encoder() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    network = smp.Unet("tu-groupmixformer_miny", encoder_weights=None, classes=1).train()
    assert [chans for chans in network.encoder.out_channels if chans][-4:] == [40, 80, 160, 160]
    images, masks = squares(4, 64, 96)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = F.binary_cross_entropy_with_logits(network(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    touched = [p.grad is not None for name, p in network.encoder.named_parameters() if "norm4" not in name]
    assert all(touched), "gradients reach the whole encoder"


class PyramidBackbone(nn.Module):
    """The stage maps through torchvision's feature pyramid, as its detectors take them."""

    def __init__(self, out_channels: int = 32) -> None:
        super().__init__()
        self.body = timm.create_model("groupmixformer_miny", features_only=True)
        self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.pyramid({str(i): maps for i, maps in enumerate(self.body(x))})


@pytest.mark.long
def test_a_torchvision_detector_trains_and_detects_at_sizes_that_are_no_multiples_of_32() -> None:
    torch.manual_seed(0)
    detector = FasterRCNN(
        PyramidBackbone(),
        num_classes=2,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (128,)), ((1.0,),) * 4),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=5, sampling_ratio=2),
        min_size=75,
        max_size=131,
        size_divisible=1,  # no padding to a multiple: the backbone sees 75 x 131 and the like
    )
    images, masks = squares(2, 75, 131)
    boxes = []
    for mask in masks[:, 0]:
        rows, columns = mask.nonzero().unbind(1)
        boxes.append(torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], dtype=torch.float))
    targets = [{"boxes": box, "labels": torch.ones(1, dtype=torch.int64)} for box in boxes]
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = sum(detector(list(images), targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    gradients = [p.grad.abs().sum() for p in detector.backbone.body.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite() for gradient in gradients)
    detector.eval()
    with torch.no_grad():
        for height, width in ((75, 131), (90, 77)):
            (found,) = detector([torch.rand(3, height, width)])
            assert set(found) == {"boxes", "labels", "scores"} and found["boxes"].isfinite().all()


@pytest.mark.compile
def test_onnxruntime_gives_torchs_logits_for_any_batch_and_size(tmp_path: Path) -> None:
    """The whole network of a published variant; tests/test_export.py has small ones and the command."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    network = timm.create_model("groupmixformer_miny", num_classes=1000).eval()
    for module in network.modules():  # logits of fresh networks are nearly zero, and would agree too easily
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    nn.init.normal_(network.head.weight, std=0.3)
    export(network, tmp_path / "a.onnx", "onnx", (224, 224))
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for size in ((1, 3, 224, 224), (3, 3, 161, 300)):
        images = torch.randn(size)
        with torch.no_grad():
            expected = network(images)
        (logits,) = session.run(None, {"images": images.numpy()})
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


# What timm's train.py and validate.py do with a model that they know by name only; timm does not install the scripts.
SCRIPT = """
import argparse, timm, torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--model", choices=timm.list_models("groupmix*"))
args = parser.parse_args()
model = timm.create_model(args.model, num_classes=3, in_chans=3, pretrained=False, checkpoint_path="")
config = resolve_data_config({"img_size": 64}, model=model)
assert config["interpolation"] == "bicubic" and config["crop_pct"] == 0.875, config
train_loader, val_loader = (
    create_loader(
        create_dataset("", root=args.data_dir, split=split, class_map=""), (3, 64, 64), 3,
        is_training=split == "train", use_prefetcher=False, num_workers=0, interpolation=config["interpolation"],
        mean=config["mean"], std=config["std"], crop_pct=config["crop_pct"],
    )
    for split in ("train", "val")
)
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=1, updates_per_epoch=len(train_loader))
ema = ModelEmaV3(model)
model.set_grad_checkpointing(True)
model.train()
for step, (images, labels) in enumerate(train_loader):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.update(model, step=step)
    scheduler.step_update(step)
print("scales", len({group["lr_scale"] for group in optimizer.param_groups}), "loss", float(loss))
model.eval()
with torch.inference_mode():
    for images, labels in val_loader:
        print("top", *(float(a) for a in accuracy(model(images), labels, topk=(1, 3))))
"""


@pytest.mark.launch
def test_scripts_that_ask_timm_find_the_variants_by_the_documented_command(data: Path, tmp_path: Path) -> None:
    (tmp_path / "validate.py").write_text(SCRIPT)
    (line,) = re.findall(r"^python -c .*runpy.*$", (runs.ROOT / "docs" / "backbone.md").read_text(), re.MULTILINE)
    code = shlex.split(line)[2].replace("<clone of timm>/validate.py", str(tmp_path / "validate.py"))
    command = [sys.executable, "-c", code, "--model", "groupmixformer_miny", "--data-dir", str(data)]
    result = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    trained, *validated = result.stdout.splitlines()
    scales, loss = re.fullmatch(r"scales (\d+) loss (\S+)", trained).groups()
    assert int(scales) > 20 and float(loss) < 5, "a group of its own for stem, every block and head"
    assert validated and all(float(line.split()[2]) == 100.0 for line in validated), "top 3 of 3 classes"
