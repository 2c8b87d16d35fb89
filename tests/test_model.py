"""The network: the released numbers, an independent plain formulation, timm's model contract, and torch's tools."""

import ast
import copy
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden_numbers
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import group_parameters
from timm.models._features_fx import GraphExtractNet
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from yacs.config import CfgNode

import models.groupmixformer
from models import VARIANTS, GroupMixFormer, build_model
from models.groupmixformer import GroupMixAttention, checkpoint_filter_fn
from utils.flops import count_flops

# torch deprecates TorchScript; users of timm's contract still need it
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:FutureWarning")

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("miny", "tiny", "small", "base", "large")

# A width for every stage, so that no two can be mixed up, and more than one block in some of them.
SMALL = dict(embed_dims=(10, 20, 30, 40), depths=(1, 2, 2, 1), mlp_ratios=(2, 4, 2, 4), num_classes=7)
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


# ----------------------------------------------------------------------------------------------------- released numbers
@pytest.mark.parametrize("name", NAMES)
def test_the_state_dict_has_the_released_names_in_their_order_and_shapes(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(f"groupmixformer_{name}").state_dict()
    assert [(key, tuple(value.shape)) for key, value in state.items()] == list(golden_numbers.layout(name).items())


@pytest.fixture(scope="module", params=["miny", "small"])
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


@pytest.mark.parametrize("name", [*NAMES[:4], pytest.param("large", marks=pytest.mark.long)])
def test_parameters_and_flops_are_the_released_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.flops.flop_count_table", lambda *args, **options: "")  # slow, and not looked at
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


@pytest.mark.parametrize("name", NAMES)
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


def modules_of(network: nn.Module, kind: type) -> Iterable[nn.Module]:
    return [module for module in network.modules() if isinstance(module, kind)]


def assert_fresh_linear(layer: nn.Linear) -> None:
    assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * layer.weight.numel()))
    assert abs(layer.weight.mean().item()) < 5 * 0.02 / math.sqrt(layer.weight.numel())
    assert not layer.bias.any()


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

    def __init__(self, state: dict[str, Tensor], training: bool) -> None:
        self.state, self.training = state, training

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
        channels, segment = x.shape[1], x.shape[1] // 5
        head = 4 * segment // 8
        qkv = self.linear(f"{name}.qkv", x).split(channels, dim=1)

        mixed: tuple[list[Tensor], ...] = ([], [], [])  # of q, k and v: their first four segments
        for i in range(4):
            parts = [one[:, i * segment : (i + 1) * segment] for one in qkv]
            if i > 0:
                parts = [self.separable(f"{name}.aggregator.agg{i}", part) for part in parts]
            for segments, part in zip(mixed, self.batch_norm(f"{name}.aggregator.norm{i}", *parts)):
                segments.append(self.hardswish(part))
        q, k, v = (torch.cat(segments, dim=1) for segments in mixed)

        local = self.separable(f"{name}.aggregator.agg0.conv", torch.cat([one[:, 4 * segment :] for one in qkv], dim=1))
        local = self.hardswish(self.layer_norm(f"{name}.aggregator.agg0.norm", local, eps=1e-5))

        attended = []
        for start in range(0, 8 * head, head):
            q1, k1, v1 = (one[:, start : start + head].flatten(2) for one in (q, k, v))  # (B, d, N)
            share_of_tokens = k1.exp() / k1.exp().sum(2, keepdim=True)
            attended.append(torch.einsum("bin,bim,bjm->bjn", q1, share_of_tokens, v1))
        windows = v.split([2 * head, 3 * head, 3 * head], dim=1)
        position = torch.cat([self.conv(f"{name}.crpe.conv_list.{i}", part) for i, part in enumerate(windows)], dim=1)
        y = torch.cat(attended, dim=1).reshape(q.shape) / (channels / 8) ** 0.5 + q * position
        return self.linear(f"{name}.proj", torch.cat([y, local], dim=1))

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


@pytest.mark.parametrize(("size", "training"), [((33, 47), False), ((33, 47), True), ((37, 200), True)], ids=str)
def test_the_network_is_its_plain_formulation_at_any_size(size: tuple[int, int], training: bool) -> None:
    network = small_network(**WIDE).double().train(training)
    state, images = plain_state(network), golden_numbers.images(3, *size).double()
    logits, expected = network(images), PlainNetwork(state, training)(images)
    assert relative_error(logits, expected) < 1e-11
    logits.square().sum().backward()
    expected.square().sum().backward()
    assert_same_gradients(network, state)


