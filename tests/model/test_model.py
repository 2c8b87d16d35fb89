"""The network: the released numbers, an independent plain formulation, sizes, and the file on its own."""

import ast
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden_numbers
import pytest
import timm
import torch
import torch.nn.functional as F
from small_networks import (
    ABLATIONS,
    NAMES,
    OTHER_GROUPS,
    ROOT,
    SMALL,
    WIDE,
    assert_fresh_linear,
    blocks_of,
    modules_of,
    relative_error,
    small_network,
)
from torch import Tensor, nn
from yacs.config import CfgNode

import models.groupmixformer
from configs import read_config
from models import VARIANTS, GroupMixFormer
from models.groupmixformer import GroupMixAttention
from tasks import keys_of
from tasks.measurement import count_flops
from tasks.networks import build_model


# ----------------------------------------------------------------------------------------------------- released numbers
@pytest.mark.parametrize("name", NAMES)
def test_the_state_dict_has_the_released_names_in_their_order_and_shapes(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(f"groupmixformer_{name}").state_dict()
    assert [(key, tuple(value.shape)) for key, value in state.items()] == list(golden_numbers.layout(name).items())


@pytest.fixture(scope="module", params=["miny", pytest.param("small", marks=pytest.mark.long)])
def golden_run(request: pytest.FixtureRequest) -> SimpleNamespace:
    """The float64 computation behind the released numbers, done by this network, beside those numbers."""
    network = timm.create_model(f"groupmixformer_{request.param}", drop_path_rate=0.0).double()
    network.load_state_dict(golden_numbers.weights(golden_numbers.layout(request.param)))
    run = SimpleNamespace(network=network, released=golden_numbers.results(request.param), maps=[])
    images = golden_numbers.images(2, 224, 224)

    hooks = [
        stage.register_forward_hook(lambda module, args, out: run.maps.append(out))
        for stage in network.groupmixformer_backbone
    ]
    with torch.no_grad():
        run.logits = network.eval()(images.double())
        for hook in hooks:
            hook.remove()
        run.float32_logits = copy.deepcopy(network).float()(images)

    run.train_logits = network.train()(images.double())
    run.train_loss = F.cross_entropy(run.train_logits, torch.from_numpy(run.released["train_labels"]))
    run.train_loss.backward()
    return run


def test_evaluation_logits_are_the_released_ones(golden_run: SimpleNamespace) -> None:
    assert relative_error(golden_run.logits, golden_run.released["eval_logits"]) < 1e-10


def test_float32_logits_are_the_released_ones_to_float32_accuracy(golden_run: SimpleNamespace) -> None:
    assert golden_run.float32_logits.dtype == torch.float32
    assert relative_error(golden_run.float32_logits, golden_run.released["eval_logits"]) < 2e-6


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_stage_maps_are_the_released_ones(golden_run: SimpleNamespace, stage: int) -> None:
    stage_map, released = golden_run.maps[stage - 1], golden_run.released
    assert stage_map.shape == tuple(released[f"stage{stage}_shape"])
    assert relative_error(stage_map.mean((2, 3)), released[f"stage{stage}_mean"]) < 1e-10
    assert relative_error(stage_map.std((2, 3)), released[f"stage{stage}_std"]) < 1e-10


def test_training_logits_and_loss_are_the_released_ones(golden_run: SimpleNamespace) -> None:
    assert relative_error(golden_run.train_logits, golden_run.released["train_logits"]) < 1e-10
    assert golden_run.train_loss.item() == pytest.approx(golden_run.released["train_loss"].item(), rel=1e-10)


def test_every_gradient_norm_is_the_released_one(golden_run: SimpleNamespace) -> None:
    gradients = {name: p.grad.norm() for name, p in golden_run.network.named_parameters()}
    assert list(gradients) == list(golden_run.released["grad_names"])
    got, released = torch.stack(list(gradients.values())), torch.from_numpy(golden_run.released["grad_norms"])
    assert relative_error(got, released) < 1e-10
    rounding_noise = 1e-12 * released.max()  # all that a bias in front of a batch norm gets
    torch.testing.assert_close(got, released, rtol=1e-10, atol=rounding_noise.item())


def test_every_running_statistic_is_the_released_one(golden_run: SimpleNamespace) -> None:
    buffers = dict(golden_run.network.named_buffers())
    released = {name.removeprefix("bn:"): v for name, v in golden_run.released.items() if name.startswith("bn:")}
    counters = {name for name in buffers if name.endswith("num_batches_tracked")}
    assert set(released) == set(buffers) - counters
    assert max(relative_error(buffers[name], value) for name, value in released.items()) < 1e-10
    assert {buffers[name].item() for name in counters} == {1}


# ----------------------------------------------------------------------------------------------- variants, as published
PUBLISHED = {  # widths, depths, MLP ratios, drop path, parameters, GFLOPs at 224 x 224
    "miny": ((40, 80, 160, 160), (3, 3, 12, 4), (4, 4, 4, 4), 0.1, 5_733_120, "1.350"),
    "tiny": ((80, 160, 200, 240), (4, 4, 12, 4), (4, 4, 4, 4), 0.1, 10_949_152, "3.720"),
    "small": ((80, 160, 320, 320), (2, 4, 12, 4), (4, 4, 4, 4), 0.2, 22_421_320, "5.164"),
    "base": ((200, 240, 320, 480), (8, 8, 12, 8), (2, 2, 4, 4), 0.5, 45_827_272, "17.552"),
    "large": ((240, 320, 360, 480), (8, 10, 30, 10), (4, 4, 2, 2), 0.5, 71_833_648, "38.246"),
}


@pytest.mark.parametrize(
    "name",
    [
        "miny",
        pytest.param("small", marks=pytest.mark.long),
        *(pytest.param(n, marks=pytest.mark.chaos) for n in ("tiny", "base", "large")),
    ],
)
def test_parameters_and_flops_are_the_released_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fvcore.nn.flop_count_table", lambda *args, **options: "")  # slow, and not looked at
    flops, parameters, _ = count_flops(timm.create_model(f"groupmixformer_{name}"), (3, 224, 224))
    assert (parameters, f"{flops / 1e9:.3f}") == PUBLISHED[name][4:]


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_and_its_yaml_file_are_the_published_network(
    name: str, make_config: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("--cfg", str(ROOT / "configs" / f"groupmixformer_{name}.yaml"))
    gma, variant = config.MODEL.GMA, VARIANTS[config.MODEL.NAME]
    from_yaml = tuple(gma.EMBEDDING_DIMS), tuple(gma.SERIAL_DEPTHS), tuple(gma.MLP_RATIOS), gma.DROP_PATH_RATE
    assert from_yaml == PUBLISHED[name][:4]
    assert tuple(variant[key] for key in ("embed_dims", "depths", "mlp_ratios", "drop_path_rate")) == from_yaml
    with torch.device("meta"):
        network = build_model(config)
    assert {key: tuple(v.shape) for key, v in network.state_dict().items()} == golden_numbers.layout(name)


@pytest.mark.parametrize("name", ["miny", "base"])
def test_stochastic_depth_rises_linearly_over_all_blocks(name: str) -> None:
    with torch.device("meta"):
        blocks = blocks_of(timm.create_model(f"groupmixformer_{name}"))
    _, depths, _, last_rate, *_ = PUBLISHED[name]
    assert len(blocks) == sum(depths)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([last_rate * i / (len(blocks) - 1) for i in range(len(blocks))])


def test_a_dropped_block_keeps_its_position_encoding_only() -> None:
    block = blocks_of(small_network(drop_path_rate=0.5))[-1]
    tokens = golden_numbers.weight("tokens", (2, 35, 40))
    block.drop_path.drop_prob = 1.0
    torch.testing.assert_close(block.train()(tokens, (5, 7)), block.cpe(tokens, (5, 7)))
    assert relative_error(block.eval()(tokens, (5, 7)), block.cpe(tokens, (5, 7))) > 0.01


def test_each_rate_and_switch_reaches_its_layer() -> None:
    options = dict(drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3, qkv_bias=False, qk_scale=0.4)
    network = small_network(**options)
    assert network.head_drop.p == 0.1
    for block in blocks_of(network):
        assert (block.att.proj_drop.p, block.mlp.drop1.p, block.mlp.drop2.p) == (0.2, 0.2, 0.2)
        assert (block.att.attn_drop.p, block.att.qkv.bias, block.att.scale) == (0.3, None, 0.4)


# ------------------------------------------------------------------------------------------------------ initial weights
@pytest.fixture(scope="module")
def fresh() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("groupmixformer_miny")


def test_linear_weights_start_normal_with_sigma_002_and_zero_biases(fresh: nn.Module) -> None:
    for layer in modules_of(fresh, nn.Linear):
        assert_fresh_linear(layer)


def test_convolutions_start_as_pytorch_initialises_them(fresh: nn.Module) -> None:
    for layer in modules_of(fresh, nn.Conv2d):
        bound = 1 / math.sqrt(layer.weight[0].numel())  # uniform over [-bound, bound]
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(layer.weight.numel()))
        assert layer.bias is None or (layer.bias.any() and layer.bias.abs().max() <= bound)


def test_norms_start_as_the_identity(fresh: nn.Module) -> None:
    for layer in modules_of(fresh, (nn.LayerNorm, nn.BatchNorm2d)):
        assert (layer.weight == 1).all() and (layer.bias == 0).all()
    for layer in modules_of(fresh, nn.BatchNorm2d):
        assert (layer.running_mean == 0).all() and (layer.running_var == 1).all()
        assert (layer.eps, layer.momentum) == (1e-5, 0.1)


# ------------------------------------------------------------------------------------------- an independent formulation
class PlainNetwork:
    """The network as plain arithmetic on a state dict: no modules and no tokens, every tensor a map (B, C, H, W)."""

    def __init__(self, state: dict[str, Tensor], training: bool, num_heads: int = 8) -> None:
        self.state, self.training, self.num_heads = state, training, num_heads

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """The sum of the shifted input times the weights of that shift, depthwise where a weight has one input."""
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        size, (height, width) = weight.shape[-1], x.shape[2:]
        padded = F.pad(x, [size // 2] * 4)
        out = torch.zeros(()) if bias is None else bias[:, None, None]
        for i in range(size):
            for j in range(size):
                shifted = padded[:, :, i : i + height : stride, j : j + width : stride]
                if weight.shape[1] == 1:
                    out = out + shifted * weight[:, 0, i, j, None, None]
                else:
                    out = out + torch.einsum("bchw,oc->bohw", shifted, weight[:, :, i, j])
        return out

    def separable(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        return self.conv(f"{name}.pointwise_conv", self.conv(f"{name}.conv1", x, stride))

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return torch.einsum("bchw,oc->bohw", x, weight) + bias[:, None, None]

    def affine(self, name: str, x: Tensor) -> Tensor:
        return x * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    def batch_norm(self, name: str, *maps: Tensor) -> list[Tensor]:
        """One normalisation for all the maps: in training by the statistics of all of them together."""
        mean, var = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        if self.training:
            together = torch.cat(maps)
            mean = together.mean((0, 2, 3))
            var = (together - mean[:, None, None]).square().mean((0, 2, 3))
        mean, sigma = mean[:, None, None], (var + 1e-5).sqrt()[:, None, None]
        return [self.affine(name, (x - mean) / sigma) for x in maps]

    def layer_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        return self.affine(name, centred / (centred.square().mean(1, keepdim=True) + eps).sqrt())

    @staticmethod
    def hardswish(x: Tensor) -> Tensor:
        return x * (x + 3).clamp(0, 6) / 6

    def attention(self, name: str, x: Tensor) -> Tensor:
        groups = sum(f"{name}.aggregator.norm{i}.weight" in self.state for i in range(1, 9))
        has_local = f"{name}.aggregator.agg0.norm.weight" in self.state
        channels, segment = x.shape[1], x.shape[1] // (groups + 1 + has_local)
        attending = (groups + 1) * segment
        head = attending // self.num_heads
        qkv = self.linear(f"{name}.qkv", x).split(channels, dim=1)

        mixed: tuple[list[Tensor], ...] = ([], [], [])  # of q, k and v: all segments but the last
        for i in range(groups + 1):
            parts = [one[:, i * segment : (i + 1) * segment] for one in qkv]
            if i > 0:
                parts = [self.separable(f"{name}.aggregator.agg{i}", part) for part in parts]
            for segments, part in zip(mixed, self.batch_norm(f"{name}.aggregator.norm{i}", *parts)):
                segments.append(self.hardswish(part))
        q, k, v = (torch.cat(segments, dim=1) for segments in mixed)

        attended = []
        for start in range(0, attending, head):
            q1, k1, v1 = (one[:, start : start + head].flatten(2) for one in (q, k, v))  # (B, d, N)
            share_of_tokens = k1.exp() / k1.exp().sum(2, keepdim=True)
            attended.append(torch.einsum("bin,bim,bjm->bjn", q1, share_of_tokens, v1))
        y = torch.cat(attended, dim=1).reshape(q.shape) / (channels // self.num_heads) ** 0.5
        if f"{name}.crpe.conv_list.0.weight" in self.state:
            windows = v.split([attending // 8 * eighths for eighths in (2, 3, 3)], dim=1)
            position = [self.conv(f"{name}.crpe.conv_list.{i}", part) for i, part in enumerate(windows)]
            y = y + q * torch.cat(position, dim=1)
        if has_local:
            local = torch.cat([one[:, attending:] for one in qkv], dim=1)
            local = self.separable(f"{name}.aggregator.agg0.conv", local)
            local = self.hardswish(self.layer_norm(f"{name}.aggregator.agg0.norm", local, eps=1e-5))
            y = torch.cat([y, local], dim=1)
        return self.linear(f"{name}.proj", y)

    def block(self, name: str, x: Tensor) -> Tensor:
        x = x + self.conv(f"{name}.cpe.proj", x)
        x = x + self.attention(f"{name}.att", self.layer_norm(f"{name}.norm1", x, eps=1e-6))
        hidden = self.linear(f"{name}.mlp.fc1", self.layer_norm(f"{name}.norm2", x, eps=1e-6))
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return x + self.linear(f"{name}.mlp.fc2", hidden)

    def __call__(self, x: Tensor) -> Tensor:
        for i in (1, 2):
            x = self.conv(f"conv_stem.proj{i}", x, stride=2)
            x = self.hardswish(*self.batch_norm(f"conv_stem.norm{i}", x))
        for i in range(4):
            x = self.separable(f"patch_embed_layers.{i}.proj", x, stride=1 if i == 0 else 2)
            x = self.hardswish(*self.batch_norm(f"patch_embed_layers.{i}.norm", x))
            stage = f"groupmixformer_backbone.{i}.gma_stage"
            for j in range(sum(f"{stage}.{j}.norm1.weight" in self.state for j in range(99))):
                x = self.block(f"{stage}.{j}", x)
        (x,) = self.batch_norm("norm4", x)
        return self.linear("head", x.mean((2, 3), keepdim=True)).flatten(1)


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict in which parameters take gradients."""
    parameters = dict(network.named_parameters())
    return {
        name: value.detach().clone().requires_grad_(name in parameters) for name, value in network.state_dict().items()
    }


def assert_same_gradients(network: nn.Module, state: dict[str, Tensor]) -> None:
    got = {name: p.grad for name, p in network.named_parameters()}
    floor = 1e-12 * max(gradient.norm() for gradient in got.values())  # rounding noise of gradients that are zero
    for name, gradient in got.items():
        assert (gradient - state[name].grad).norm() <= 1e-9 * gradient.norm() + floor, name


@pytest.mark.parametrize("training", [False, True])
def test_group_mix_attention_is_its_plain_formulation(training: bool) -> None:
    attention = GroupMixAttention(40, num_heads=8).double().train(training)
    shapes = {name: tuple(value.shape) for name, value in attention.state_dict().items()}
    attention.load_state_dict(golden_numbers.weights(shapes))
    tokens = golden_numbers.weight("tokens", (3, 5 * 7, 40)).double().requires_grad_()
    tokens_map = tokens.detach().transpose(1, 2).reshape(3, 40, 5, 7).clone().requires_grad_()
    weights = golden_numbers.weight("weights of the outputs", (3, 5 * 7, 40)).double()

    out = attention(tokens, (5, 7))
    (out * weights).sum().backward()
    state = plain_state(attention)
    plain = PlainNetwork({f"att.{name}": value for name, value in state.items()}, training)
    expected = plain.attention("att", tokens_map).flatten(2).transpose(1, 2)
    (expected * weights).sum().backward()

    assert relative_error(out, expected) < 1e-12
    assert relative_error(tokens.grad, tokens_map.grad.flatten(2).transpose(1, 2)) < 1e-12
    assert_same_gradients(attention, state)


@pytest.mark.parametrize(
    ("size", "training", "options"),
    [((33, 47), False, {}), ((33, 47), True, {}), ((37, 200), True, {})]
    + [((33, 47), True, options) for options in (*OTHER_GROUPS, *ABLATIONS)],
    ids=str,
)
def test_the_network_is_its_plain_formulation(size: tuple[int, int], training: bool, options: dict[str, Any]) -> None:
    """At any size, with any group sizes and any number of heads, without what an ablation leaves out."""
    network = small_network(**{**WIDE, **options}).double().train(training)
    state, images = plain_state(network), golden_numbers.images(3, *size).double()
    plain = PlainNetwork(state, training, options.get("num_heads", 8))
    logits, expected = network(images), plain(images)
    assert relative_error(logits, expected) < 1e-11
    logits.square().sum().backward()
    expected.square().sum().backward()
    assert_same_gradients(network, state)


@pytest.mark.chaos
def test_the_plain_formulation_is_the_released_network(golden_run: SimpleNamespace) -> None:
    state = dict(golden_run.network.state_dict())
    state.update({name: golden_numbers.weight(name, tuple(v.shape)).double() for name, v in state.items()})
    with torch.no_grad():
        logits = PlainNetwork(state, training=False)(golden_numbers.images(2, 224, 224).double())
    assert relative_error(logits, golden_run.released["eval_logits"]) < 1e-10


# --------------------------------------------------------------------------------------------------- sizes and refusals
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (225, 223), (37, 200)], ids=str)
def test_stage_maps_round_up_at_every_stride(size: tuple[int, int]) -> None:
    height, width = size
    maps = small_network(return_interm_layers=True)(golden_numbers.images(1, height, width))
    assert [tuple(stage_map.shape) for stage_map in maps] == [
        (1, dim, math.ceil(height / stride), math.ceil(width / stride))
        for dim, stride in zip(SMALL["embed_dims"], (4, 8, 16, 32))
    ]


def test_return_interm_layers_gives_the_stage_maps() -> None:
    images = golden_numbers.images(2, 33, 47)
    expected = small_network().forward_intermediates(images, intermediates_only=True)
    maps = small_network(return_interm_layers=True)(images)
    assert isinstance(maps, list) and len(maps) == 4
    torch.testing.assert_close(maps, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(embed_dims=(10, 20, 84, 40)), ("embed_dims[2]=84", "8 equal heads", "multiple of 10")),
        (dict(embed_dims=(15, 20, 30, 40)), ("embed_dims[0]=15", "multiple of 10")),
        (dict(embed_dims=(10, 20, 30, 0)), ("embed_dims[3]=0", "positive")),
        (dict(num_heads=16), ("embed_dims[0]=10", "16 equal heads", "multiple of 20")),
        (dict(num_heads=6), ("embed_dims[0]=10", "6 equal heads and 8 equal parts", "relative", "multiple of 30")),
        (dict(num_heads=6, relative_position=False), ("embed_dims[0]=10", "6 equal heads:", "multiple of 15")),
        (dict(num_heads=0), ("num_heads=0", "at least 1")),
        (dict(local_branch=False), ("embed_dims[0]=10", "4 segments", "which give 8 equal heads", "multiple of 8")),
        (dict(group_sizes=(3, 4)), ("group_sizes=(3, 4)", "odd")),
        (dict(group_sizes=(1, 3, 5)), ("group_sizes=(1, 3, 5)", "at least 3")),
        (dict(group_sizes=(3,) * 10), ("group_sizes=(3, 3,", "at most 9")),
        (dict(group_sizes=(3,)), ("embed_dims[0]=10", "3 segments", "(3,)", "first 2", "multiple of 12")),
        (dict(group_sizes=(3, 5)), ("embed_dims[0]=10", "4 segments", "(3, 5)", "first 3", "multiple of 32")),
        (dict(group_sizes=(3, 5, 7, 9)), ("6 segments", "(3, 5, 7, 9)", "first 5", "multiple of 48")),
        (dict(depths=(1, 2)), ("4, 2 and 4 values",)),
        (dict(mlp_ratios=(2, 4, 2)), ("4, 4 and 3 values",)),
        (dict(embed_dims=(), depths=(), mlp_ratios=()), ("0, 0 and 0 values",)),
    ],
    ids=str,
)
def test_what_cannot_be_cut_evenly_is_refused_with_its_numbers(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as refusal:
        GroupMixFormer(**{**SMALL, **options})
    for word in words:
        assert word in str(refusal.value)


def test_twice_the_heads_and_fewer_stages_work() -> None:
    network = GroupMixFormer(num_classes=7, embed_dims=(20, 40), depths=(1, 1), mlp_ratios=(2, 2), num_heads=16)
    assert network(golden_numbers.images(2, 32, 48)).shape == (2, 7)


def test_keys_leave_out_what_ablations_leave_out() -> None:
    keys = ("MODEL.GMA.LOCAL_BRANCH", "False", "MODEL.GMA.RELATIVE_POSITION", "False", "MODEL.GMA.NUM_HEADS", "5")
    config = read_config(["--cfg", str(ROOT / "configs" / "groupmixformer_miny.yaml"), "--opts", *keys], keys_of)
    attentions = [block.att for block in blocks_of(build_model(config))]
    assert {(att.aggregator.agg0, att.crpe, att.num_heads) for att in attentions} == {(None, None, 5)}


def test_group_sizes_are_the_windows_of_the_aggregators() -> None:
    """Each has weights, under the names that follow from its place. The windows of the position stay 3, 5 and 7."""
    network = small_network(embed_dims=(48,) * 4, group_sizes=(9, 3, 5, 3))
    for block in blocks_of(network):
        shapes = {name: tuple(value.shape) for name, value in block.att.state_dict().items()}
        assert [shapes[f"aggregator.agg{i}.conv1.weight"] for i in (1, 2, 3, 4)] == [(8, 1, k, k) for k in (9, 3, 5, 3)]
        assert all(shapes[f"aggregator.norm{i}.weight"] == (8,) for i in range(5))
        assert [shapes[f"crpe.conv_list.{i}.weight"][-1] for i in range(3)] == [3, 5, 7]
        assert shapes["aggregator.agg0.conv.conv1.weight"] == (24, 1, 3, 3)


@pytest.mark.parametrize("options", [*OTHER_GROUPS, *ABLATIONS[:3]], ids=str)
def test_networks_of_other_shapes_learn(options: dict[str, Any]) -> None:
    network, images = small_network(**options), golden_numbers.images(4, 32, 32)
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        losses.append(F.cross_entropy(network(images), torch.arange(4)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    assert all(p.grad.any() for p in network.parameters())


# -------------------------------------------------------------------------------------------------- the file on its own
MODEL_FILE = Path(models.groupmixformer.__file__)


def test_the_model_file_imports_torch_and_timm_only() -> None:
    imported = set()
    for node in ast.walk(ast.parse(MODEL_FILE.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            imported.update(name.name.split(".")[0] for name in node.names)
    assert imported - set(sys.stdlib_module_names) == {"torch", "timm"}


def test_factory_arguments_place_and_cast_the_network() -> None:
    network = timm.create_model("groupmixformer_miny", device="meta", dtype=torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in network.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_classifier_is_in_the_networks_mode(training: bool) -> None:
    network = small_network(drop_rate=0.5).train(training)
    network.reset_classifier(5, "max")
    assert all(module.training == training for module in network.modules())
