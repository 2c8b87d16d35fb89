"""Small networks whose weights their parameters' names decide, and what is compared of them."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import golden_numbers
import pytest
import timm
import torch
from torch import Tensor, nn

from models import GroupMixFormer

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("miny", "tiny", "small", "base", "large")

# A width for every stage, so that no two can be mixed up, and more than one block in some of them.
SMALL = dict(embed_dims=(10, 20, 30, 40), depths=(1, 2, 2, 1), mlp_ratios=(2, 4, 2, 4), num_classes=7)
# Heads that lie within one segment (one size), and heads that lie in two (two and four sizes).
OTHER_GROUPS = (
    dict(group_sizes=(5,), embed_dims=(12, 24, 24, 36)),
    dict(group_sizes=(7, 3), embed_dims=(32, 32, 64, 64)),
    dict(group_sizes=(3, 5, 7, 9), embed_dims=(48, 48, 48, 96)),
)
# What ablations leave out; heads of several segments (1), of one each (4), and such that three windows share (3).
ABLATIONS = (
    dict(local_branch=False, embed_dims=(8, 16, 24, 32)),
    dict(relative_position=False),
    dict(relative_position=False, local_branch=False, group_sizes=(), num_heads=5, embed_dims=(10, 15, 20, 30)),
    dict(num_heads=1),
    dict(num_heads=4),
    dict(num_heads=3, embed_dims=(30, 60, 60, 30)),
)
SHALLOW = dict(depths=(1, 1, 1, 1))
WIDE = dict(embed_dims=(40, 80, 120, 160), depths=(1, 1, 2, 1))  # several channels to each head and segment


def small_network(**options: Any) -> nn.Module:
    """A small network of timm's, in evaluation mode, with weights that its parameters' names decide.

    They are three times the released tests' weights: in few blocks, images that differ shall have logits that differ.
    """
    network = timm.create_model("groupmixformer_miny", **{**SMALL, "drop_path_rate": 0.0, **options})
    shapes = {name: (name.removeprefix("model."), tuple(v.shape)) for name, v in network.state_dict().items()}
    state = {name: golden_numbers.weight(*shape) for name, shape in shapes.items()}
    network.load_state_dict({name: 3 * value if value.ndim > 1 else value for name, value in state.items()})
    return network.eval()


def relative_error(got: Tensor, expected: Any) -> float:
    """Relative L2 error in float64."""
    got, expected = got.detach().double(), torch.as_tensor(expected).detach().double()
    assert got.shape == expected.shape
    return ((got - expected).norm() / expected.norm()).item()


def blocks_of(network: GroupMixFormer) -> list[nn.Module]:
    return [block for stage in network.groupmixformer_backbone for block in stage.gma_stage]


def train_step(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Every gradient and every running statistic after one step in training mode from the seed 0."""
    torch.manual_seed(0)
    network.train().zero_grad()
    network(images).float().square().sum().backward()
    return {name: p.grad for name, p in network.named_parameters()} | dict(network.named_buffers())


def modules_of(network: nn.Module, kind: type) -> Iterable[nn.Module]:
    return [module for module in network.modules() if isinstance(module, kind)]


def assert_fresh_linear(layer: nn.Linear) -> None:
    assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * layer.weight.numel()))
    assert abs(layer.weight.mean().item()) < 5 * 0.02 / math.sqrt(layer.weight.numel())
    assert not layer.bias.any()