@pytest.mark.long
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
        (dict(num_heads=6), ("num_heads=6", "multiple of 8")),
        (dict(num_heads=12, embed_dims=(30, 60, 90, 120)), ("num_heads=12", "multiple of 8")),
        (dict(num_heads=0), ("num_heads=0", "multiple of 8")),
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


# --------------------------------------------------------------------------------------------------- timm: entry points
def test_every_variant_is_an_entry_point_of_timm() -> None:
    assert (
        sorted(timm.list_models("groupmixformer*")) == sorted(VARIANTS) == sorted(f"groupmixformer_{n}" for n in NAMES)
    )
    assert timm.list_models("groupmixformer*", pretrained=True) == []  # no weights are hosted


@pytest.mark.parametrize("name", NAMES)
def test_the_default_configuration_describes_the_network(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(f"groupmixformer_{name}")
        features = network.eval().forward_features(torch.empty(1, *network.default_cfg["input_size"]))
    cfg, state = network.default_cfg, network.state_dict()
    assert cfg["architecture"] == f"groupmixformer_{name}" and not cfg["url"] and "hf_hub_id" not in cfg
    assert features.shape == (1, network.num_features, *cfg["pool_size"])
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0] == network.in_chans
    assert state[f"{cfg['classifier']}.weight"].shape == (cfg["num_classes"], network.head_hidden_size)
    assert network.num_classes == cfg["num_classes"] == 1000
    assert network.get_classifier() is network.head


def test_the_evaluation_transform_is_the_released_one() -> None:
    data = timm.data.resolve_data_config(model=small_network())
    assert data["input_size"] == (3, 224, 224) and data["crop_pct"] == 0.875 and data["interpolation"] == "bicubic"
    assert data["mean"] == (0.485, 0.456, 0.406) and data["std"] == (0.229, 0.224, 0.225)


def test_asking_for_hosted_weights_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for groupmixformer_miny"):
        timm.create_model("groupmixformer_miny", pretrained=True)


def test_backward_gives_every_parameter_a_gradient() -> None:
    step = train_step(small_network(), golden_numbers.images(2, 64, 96))
    gradients = {name: step[name] for name, _ in small_network().named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradient.any() for gradient in gradients.values())


def test_logits_are_the_head_of_the_features() -> None:
    network, images = small_network(), golden_numbers.images(2, 64, 96)
    features = network.forward_features(images)
    pooled = network.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    assert torch.equal(network(images), network.forward_head(features))
    assert torch.equal(network(images), network.head(pooled))


@pytest.mark.parametrize("in_chans", [1, 4])
def test_images_may_have_other_channels(in_chans: int) -> None:
    network = small_network(in_chans=in_chans)
    assert network.conv_stem.proj1.weight.shape == (5, in_chans, 3, 3)
    assert network(torch.zeros(2, in_chans, 32, 32)).shape == (2, 7)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean((2, 3)),
    "max": lambda x: x.amax((2, 3)),
    "avgmax": lambda x: (x.mean((2, 3)) + x.amax((2, 3))) / 2,
    "catavgmax": lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1),
}


@pytest.mark.parametrize("global_pool", list(POOLINGS))
@pytest.mark.parametrize("how", ["created", "reset"])
def test_global_pool_selects_the_pooling(global_pool: str, how: str) -> None:
    images = golden_numbers.images(2, 64, 96)
    if how == "created":
        network = small_network(global_pool=global_pool)
    else:
        network = small_network()
        network.reset_classifier(7, global_pool)
    pooled = POOLINGS[global_pool](network.forward_features(images))
    torch.testing.assert_close(network(images), F.linear(pooled, network.head.weight, network.head.bias))
    assert network.head_hidden_size == pooled.shape[1]


@pytest.mark.parametrize("how", ["created", "reset"])
def test_without_classes_the_network_gives_features(how: str) -> None:
    network, images = small_network(), golden_numbers.images(2, 64, 96)
    features = network.forward_features(images)
    for global_pool, expected in ((None, features.mean((2, 3))), ("", features)):
        if how == "created":
            network = small_network(num_classes=0, global_pool=global_pool)
        else:
            network.reset_classifier(0, global_pool)
        assert isinstance(network.get_classifier(), nn.Identity) and network.num_classes == 0
        torch.testing.assert_close(network(images), expected)


