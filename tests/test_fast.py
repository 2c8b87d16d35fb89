"""Every fast path against the plain formulation: values, and gradients where it gives them."""

import copy
from typing import Any

import golden_numbers
import pytest
import timm
import torch
from torch import Tensor, nn

import models
import models.fused
from models.fused import fuse
from models.reference import ReferenceNetwork

WIDE = dict(embed_dims=(40, 80, 120, 160), depths=(1, 1, 2, 1), drop_path_rate=0.0, num_classes=7)


def network_of(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A small network with weights and running statistics that are a function of their names."""
    network = timm.create_model("groupmixformer_miny", **{**WIDE, **options})
    state = {
        name: 3 * golden_numbers.weight(name, tuple(value.shape)) if value.ndim > 1 else value
        for name, value in network.state_dict().items()
    }
    for name, value in state.items():
        noise = golden_numbers.weight(name, tuple(value.shape)) if value.ndim == 1 else value
        if name.endswith("running_mean") or (value.ndim == 1 and name.endswith("bias")):
            state[name] = noise
        elif name.endswith("running_var"):
            state[name] = 1 + 0.5 * torch.tanh(noise)
    network.load_state_dict(state)
    return network.to(dtype).eval()


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def images(height: int = 64, width: int = 96, batch: int = 3) -> Tensor:
    return golden_numbers.images(batch, height, width)


# ---------------------------------------------------------------------------------------------- the order of operations
@pytest.mark.parametrize("size", [(64, 96), (33, 47)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_values_and_gradients_are_those_of_the_released_order(size: tuple[int, int], training: bool) -> None:
    network = network_of(torch.float64).train(training)
    reference = ReferenceNetwork(copy.deepcopy(network)).train(training)
    x = images(*size).double()
    got, expected = network(x), reference(x)
    assert relative_error(got, expected) < 1e-13
    got.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in reference.network.named_parameters()}
    floor = 1e-12 * max(gradient.norm() for gradient in gradients.values())
    for name, parameter in network.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 1e-10 * gradients[name].norm() + floor, name
    for name, value in reference.network.state_dict().items():
        assert torch.allclose(network.state_dict()[name], value, rtol=1e-12, atol=1e-14), name


# ---------------------------------------------------------------------------------------------------------------- fused
@pytest.mark.parametrize("size", [(64, 96), (33, 47), (224, 224)], ids=str)
@pytest.mark.parametrize("heads", [8, 16])
def test_fused_is_the_network_in_float64(size: tuple[int, int], heads: int) -> None:
    network = network_of(torch.float64, num_heads=heads, embed_dims=(40, 80, 120, 160))
    x = images(*size, batch=2).double()
    with torch.no_grad():
        assert relative_error(fuse(network)(x), network(x)) < 1e-13


@pytest.mark.parametrize(
    "options",
    [
        dict(qkv_bias=False),
        dict(qk_scale=0.3),
        dict(in_chans=1),
        dict(num_classes=0),
        dict(global_pool="avgmax"),
        dict(global_pool="catavgmax"),
        dict(num_classes=0, global_pool=""),
        dict(drop_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5),
    ],
    ids=str,
)
def test_fused_takes_every_option_of_the_network(options: dict[str, Any]) -> None:
    network = network_of(torch.float64, **options)
    x = images().double()[:, : options.get("in_chans", 3)]
    with torch.no_grad():
        assert relative_error(fuse(network)(x), network(x)) < 1e-13


def test_fused_stage_maps_are_those_of_the_network() -> None:
    network, x = network_of(torch.float64), images().double()
    with torch.no_grad():
        for got, expected in zip(fuse(network).forward_stages(x), network.forward_stages(x), strict=True):
            assert relative_error(got, expected) < 1e-13
        network.return_interm_layers = True
        assert len(fuse(network)(x)) == 4


@pytest.mark.parametrize("packed", [True, False])
def test_the_difference_of_fused_float32_is_rounding(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed:
        monkeypatch.setattr(models.fused, "_HAS_PACKED_LINEAR", False)
    network = network_of()
    x = images(224, 224)
    with torch.no_grad():
        expected = network_of(torch.float64)(x.double())
        assert relative_error(network(x), expected) < 1e-6
        assert relative_error(fuse(network)(x), expected) < 1e-6


@pytest.mark.parametrize("autocast", [True, False])
def test_the_difference_of_fused_bfloat16_is_that_of_the_network(autocast: bool) -> None:
    network, x = network_of(), images()
    with torch.no_grad():
        expected = network(x)
        if not autocast:
            network, x = network.bfloat16(), x.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain, fused = network(x), fuse(network)(x)
    eps = torch.finfo(torch.bfloat16).eps
    assert relative_error(plain, expected) < 8 * eps
    assert relative_error(fused, expected) < 8 * eps


def test_fusing_leaves_the_network_alone() -> None:
    network = network_of()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fused = fuse(network)
    with torch.no_grad():
        for buffer in fused.buffers():
            buffer.zero_()
    after = network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_packed_weights_follow_the_weights_they_were_made_from() -> None:
    network, other = network_of(), network_of()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        fused = fuse(network)
        before = fused(images())
        fused.load_state_dict(fuse(other).state_dict())
        assert relative_error(fused(images()), fuse(other)(images())) < 1e-6
        assert relative_error(before, fused(images())) > 1e-2


def test_fused_copies_saves_and_moves(tmp_path: Any) -> None:
    fused, x = fuse(network_of()), images()
    expected = fused(x)
    assert torch.equal(copy.deepcopy(fused)(x), expected)
    torch.save(fused, tmp_path / "fused.pt")
    assert torch.equal(torch.load(tmp_path / "fused.pt", weights_only=False)(x), expected)
    assert relative_error(fused.double()(x.double()), expected) < 1e-6


def test_fused_gives_no_gradients_and_has_no_training_mode() -> None:
    fused = fuse(network_of())
    assert not any(p.requires_grad for p in fused.parameters())
    assert not fused(images().requires_grad_()).requires_grad
    with pytest.raises(RuntimeError, match="for evaluation only"):
        fused.train()


def test_fused_runs_on_an_empty_batch() -> None:
    assert fuse(network_of())(images()[:0]).shape == (0, 7)
