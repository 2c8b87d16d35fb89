"""The network as the backbone of detectors and segmenters: its norms."""

import pytest
import torch
from segmentation_data import small_config
from torch import nn

from tasks.backbone import Backbone


def trained_once(config) -> tuple[Backbone, dict[str, torch.Tensor]]:
    """A backbone whose parameters have made one step, and its state before."""
    torch.manual_seed(0)
    backbone = Backbone(config).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    sum(stage_map.square().mean() for stage_map in backbone(torch.randn(2, 3, 64, 64))).backward()
    torch.optim.SGD(backbone.parameters(), lr=0.1).step()
    return backbone, before


def batch_norm_names(config) -> set[str]:
    """Parameters and statistics of batch norms, without counters."""
    norms = [(name, m) for name, m in Backbone(config).body.named_modules() if isinstance(m, nn.BatchNorm2d)]
    return {f"body.{name}.{key}" for name, norm in norms for key in norm.state_dict() if key != "num_batches_tracked"}


@pytest.mark.parametrize("how", ["train", "frozen"])
def test_batch_norms_are_trained_or_stay_as_pretrained(how):
    names = batch_norm_names(small_config())
    assert len(names) > 20
    backbone, before = trained_once(small_config("MODEL.BATCH_NORM", how))
    after = backbone.state_dict()
    changed = {name for name in names if not torch.equal(after[name], before[name])}
    assert changed == (names if how == "train" else set())
    assert any(not torch.equal(after[name], before[name]) for name in before if name not in names)


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_stage_norms(norm):
    torch.manual_seed(0)
    backbone = Backbone(small_config("MODEL.STAGE_NORM", norm)).train()
    plain = backbone.body.forward_stages(images := torch.randn(2, 3, 64, 64))
    backbone.train()
    for stage_map, before in zip(backbone(images), plain):
        assert stage_map.shape == before.shape
        over = {"layer": (1,), "batch": (0, 2, 3)}.get(norm)
        if over is not None:  # no scale or shift is learned yet
            assert stage_map.mean(over).abs().max() < 1e-5
            assert (stage_map.var(over, correction=0) - 1).abs().max() < 0.02