def test_reset_classifier_gives_a_fresh_head_where_the_network_is() -> None:
    network = small_network().double()
    network.reset_classifier(500)
    assert network.num_classes == 500 and network.get_classifier() is network.head
    assert network.head.weight.shape == (500, 40) and network.head.weight.dtype == torch.float64
    assert_fresh_linear(network.head)
    assert network(golden_numbers.images(2, 32, 32).double()).shape == (2, 500)


def test_classes_without_pooling_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes=7 needs pooling"):
        small_network(global_pool="")


# ------------------------------------------------------------------------------------------------------- timm: features
@pytest.mark.parametrize("out_indices", [None, (0,), (1, 3), (0, 1, 2), (-2, -1)], ids=str)
def test_features_only_gives_the_chosen_stage_maps(out_indices: tuple[int, ...] | None) -> None:
    images = golden_numbers.images(2, 64, 96)
    network = small_network(features_only=True, out_indices=out_indices)
    chosen = [i % 4 for i in out_indices or (0, 1, 2, 3)]
    stage_maps = small_network().forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(network(images), [stage_maps[i] for i in chosen], rtol=0, atol=0)
    assert network.feature_info.channels() == [SMALL["embed_dims"][i] for i in chosen]
    assert network.feature_info.reduction() == [(4, 8, 16, 32)[i] for i in chosen]
    beyond = f"model.groupmixformer_backbone.{max(chosen) + 1}"  # what no chosen map needs is not there
    assert not any(name.startswith((beyond, "model.norm4", "model.head")) for name in network.state_dict())


@pytest.mark.parametrize("feature_cls", ["hook", "fx"])
def test_feature_info_names_the_modules_that_give_the_maps(feature_cls: str) -> None:
    images = golden_numbers.images(2, 64, 96)
    network = timm.create_model("groupmixformer_miny", **SMALL, features_only=True, feature_cls=feature_cls).eval()
    expected = timm.create_model("groupmixformer_miny", **SMALL).eval()
    state = {name.split(".", 1)[-1]: value for name, value in network.state_dict().items()}
    expected.load_state_dict(state, strict=False)
    torch.testing.assert_close(network(images), expected.forward_intermediates(images, intermediates_only=True))


def test_forward_intermediates_gives_the_features_and_all_maps() -> None:
    network, images = small_network(), golden_numbers.images(2, 64, 96)
    features, maps = network.forward_intermediates(images)
    assert torch.equal(features, network.forward_features(images))
    assert [m.shape[1:] for m in maps] == [(10, 16, 24), (20, 8, 12), (30, 4, 6), (40, 2, 3)]
    assert torch.equal(network.norm4(maps[-1]), features)


@pytest.mark.parametrize(
    ("indices", "chosen"), [(2, [2, 3]), ([0, 2], [0, 2]), ([-1], [3]), (None, [0, 1, 2, 3])], ids=str
)
def test_forward_intermediates_takes_indices(indices: Any, chosen: list[int]) -> None:
    network, images = small_network(), golden_numbers.images(2, 64, 96)
    _, every = network.forward_intermediates(images)
    maps = network.forward_intermediates(images, indices=indices, intermediates_only=True)
    torch.testing.assert_close(maps, [every[i] for i in chosen], rtol=0, atol=0)


def test_forward_intermediates_normalises_the_last_map_alone() -> None:
    network, images = small_network(), golden_numbers.images(2, 64, 96)
    features, raw = network.forward_intermediates(images)
    maps = network.forward_intermediates(images, norm=True, intermediates_only=True)
    torch.testing.assert_close(maps, [*raw[:3], features], rtol=0, atol=0)


@pytest.mark.parametrize(("stop_early", "stages_run"), [(False, 4), (True, 2)])
def test_forward_intermediates_may_stop_early(stop_early: bool, stages_run: int) -> None:
    network, images, run = small_network(), golden_numbers.images(2, 64, 96), []
    for stage in network.groupmixformer_backbone:
        stage.register_forward_hook(lambda *args: run.append(1))
    features, maps = network.forward_intermediates(images, indices=[0, 1], stop_early=stop_early)
    assert (len(run), len(maps)) == (stages_run, 2)
    assert torch.equal(features, maps[-1]) == stop_early


