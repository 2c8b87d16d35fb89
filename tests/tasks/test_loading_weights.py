"""Weights from files into classifiers: which fit, which head they bring, and what is said where they do not."""

import random

import pytest
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from configs import UserError, read_config, with_num_classes
from models import VARIANTS
from models.groupmixformer import checkpoint_filter_fn
from tasks import keys_of
from tasks.classification.weights import (
    CONFIGS_FOLDER,
    Weights,
    fitting_config,
    load_pretrained,
    load_weights,
    network_with,
    read_weights,
)
from tasks.networks import build_model


def load_whole(network, path, **options) -> str:
    """Read a file and load its weights, as an evaluation does; returns what was loaded."""
    weights = read_weights(path)
    load_weights(network, weights, path, **options)
    return weights.about


TINY_NETWORK = ("MODEL.GMA.EMBEDDING_DIMS", "[10,10,10,10]", "MODEL.GMA.SERIAL_DEPTHS", "[1,1,1,1]")


@pytest.fixture
def make_network(make_config):
    """A network of a few thousand parameters, with weights of its own."""

    def make(num_classes: int = 7, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        network = build_model(make_config("--opts", *TINY_NETWORK, "MODEL.GMA.NUM_CLASSES", str(num_classes)))
        with torch.no_grad():
            for tensor in network.state_dict().values():  # running statistics and biases too
                if tensor.is_floating_point():
                    tensor.uniform_(-1, 1)
        return network

    return make


def message_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def has_weights_of(network: nn.Module, state_dict: dict[str, Tensor]) -> bool:
    own = network.state_dict()
    return list(own) == list(state_dict) and all(torch.equal(own[name], state_dict[name]) for name in own)


@pytest.mark.parametrize("key", ["model", "state_dict", "bare", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_forms_of_weight_files(tmp_path, make_network, key, prefix):
    source, target = make_network(seed=1), make_network(seed=2)
    weights = source.state_dict()
    content = {f"{prefix}{name}": value for name, value in weights.items()}
    torch.save(content if key == "bare" else {key: content}, tmp_path / "w.pth")
    assert not has_weights_of(target, weights)
    said = load_whole(target, tmp_path / "w.pth")
    assert has_weights_of(target, weights)
    assert f"{'ema' if key == 'model_ema' else 'raw'} weights" in said and str(tmp_path / "w.pth") in said


PREFIXES = ("_orig_mod.", "module._orig_mod.", "model.", "backbone.", "model.backbone.", "net._fsdp_wrapped_module.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_wrappers_add_to_names_is_taken_off(tmp_path, make_network, prefix):
    """torch.compile, DDP, Lightning, detectors, FSDP; timm's create_model and torch.hub too."""
    source, target = make_network(seed=1), make_network(seed=2)
    torch.save({"model": {f"{prefix}{name}": value for name, value in source.state_dict().items()}}, tmp_path / "w.pth")
    for load in (load_whole, load_pretrained):
        target = make_network(seed=2)
        assert load(target, tmp_path / "w.pth") == f"raw weights of {tmp_path / 'w.pth'}"
        assert has_weights_of(target, source.state_dict())
    loaded = checkpoint_filter_fn(torch.load(tmp_path / "w.pth"), target)
    assert loaded.keys() == source.state_dict().keys()


def test_compiled_blocks_and_what_lies_beside_the_network(tmp_path, make_network):
    """A name in the middle, parts of a detector, and a head of its own."""
    source, target = make_network(seed=1), make_network(seed=2)
    fresh = target.head.weight.clone()
    blocks = {n.replace(".att.", "._orig_mod.att."): v for n, v in source.state_dict().items() if "head." not in n}
    assert any("_orig_mod" in name for name in blocks)
    others = {"decoder.0.weight": torch.zeros(1), "head.fc.weight": torch.zeros(1)}
    torch.save({"state_dict": {f"backbone.{name}": v for name, v in blocks.items()} | others}, tmp_path / "w.pth")
    said = load_pretrained(target, tmp_path / "w.pth")
    assert "2 entries of other parts are left out (decoder.0.weight, head.fc.weight)" in said
    assert "no head in it, a fresh one has 7" in said
    assert torch.equal(target.norm4.weight, source.norm4.weight) and torch.equal(target.head.weight, fresh)


def test_two_networks_in_a_file_are_named(tmp_path, make_network):
    state = make_network().state_dict()
    torch.save({f"{who}.{name}": value for who in ("student", "teacher") for name, value in state.items()},
               tmp_path / "w.pth")  # fmt: skip
    message = message_of(read_weights, tmp_path / "w.pth")
    assert "holds 2 networks, under 'student.', 'teacher.'" in message


def test_counters_that_old_files_lack_are_filled_as_by_torch(tmp_path, make_network):
    source, target = make_network(seed=1), make_network(seed=2)
    old = {name: v for name, v in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    make_network(seed=3).load_state_dict(old)  # torch's own strict load takes it
    torch.save(old, tmp_path / "w.pth")
    load_whole(target, tmp_path / "w.pth")
    assert torch.equal(target.norm4.running_var, source.norm4.running_var) and not target.norm4.num_batches_tracked


def test_advice_is_given_only_where_it_differs_from_what_was_done(tmp_path, make_network, make_config):
    """The network is the configuration's: not to be told to use that configuration."""
    with torch.device("meta"):
        network = build_model(make_config())
    state = {name: torch.zeros_like(v, device="cpu") for name, v in network.state_dict().items()}
    for missing, said in (("norm4.bias", "not all weights of this network, or more: 1 missing (norm4.bias)"),
                          ("head.", "has no head.weight, so it tells no classes; fine-tune it with")):  # fmt: skip
        torch.save({n: v for n, v in state.items() if not n.startswith(missing)}, tmp_path / "w.pth")
        message = message_of(load_whole, network, tmp_path / "w.pth")
        assert said in message and "--cfg" not in message
    torch.save({"model": make_network().state_dict(), "config": "MODEL: {NAME: mine}"}, tmp_path / "w.pth")
    message = message_of(load_pretrained, network, tmp_path / "w.pth")
    assert "than the configuration describes; train with the --cfg of mine, or evaluate without --cfg" in message


def test_a_released_training_checkpoint(tmp_path, make_network):
    source, target = make_network(seed=1), make_network(seed=2)
    optimizer = torch.optim.AdamW(source.parameters()).state_dict()
    released = {"model": source.state_dict(), "optimizer": optimizer, "epoch": 299, "config": CfgNode({"A": {"B": 1}})}
    torch.save(released, tmp_path / "w.pth")
    load_whole(target, tmp_path / "w.pth")
    assert has_weights_of(target, source.state_dict())


def test_weights_of_another_network_are_named(tmp_path, make_network):
    network = make_network()
    weights = dict(network.state_dict())
    missing = weights.pop("norm4.weight")
    weights["extra.weight"] = missing
    weights["norm4.bias"] = torch.zeros(11)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.save({"model": weights}, tmp_path / "w.pth")
    for load in (load_whole, load_pretrained):
        message = message_of(load, network, tmp_path / "w.pth")
        assert message.startswith(f"{tmp_path / 'w.pth'}: not all weights of this network, or more: ")
        assert "1 missing (norm4.weight)" in message
        assert "1 unexpected (extra.weight)" in message
        assert "1 of another shape (norm4.bias (11,) for (10,))" in message
    assert has_weights_of(network, before), "nothing is loaded by halves"


def test_many_differences_are_cut_short(make_config):
    config = make_config("--opts", *TINY_NETWORK)
    state = {"head.weight": torch.zeros(1, 1)} | {
        n: v for n, v in build_model(config).state_dict().items() if "mlp" in n
    }
    message = message_of(network_with, config, Weights({}, state, ""), "f.pth")
    assert ", ...)" in message and len(message) < 400


@pytest.mark.parametrize("name", [*VARIANTS, "groupmixformer_digits"])
def test_the_configuration_that_fits_is_named(tmp_path, make_network, name):
    config = read_config(["--cfg", str(CONFIGS_FOLDER / f"{name}.yaml")], keys_of, lambda line: None)
    with torch.device("meta"):
        weights = build_model(with_num_classes(config, 7)).state_dict()
    assert fitting_config(weights) == name
    if name == "groupmixformer_miny":
        torch.save({key: torch.zeros_like(value, device="cpu") for key, value in weights.items()}, tmp_path / "w.pth")
        message = message_of(load_whole, make_network(7), tmp_path / "w.pth")
        assert f": weights of {name}, use --cfg configs/{name}.yaml: " in message


def test_networks_of_other_sizes_fit_no_configuration(make_config):
    for opts in (TINY_NETWORK, ("MODEL.GMA.GROUP_SIZES", "[3,5,5]")):
        assert not fitting_config(build_model(make_config("--opts", *opts)).state_dict())


def test_half_precision_weights_load(tmp_path, make_network):
    source, target = make_network(seed=1), make_network(seed=2)
    torch.save({"model": {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}},
               tmp_path / "w.pth")  # fmt: skip
    load_whole(target, tmp_path / "w.pth")
    assert target.head.weight.dtype == torch.float32
    torch.testing.assert_close(target.head.weight, source.head.weight, atol=1e-3, rtol=1e-3)


def test_evaluating_weights_of_other_classes_is_explained(tmp_path, make_network):
    torch.save({"model": make_network(10).state_dict()}, tmp_path / "w.pth")
    message = message_of(load_whole, make_network(7), tmp_path / "w.pth")
    assert "10 classes" in message and "7" in message and "--pretrained" in message


@pytest.mark.parametrize(
    ("trained_on", "said"),
    [
        (["ant", "bee"], []),
        (None, []),
        (["0", "1"], []),  # numbers: the names were not known
        (["ant", "wasp"], ["1 of its 2 classes", "'wasp' against 'bee'"]),
    ],
)
def test_evaluating_on_classes_of_other_names_is_reported(tmp_path, make_network, trained_on, said):
    checkpoint = {"model": make_network(2).state_dict()} | ({"classes": trained_on} if trained_on else {})
    torch.save(checkpoint, tmp_path / "w.pth")
    lines = []
    load_whole(make_network(2), tmp_path / "w.pth", classes=["ant", "bee"], notify=lines.append)
    assert len(lines) == bool(said) and all(part in lines[0] for part in said)


def test_fine_tuning_keeps_a_fresh_head(tmp_path, make_network):
    source, target = make_network(10, seed=1), make_network(7, seed=2)
    fresh = {name: value.clone() for name, value in target.state_dict().items() if name.startswith("head.")}
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    said = load_pretrained(target, str(tmp_path / "w.pth"))
    assert "10" in said and "7" in said and "head" in said
    for name, value in target.state_dict().items():
        assert torch.equal(value, fresh[name] if name in fresh else source.state_dict()[name]), name


def test_fine_tuning_with_the_same_classes_takes_the_head(tmp_path, make_network):
    source, target = make_network(7, seed=1), make_network(7, seed=2)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    assert "head" not in load_pretrained(target, str(tmp_path / "w.pth"))
    assert has_weights_of(target, source.state_dict())


def test_fine_tuning_on_as_many_other_classes_says_that_the_head_is_kept(tmp_path, make_network):
    classes = ["ant", "bee", "cat"]
    torch.save({"model": make_network(3).state_dict(), "classes": ["ant", "fly", "cat"]}, tmp_path / "w.pth")
    said = load_pretrained(make_network(3), tmp_path / "w.pth", classes=classes)
    assert "its head too, although 1 of its 3 classes have other names than the data's, the first 'fly' against" in said
    assert "other names" not in load_pretrained(make_network(3), tmp_path / "w.pth", classes=["ant", "fly", "cat"])


def test_fine_tuning_from_a_backbone_without_a_head(tmp_path, make_network):
    source, target = make_network(seed=1), make_network(seed=2)
    backbone = {name: value for name, value in source.state_dict().items() if not name.startswith("head.")}
    torch.save(backbone, tmp_path / "w.pth")
    load_pretrained(target, str(tmp_path / "w.pth"))
    assert torch.equal(target.norm4.weight, source.norm4.weight)
    assert "has no head.weight" in message_of(load_whole, target, tmp_path / "w.pth"), "but it cannot be evaluated"


def test_fine_tuning_from_a_detectors_backbone_without_a_last_norm(tmp_path, make_network):
    source, target = make_network(seed=1), make_network(seed=2)
    fresh = target.norm4.weight.clone()
    backbone = {
        name: value for name, value in source.state_dict().items() if name.split(".")[0] not in ("head", "norm4")
    }
    torch.save(backbone, tmp_path / "w.pth")
    assert "no last norm (norm4) in it, a fresh one is used" in load_pretrained(target, tmp_path / "w.pth")
    assert torch.equal(target.norm4.weight, fresh)
    assert torch.equal(target.conv_stem.proj1.weight, source.conv_stem.proj1.weight)


@pytest.fixture
def weights_21k(tmp_path, make_network) -> tuple[nn.Module, str]:
    source = make_network(21841, seed=1)
    torch.save({"model": source.state_dict()}, tmp_path / "w21k.pth")
    return source, str(tmp_path / "w21k.pth")


def test_a_head_of_21841_classes_is_not_taken_for_imagenets(make_network, weights_21k):
    """1000 classes may be any: the head is left out like every other, unless a map says which row is which class."""
    assert "head of 21841 classes left out, a fresh one has 1000" in load_pretrained(make_network(1000), weights_21k[1])


def test_a_class_map_that_is_not_used_is_said(make_network, tmp_path):
    torch.save(make_network(7).state_dict(), tmp_path / "w.pth")
    said = load_pretrained(make_network(7), tmp_path / "w.pth", "map.txt")
    assert "MODEL.CLASS_MAP map.txt is not used: its head has 7 classes already" in said


def test_21k_head_is_mapped_to_1k(tmp_path, make_network, weights_21k):
    source, path = weights_21k
    rows = random.Random(0).sample(range(21841), 1000)
    (tmp_path / "map.txt").write_text("\n".join(map(str, rows)))
    target = make_network(1000, seed=2)
    said = load_pretrained(target, path, str(tmp_path / "map.txt"))
    assert "mapped from 21841 to 1000" in said
    assert torch.equal(target.head.weight, source.head.weight[rows])
    assert torch.equal(target.head.bias, source.head.bias[rows])
    assert torch.equal(target.norm4.weight, source.norm4.weight)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot be read"),
        ("1\n2\nthree\n", "cannot be read"),
        ("1\n2\n", "has 2"),
        ("\n".join(["0"] * 999 + ["21841"]), "from 0 to 21841"),
        ("\n".join(["0"] * 999 + ["-1"]), "from -1 to 0"),
        ("", "has 0"),
    ],
)
def test_wrong_class_map_is_reported(tmp_path, make_network, weights_21k, text, expected):
    path = tmp_path / "map.txt"
    if text is not None:
        path.write_text(text)
    network = make_network(1000)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    message = message_of(load_pretrained, network, weights_21k[1], str(path))
    assert "MODEL.CLASS_MAP" in message and str(path) in message and expected in message
    assert has_weights_of(network, before)


def test_class_map_without_a_head_to_map(tmp_path, make_network):
    weights = {name: value for name, value in make_network(10).state_dict().items() if name != "head.bias"}
    torch.save(weights, tmp_path / "w.pth")
    (tmp_path / "map.txt").write_text(" ".join("0" * 7))
    assert "head.bias" in message_of(load_pretrained, make_network(7), tmp_path / "w.pth", str(tmp_path / "map.txt"))
