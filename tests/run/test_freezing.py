"""TRAIN.FREEZE: what is frozen keeps its bits; the rest learns as without."""

import detection_data
import pytest
import runs
import segmentation_data
import torch
from ranks import run_ranks
from torch import nn

from configs import UserError
from tasks.detection.detectors import build_detector
from tasks.networks import build_model
from tasks.segmentation.network import Segmenter
from utils.checkpoint import load_file
from utils.freezing import freeze, set_training_mode
from utils.optimizer import build_optimizer

LAST = "ckpt_epoch_1.pth"


@pytest.fixture(scope="module")
def pretrained(make_config, tmp_path_factory):
    """Weights to start from, with running statistics that fresh ones do not have."""
    torch.manual_seed(1)
    network = build_model(make_config("--opts", *runs.TINY, "MODEL.GMA.NUM_CLASSES", "3"))
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "pretrained.pth"
    torch.save({"model": network.state_dict()}, path)
    return path


def part_of(name):
    """The stem is stage 0."""
    first, second = name.split(".")[:2]
    return {"conv_stem": "0", "norm4": "norm", "head": "head"}.get(first) or str(int(second) + 1)


def learnt(saved, start):
    return {part_of(name) for name, value in saved.items() if not torch.equal(value, start[name])}


@pytest.mark.parametrize(
    ("part", "learns"), [("backbone", {"head"}), ("1", {"2", "norm", "head"}), ("2", {"norm", "head"})]
)
def test_what_is_frozen_keeps_its_bits(data, tmp_path, monkeypatch, pretrained, part, learns):
    opts = ("TRAIN.FREEZE", part, "TRAIN.LAYER_DECAY", "0.7", "TRAIN.WEIGHT_DECAY", "0.5")
    args = runs.arguments(data, tmp_path, *opts, flags=("--pretrained", str(pretrained)))
    assert runs.train_here(monkeypatch, args) == 0
    saved, start = load_file(runs.run_folder(tmp_path) / LAST), load_file(pretrained)["model"]
    assert learnt(saved["model"], start) == learnt(saved["model_ema"], start) == learns
    updates = int(saved["model"]["norm4.num_batches_tracked"] - start["norm4.num_batches_tracked"])
    assert updates == (0 if part == "backbone" else 8)
    held = [number for group in saved["optimizer"]["param_groups"] for number in group["params"]]
    parameters = [name for name in saved["model"] if not name.endswith(("running_mean", "running_var", "_tracked"))]
    assert len(held) == sum(part_of(name) in learns for name in parameters)


def test_a_probe_that_is_stopped_continues_with_the_same_bits(data, tmp_path, monkeypatch, pretrained):
    def args(output):
        return runs.arguments(data, output, "TRAIN.FREEZE", "backbone", flags=("--pretrained", str(pretrained)))

    assert runs.train_here(monkeypatch, args(tmp_path / "one")) == 0
    assert runs.train_here(monkeypatch, args(tmp_path / "two"), stop_at=3) == 75
    assert runs.train_here(monkeypatch, args(tmp_path / "two")) == 0
    assert runs.final_state(tmp_path / "one", 2) == runs.final_state(tmp_path / "two", 2)


def test_what_is_frozen_keeps_its_bits_on_two_processes(data, tmp_path, pretrained):
    opts = ("TRAIN.FREEZE", "1", "DATA.BATCH_SIZE", "2")
    args = runs.arguments(data, tmp_path, *opts, flags=("--pretrained", str(pretrained)))
    result = run_ranks("train.py", args, processes=2)
    assert result.returncode == 0, result.stderr
    saved = load_file(runs.run_folder(tmp_path) / LAST)
    assert learnt(saved["model"], load_file(pretrained)["model"]) == {"2", "norm", "head"}


def test_nothing_random_is_left_in_what_is_frozen(make_config):
    """No path is dropped in frozen blocks: a probe sees the same features of an image every time."""
    opts = (*runs.TINY, "MODEL.GMA.DROP_PATH_RATE", "0.9", "MODEL.GMA.DROP_RATE", "0.5", "TRAIN.FREEZE", "backbone")
    config = make_config("--pretrained", "x", "--opts", *opts)
    network = build_model(config)
    freeze(config, network)
    set_training_mode(network)
    images = torch.randn(2, 3, 32, 32)
    logits = network(images)
    assert torch.equal(logits, network(images)) and torch.equal(logits, network.eval()(images))
    logits.sum().backward()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}


@pytest.mark.parametrize(("part", "stages"), [("backbone", 4), ("2", 2)])
@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_stages_of_detectors_and_segmenters(task, part, stages):
    opts, flags = ("MODEL.STAGE_NORM", "batch", "TRAIN.FREEZE", part), ("--pretrained", "x")
    if task == "segmentation":
        config, body = segmentation_data.small_config(*opts, flags=flags), "backbone.body."
        network = Segmenter(config)
    else:
        config, body = detection_data.tiny_config(*opts, "MODEL.PRETRAINED", "x"), "backbone.maps.body."
        network = build_detector(config, 2)
    freeze(config, network)
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert {part_of(name.removeprefix(body)) for name in frozen} == {str(stage) for stage in range(stages + 1)}
    for name, _ in network.named_parameters():
        inside = name.startswith(body) and int(part_of(name.removeprefix(body))) <= stages
        assert (name in frozen) == inside, name
    set_training_mode(network)
    modes = {name: m.training for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(modes[name] != (f"{name}.weight" in frozen) for name in modes)
    held = [p for group in build_optimizer(config, network, lr=1.0).param_groups for p in group["params"]]
    assert len(held) == len(list(network.parameters())) - len(frozen)


def test_freezing_that_cannot_work_is_refused(make_config):
    tiny = ("--opts", *runs.TINY, "TRAIN.FREEZE")
    with pytest.raises(UserError, match=r"'backbone': freezes fresh weights; give trained ones with --pretrained"):
        freeze(make_config(*tiny, "backbone"), nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"finds no stages in it \(group_matcher\) in this network; set it to ''"):
        freeze(make_config("--pretrained", "x", *tiny, "backbone"), nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"'1': freezes all of it in this network; set it to ''"):
        freeze(make_config("--pretrained", "x", *tiny, "1"), nn.Linear(1, 1))
    for value in ("0", "3", "head"):
        with pytest.raises(UserError, match=r"'backbone' or a number of stages from 1 to MODEL.GMA.NUM_STAGES = 2"):
            make_config(*tiny, value)