def test_forward_intermediates_refuses_other_formats_and_stages() -> None:
    network, images = small_network(), golden_numbers.images(2, 64, 96)
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        network.forward_intermediates(images, output_fmt="NLC")
    with pytest.raises(AssertionError, match="4"):
        network.forward_intermediates(images, indices=[4])


@pytest.mark.parametrize("prune_norm", [False, True])
@pytest.mark.parametrize("indices", [[0, 1], [1, 3], 1], ids=str)
def test_a_pruned_network_gives_the_same_maps(indices: Any, prune_norm: bool) -> None:
    network, images = small_network(), golden_numbers.images(2, 64, 96)
    expected = network.forward_intermediates(images, indices=indices, intermediates_only=True)
    chosen = network.prune_intermediate_layers(indices, prune_norm=prune_norm)
    assert len(network.groupmixformer_backbone) == len(network.patch_embed_layers) == chosen[-1] + 1
    assert isinstance(network.head, nn.Identity) and network.num_classes == 0
    assert isinstance(network.norm4, nn.Identity) == (prune_norm or chosen[-1] < 3)
    features, maps = network.forward_intermediates(images, indices=chosen)
    torch.testing.assert_close(maps, expected, rtol=0, atol=0)
    assert torch.equal(features, network.norm4(maps[-1]))


def test_a_pruned_network_takes_a_head_as_wide_as_its_last_stage() -> None:
    network, images = small_network(), golden_numbers.images(2, 64, 96)
    network.prune_intermediate_layers([1], prune_norm=True)
    assert network.num_features == network.head_hidden_size == 20
    network.reset_classifier(5)
    assert network(images).shape == (2, 5)
    assert network.forward_head(network.forward_features(images), pre_logits=True).shape == (2, 20)


def test_the_maps_of_features_only_train_with_gradient_checkpointing() -> None:
    images, gradients, runs_of_blocks = golden_numbers.images(2, 64, 96), [], []
    for enable in (False, True):
        network = small_network(features_only=True, drop_path_rate=0.0).train()
        network.set_grad_checkpointing(enable)
        for block in network.model.groupmixformer_backbone[1].gma_stage:
            block.register_forward_pre_hook(lambda *args, enable=enable: runs_of_blocks.append(enable))
        sum(maps.square().mean() for maps in network(images)).backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert (runs_of_blocks.count(False), runs_of_blocks.count(True)) == (2, 4), "each block once more, going back"


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1,)], ids=str)
def test_features_only_loads_the_weights_of_a_whole_network(out_indices: tuple[int, ...], tmp_path: Path) -> None:
    whole, images = small_network(), golden_numbers.images(2, 64, 96)
    expected = whole.forward_intermediates(images, list(out_indices), intermediates_only=True)
    torch.save({"model": whole.state_dict()}, tmp_path / "released.pth")
    options = {**SMALL, "features_only": True, "out_indices": out_indices}
    loaded = timm.create_model("groupmixformer_miny", **options, checkpoint_path=str(tmp_path / "released.pth")).eval()
    torch.testing.assert_close(loaded(images), expected, rtol=0, atol=0)
    for source in (loaded, whole):  # its own names load as ever; either below another module too
        again = nn.ModuleDict({"body": timm.create_model("groupmixformer_miny", **options)}).eval()
        again.load_state_dict(nn.ModuleDict({"body": source}).state_dict())
        torch.testing.assert_close(again["body"](images), expected, rtol=0, atol=0)


def test_features_only_refuses_weights_that_are_not_its_own() -> None:
    state = small_network().state_dict()
    network = small_network(features_only=True, out_indices=(1,))
    for wrong, name in (
        ({key: value for key, value in state.items() if key != "conv_stem.proj1.bias"}, "conv_stem.proj1.bias"),
        (state | {"conv_stem.proj3.bias": torch.zeros(1)}, "conv_stem.proj3.bias"),
        (state | {"groupmixformer_backbone.4.a": torch.zeros(1)}, "groupmixformer_backbone.4.a"),
        (state | {"scale": torch.zeros(1)}, "scale"),
    ):
        with pytest.raises(RuntimeError, match=f"model.{name}"):
            network.load_state_dict(wrong)


