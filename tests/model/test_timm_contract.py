"""timm's model contract: entry points, features, layer decay, checkpoint files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_numbers
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from small_networks import NAMES, SMALL, assert_fresh_linear, small_network, train_step
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from models import VARIANTS
from models.groupmixformer import checkpoint_filter_fn


# --------------------------------------------------------------------------------------------------- timm: entry points
def test_every_variant_is_an_entry_point_of_timm() -> None:
    assert (
        sorted(timm.list_models("groupmixformer*")) == sorted(VARIANTS) == sorted(f"groupmixformer_{n}" for n in NAMES)
    )
    assert timm.list_models("groupmixformer*", pretrained=True) == []  # no weights are hosted


@pytest.mark.parametrize("name", ["miny", "base"])
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


def test_create_model_takes_group_sizes() -> None:
    network = timm.create_model("groupmixformer_small", group_sizes=(3, 5), embed_dims=(64, 160, 320, 320))
    assert network.group_sizes == (3, 5)
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"embed_dims\[0\]=80 cannot be cut into 4 segments.*multiple of 32"):
        timm.create_model("groupmixformer_small", group_sizes=(3, 5))


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        (dict(num_heads=1), 5_733_120),
        (dict(num_heads=4), 5_733_120),
        # Of a block's parameters: 244 s + 6 s^2 where s = C / 5, without the branch 215 s + 3 s^2 where s = C / 4.
        (dict(local_branch=False), 5_733_120 + 3 * 114 + 3 * 60 - 16 * 552),
        # A / 8 * (2 * (9 + 1) + 3 * (25 + 1) + 3 * (49 + 1)) of a block, A = 32, 64, 128 and 128
        (dict(relative_position=False), 5_733_120 - 31 * (3 * 32 + 3 * 64 + 16 * 128)),
    ],
    ids=str,
)
def test_create_model_takes_ablations(options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        network = timm.create_model("groupmixformer_miny", **options)
    assert sum(p.numel() for p in network.parameters()) == parameters


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