def test_init_weights_fills_a_network_that_was_made_without_storage() -> None:
    network = timm.create_model("groupmixformer_miny", **SMALL, device="meta", dtype=torch.float64)
    assert {p.device.type for p in network.parameters()} == {"meta"}
    network.to_empty(device="cpu")
    for value in network.state_dict().values():
        value.fill_(7)
    network.init_weights()
    fresh = timm.create_model("groupmixformer_miny", **SMALL).state_dict()
    for name, value in network.state_dict().items():
        if fresh[name].ndim == 0 or fresh[name].unique().numel() == 1:  # norms, biases of Linears, statistics
            assert torch.equal(value, fresh[name].to(value.dtype)), name
        elif value.numel() >= 100:
            assert 0.5 < value.std() / fresh[name].std() < 2, name
        assert not (value == 7).any(), name
    assert_fresh_linear(network.head)


# ---------------------------------------------------------------------------------- timm: layer decay, checkpoint files
LAYERS = [  # of SMALL, each by the start of its parameters' names
    ("conv_stem.",),
    ("patch_embed_layers.0.", "groupmixformer_backbone.0.gma_stage.0."),
    ("patch_embed_layers.1.", "groupmixformer_backbone.1.gma_stage.0."),
    ("groupmixformer_backbone.1.gma_stage.1.",),
    ("patch_embed_layers.2.", "groupmixformer_backbone.2.gma_stage.0."),
    ("groupmixformer_backbone.2.gma_stage.1.",),
    ("patch_embed_layers.3.", "groupmixformer_backbone.3.gma_stage.0.", "norm4."),
    ("head.",),
]


def layer_of(name: str) -> int:
    (layer,) = (i for i, starts in enumerate(LAYERS) if name.startswith(starts))
    return layer


def test_group_matcher_makes_a_layer_of_the_stem_of_every_block_and_of_the_head() -> None:
    network = small_network()
    layers = group_parameters(network, network.group_matcher())
    assert len(layers) == len(LAYERS) == 1 + sum(SMALL["depths"]) + 1
    assert {name: layer for layer, names in layers.items() for name in names} == {
        name: layer_of(name) for name, _ in network.named_parameters()
    }


def test_the_coarse_group_matcher_makes_a_layer_of_every_stage() -> None:
    network = small_network()
    layers = group_parameters(network, network.group_matcher(coarse=True))
    assert [
        {name.split(".gma_stage")[0].split(".proj")[0].split(".norm")[0] for name in layers[i]} for i in range(6)
    ] == [
        {"conv_stem"},
        *({f"patch_embed_layers.{i}", f"groupmixformer_backbone.{i}"} for i in range(4)),
        {"norm4.weight", "norm4.bias", "head.weight", "head.bias"},
    ]


def test_layer_decay_scales_the_learning_rate_of_every_layer() -> None:
    network = small_network()
    optimizer = create_optimizer_v2(network, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    names = {p: name for name, p in network.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            seen[names[p]] = group["lr_scale"]
            assert group["weight_decay"] == (0.05 if p.ndim > 1 else 0.0)
    assert seen == {name: 0.5 ** (len(LAYERS) - 1 - layer_of(name)) for name in names.values()}


CHECKPOINTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "released": lambda state: {"model": state},
    "training": lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3, "config": "MODEL: {}"},
    "state_dict": lambda state: {"state_dict": state},
    "bare": lambda state: state,
    "distributed": lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    "bare distributed": lambda state: {f"module.{name}": value for name, value in state.items()},
}


@pytest.mark.parametrize("kind", list(CHECKPOINTS))
def test_checkpoint_filter_fn_finds_the_weights(kind: str) -> None:
    state = small_network().state_dict()
    found = checkpoint_filter_fn(CHECKPOINTS[kind](state), small_network())
    assert found.keys() == state.keys() and all(found[name] is value for name, value in state.items())


@pytest.mark.parametrize("kind", list(CHECKPOINTS))
@pytest.mark.parametrize("by", ["checkpoint_path", "overlay"])
def test_create_model_loads_a_checkpoint_file(kind: str, by: str, tmp_path: Path) -> None:
    network, images, path = small_network(), golden_numbers.images(2, 32, 32), str(tmp_path / "weights.pth")
    torch.save(CHECKPOINTS[kind](network.state_dict()), path)
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=path, num_classes=7))
    options = dict(checkpoint_path=path) if by == "checkpoint_path" else overlay
    loaded = timm.create_model("groupmixformer_miny", **SMALL, **options).eval()
    assert torch.equal(loaded(images), network(images))


def test_create_model_loads_a_safetensors_file(tmp_path: Path) -> None:
    network, images, path = small_network(), golden_numbers.images(2, 32, 32), str(tmp_path / "weights.safetensors")
    safetensors.torch.save_file(network.state_dict(), path)
    loaded = timm.create_model("groupmixformer_miny", **SMALL, checkpoint_path=path).eval()
    assert torch.equal(loaded(images), network(images))


def test_create_model_fits_loaded_weights_to_other_classes_and_channels(tmp_path: Path) -> None:
    network, path = small_network(), str(tmp_path / "weights.pth")
    torch.save({"model": network.state_dict()}, path)
    options = {**SMALL, "num_classes": 3, "in_chans": 1, "pretrained_cfg_overlay": dict(file=path, num_classes=7)}
    loaded = timm.create_model("groupmixformer_miny", pretrained=True, **options).state_dict()
    for name, value in network.state_dict().items():
        if name == "conv_stem.proj1.weight":
            value = value.sum(1, keepdim=True)
        if not name.startswith("head."):
            torch.testing.assert_close(loaded[name], value)
    assert loaded["head.weight"].shape == (3, 40)


# ----------------------------------------------------------------------------------------------- gradient checkpointing
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_changes_neither_gradients_nor_running_statistics(
    drop_path_rate: float, dtype: torch.dtype
) -> None:
    images, network = golden_numbers.images(2, 64, 96), small_network(drop_path_rate=drop_path_rate)
    recomputed = copy.deepcopy(network)
    recomputed.set_grad_checkpointing()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        expected, got = train_step(network, images), train_step(recomputed, images)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_checkpointing_may_be_switched_off_again_and_leaves_the_norms_as_they_were() -> None:
    images, network = golden_numbers.images(2, 64, 96), small_network()
    expected = train_step(copy.deepcopy(network), images)
    network.set_grad_checkpointing()
    train_step(copy.deepcopy(network), images)
    network.set_grad_checkpointing(False)
    got = train_step(network, images)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert {norm.momentum for norm in modules_of(network, nn.BatchNorm2d)} == {0.1}


def kept_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network.train()(images)
    kept = sum(storages.values())
    out.sum().backward()
    return kept


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_checkpointing_needs_less_memory(drop_path_rate: float) -> None:
    images = golden_numbers.images(2, 64, 96)
    network = small_network(depths=(2, 2, 6, 2), drop_path_rate=drop_path_rate)
    kept = kept_bytes(network, images)
    network.set_grad_checkpointing()
    assert kept_bytes(network, images) < kept / 3


# -------------------------------------------------------------------------------------------------------- torch's tools
@pytest.mark.parametrize("training", [False, True])
def test_torchscript_gives_the_same_values(training: bool) -> None:
    network, images = small_network(drop_path_rate=0.2).train(training), golden_numbers.images(2, 33, 47)
    for drop_path in modules_of(network, DropPath):
        drop_path.drop_prob = 0.0  # TorchScript draws other random numbers
    scripted = torch.jit.script(copy.deepcopy(network))
    torch.testing.assert_close(scripted(images), network(images))


@pytest.mark.parametrize(
    "options", [dict(return_interm_layers=True), dict(features_only=True, out_indices=(1, 2))], ids=str
)
def test_torchscript_gives_the_same_maps(options: dict[str, Any]) -> None:
    network, images = small_network(**options), golden_numbers.images(2, 33, 47)
    torch.testing.assert_close(torch.jit.script(network)(images), network(images))


def test_a_traced_network_takes_other_sizes() -> None:
    network, images = small_network(), golden_numbers.images(3, 33, 47)
    traced = torch.jit.trace(network, golden_numbers.images(2, 64, 96))
    torch.testing.assert_close(traced(images), network(images))


@pytest.mark.parametrize("training", [False, True])
def test_a_symbolically_traced_network_takes_any_size(training: bool) -> None:
    network, images = small_network(drop_path_rate=0.2).train(training), golden_numbers.images(3, 33, 47)
    traced = torch.fx.symbolic_trace(copy.deepcopy(network))
    torch.manual_seed(0)
    expected = network(images)
    torch.manual_seed(0)
    torch.testing.assert_close(traced(images), expected)


def test_feature_extraction_finds_inner_modules() -> None:
    network, images = small_network(), golden_numbers.images(2, 64, 96)
    extractor = GraphExtractNet(network, ["groupmixformer_backbone.2", "norm4"])
    features, maps = network.forward_intermediates(images)
    torch.testing.assert_close(extractor(images), [maps[2], features])


def test_export_gives_the_same_values_for_any_batch() -> None:
    network = small_network(**SHALLOW)
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(network, (golden_numbers.images(2, 33, 47),), dynamic_shapes=batch).module()
    images = golden_numbers.images(3, 33, 47)
    torch.testing.assert_close(exported(images), network(images))


@pytest.mark.long
def test_export_gives_the_same_values_for_any_size() -> None:
    network = small_network(**SHALLOW)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    exported = torch.export.export(network, (golden_numbers.images(2, 64, 96),), dynamic_shapes=sizes).module()
    images = golden_numbers.images(3, 33, 47)
    torch.testing.assert_close(exported(images), network(images))


@pytest.fixture
def fresh_compiler() -> Iterable[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [False, True])
def test_compile_breaks_no_graph(training: bool, fresh_compiler: None) -> None:
    network, images = small_network(**SHALLOW).train(training), golden_numbers.images(2, 33, 47)
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), network(images))


@pytest.mark.long
def test_compile_and_checkpointing_go_together(fresh_compiler: None) -> None:
    network, images = small_network(**SHALLOW, drop_path_rate=0.2), golden_numbers.images(2, 64, 96)
    expected = train_step(copy.deepcopy(network), images)
    network.set_grad_checkpointing()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    got = train_step(compiled, images)
    for name, value in expected.items():
        torch.testing.assert_close(got[f"_orig_mod.{name}"], value, msg=name)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_copies_compute_the_same(copied: Callable[[nn.Module], nn.Module]) -> None:
    network, images = small_network(drop_path_rate=0.2), golden_numbers.images(2, 33, 47)
    assert torch.equal(copied(network)(images), network(images))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_tokens_and_maps_share_one_layout(training, memory_format) -> None:
    """Whatever the layout of the images: a transposed one would be copied in every norm and convolution."""
    network = timm.create_model("groupmixformer_miny", num_classes=10).train(training)
    layouts = []

    def note(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            layouts.append(output.is_contiguous(memory_format=torch.channels_last))
        else:
            layouts.append(inputs[0].is_contiguous())

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.LayerNorm | nn.Linear):
            module.register_forward_hook(note)
    network(torch.randn(2, 3, 64, 96).contiguous(memory_format=memory_format))
    assert len(layouts) > 300 and all(layouts)


def test_channels_last_gives_the_same_values() -> None:
    network, images = small_network().double(), golden_numbers.images(2, 64, 96).double()
    expected = network(images)
    images = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(images), expected)
    torch.testing.assert_close(network.to(memory_format=torch.channels_last)(images), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_finite_and_near(dtype: torch.dtype) -> None:
    network, images = small_network(**WIDE), golden_numbers.images(2, 64, 96)
    with torch.autocast("cpu", dtype=dtype):
        logits, step = network(images), train_step(copy.deepcopy(network), images)
    assert logits.dtype == dtype
    assert relative_error(logits, network(images)) < 8 * torch.finfo(dtype).eps
    assert all(value.isfinite().all() for value in step.values())


def test_an_empty_batch_gives_no_logits() -> None:
    assert small_network()(torch.empty(0, 3, 64, 64)).shape == (0, 7)


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


def test_the_model_file_works_in_another_project(tmp_path: Path) -> None:
    shutil.copy(MODEL_FILE, tmp_path / "backbone.py")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import timm, torch, backbone\n"
        "network = timm.create_model('groupmixformer_miny', features_only=True)\n"
        "print([m.shape[1] for m in network(torch.zeros(2, 3, 64, 64))])"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "[40, 80, 160, 160]", run.stderr


def test_factory_arguments_place_and_cast_the_network() -> None:
    network = timm.create_model("groupmixformer_miny", device="meta", dtype=torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in network.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_classifier_is_in_the_networks_mode(training: bool) -> None:
    network = small_network(drop_rate=0.5).train(training)
    network.reset_classifier(5, "max")
    assert all(module.training == training for module in network.modules())
