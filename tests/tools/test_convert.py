"""`python -m tools.convert`: every direction by equal logits, what a published file holds, and what is refused."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import golden_numbers
import pytest
import safetensors.torch
import timm
import torch
from small_networks import OTHER_GROUPS
from torch import Tensor, nn
from yacs.config import CfgNode

from configs import UserError
from models import VARIANTS, GroupMixFormer
from tools import convert as module
from tools.convert import SUFFIXES, convert, from_birder, main, read_weights, to_birder
from utils.checkpoint import load_file

SIZES = dict(embed_dims=(10, 20, 30, 40), depths=(1, 2, 2, 1), mlp_ratios=(2, 4, 2, 4), num_classes=7)


def network_of(seed: int, **options: Any) -> GroupMixFormer:
    """A small network whose weights and running statistics differ with the seed."""
    network = GroupMixFormer(**{**SIZES, **options})
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            offset = 1.0 if name.endswith("running_var") else 0.0
            value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + offset)
    return network.eval()


def logits(state: dict[str, Tensor]) -> Tensor:
    network = GroupMixFormer(**SIZES)
    network.load_state_dict(state)
    return network.eval()(golden_numbers.images(2, 33, 47))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training checkpoint as utils.resume writes them: raw and EMA weights that differ, optimizer state, YAML."""
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt_best.pth"
    raw, ema = network_of(1).state_dict(), network_of(2).state_dict()
    optimizer = {"state": {0: {"exp_avg": torch.zeros(1000)}}}
    torch.save({"model": raw, "model_ema": ema, "optimizer": optimizer, "best_weights": "ema", "config": "A: 1"}, path)
    return path


def write(state: dict[str, Tensor], kind: str, folder: Path) -> Path:
    """A file as each library writes it itself, without tools.convert."""
    path = folder / f"from_{kind}{SUFFIXES.get(kind, '.pth')}"
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        config = CfgNode({"MODEL": CfgNode({"NAME": "groupmixformer"})})
        birder = {"state": to_birder(state), "birder_version": "0.8.4", "signature": {"inputs": [], "outputs": []}}
        released = {"model": state, "optimizer": {}, "epoch": 299, "config": config}
        torch.save(birder if kind == "birder" else released, path)
    return path


@pytest.mark.parametrize("target", list(SUFFIXES))
@pytest.mark.parametrize("kind", list(SUFFIXES))
def test_every_direction_gives_equal_logits(kind: str, target: str, tmp_path: Path) -> None:
    state = network_of(1).state_dict()
    done = convert(write(state, kind, tmp_path), target, tmp_path / "out")
    content = load_file(done.path)
    found = {"pth": lambda: content["model"], "safetensors": lambda: content}.get(
        target, lambda: from_birder(content["state"])
    )()
    assert torch.equal(logits(found), logits(state))
    assert done.parameters == sum(p.numel() for p in network_of(1).parameters()) and done.num_classes == 7


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("way", ["checkpoint_path", "pretrained_cfg_overlay"])
def test_timm_loads_a_released_file(kind: str, way: str, tmp_path: Path) -> None:
    """The pickled CfgNode in it and all; `write` makes it as the released code did."""
    state = network_of(1).state_dict()
    path = str(write(state, kind, tmp_path))
    how = (
        {"checkpoint_path": path}
        if way == "checkpoint_path"
        else {"pretrained": True, "pretrained_cfg_overlay": {"file": path, "num_classes": 7}}
    )
    network = timm.create_model("groupmixformer_miny", **SIZES, **how).eval()
    assert torch.equal(network(golden_numbers.images(2, 33, 47)), logits(state))


@pytest.mark.parametrize("way", ["checkpoint_path", "pretrained_cfg_overlay"])
def test_timm_loads_the_moving_average_of_a_training_checkpoint_where_it_has_one(
    checkpoint: Path, way: str, tmp_path: Path
) -> None:
    content = torch.load(checkpoint)
    without = tmp_path / "without.pth"
    torch.save({key: value for key, value in content.items() if key != "model_ema"}, without)
    for path, seed in ((checkpoint, 2), (without, 1)):
        how = (
            {"checkpoint_path": str(path)}
            if way == "checkpoint_path"
            else {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 7}}
        )
        network = timm.create_model("groupmixformer_miny", **SIZES, **how).eval()
        assert torch.equal(network(golden_numbers.images(2, 33, 47)), logits(network_of(seed).state_dict()))


@pytest.mark.parametrize("target", list(SUFFIXES))
@pytest.mark.parametrize(("which", "seed"), [("raw", 1), ("ema", 2), ("best", 2)])
def test_weights_of_a_training_checkpoint_are_chosen(
    checkpoint: Path, which: str, seed: int, target: str, tmp_path: Path
) -> None:
    done = convert(checkpoint, target, tmp_path, which=which)
    assert done.weights == ("raw weights" if which == "raw" else "ema weights")
    assert torch.equal(logits(read_weights(done.path)[0]), logits(network_of(seed).state_dict()))


@pytest.mark.parametrize("target", list(SUFFIXES))
def test_a_published_file_holds_the_weights_alone_and_carries_its_hash(
    checkpoint: Path, target: str, tmp_path: Path
) -> None:
    done = convert(checkpoint, target, tmp_path, name="mine")
    path = Path(done.path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"mine-{digest[:8]}{SUFFIXES[target]}" and done.sha256 == digest
    content = load_file(path)
    about = {"state", "task", "signature", "class_to_idx", "rgb_stats", "config"}  # what birder's loader asks for
    assert set(content) == {"pth": {"model"}, "birder": about}.get(target, set(network_of(1).state_dict()))
    weights = sum(v.nbytes for v in network_of(1).state_dict().values())
    assert path.stat().st_size < weights + 1000 * len(
        network_of(1).state_dict()
    )  # records of a zip have their own size
    again = convert(checkpoint, target, tmp_path / "again", name="mine")
    assert Path(again.path).read_bytes() == path.read_bytes(), "same weights, another hash"


def test_views_do_not_drag_their_storage_along(tmp_path: Path) -> None:
    state = network_of(1).state_dict()
    state["head.weight"] = torch.zeros(100_000, 40)[:7]
    torch.save({"model": state}, tmp_path / "views.pth")
    assert convert(tmp_path / "views.pth", "pth", tmp_path / "out").bytes < 4_000_000


def test_other_group_sizes_convert_but_not_for_birder(tmp_path: Path) -> None:
    network = network_of(1, **OTHER_GROUPS[1])
    torch.save({"model": network.state_dict()}, tmp_path / "a.pth")
    assert "group_sizes (7, 3)" in convert(tmp_path / "a.pth", "safetensors", tmp_path).network
    with pytest.raises(UserError, match=r"group sizes \(7, 3\); birder's network has \(3, 5, 7\) only"):
        convert(tmp_path / "a.pth", "birder", tmp_path)


def test_networks_without_head_or_bias_convert(tmp_path: Path) -> None:
    network = network_of(1, num_classes=0, qkv_bias=False)
    torch.save({"model": network.state_dict()}, tmp_path / "a.pth")
    state, _ = read_weights(convert(tmp_path / "a.pth", "safetensors", tmp_path).path)
    assert state.keys() == network.state_dict().keys()


# --------------------------------------------------------------------------------------------------- names of birder's
# Read off the state dict of birder 0.8.4's groupmixformer_mobile; its logits under this mapping were equal to ours.
BIRDER_NAMES = {
    "conv_stem.proj1.bias": "stem.0.0.bias",
    "conv_stem.norm1.num_batches_tracked": "stem.0.1.num_batches_tracked",
    "conv_stem.proj2.weight": "stem.1.0.weight",
    "conv_stem.norm2.running_var": "stem.1.1.running_var",
    "patch_embed_layers.0.proj.conv1.weight": "body.stage1.patch_embed.proj.conv1.weight",
    "patch_embed_layers.3.norm.bias": "body.stage4.patch_embed.norm.bias",
    "groupmixformer_backbone.0.gma_stage.0.cpe.proj.weight": "body.stage1.gma_blocks.0.cpe.proj.weight",
    "groupmixformer_backbone.1.gma_stage.2.norm1.weight": "body.stage2.gma_blocks.2.norm1.weight",
    "groupmixformer_backbone.2.gma_stage.11.att.qkv.bias": "body.stage3.gma_blocks.11.attn.qkv.bias",
    "groupmixformer_backbone.2.gma_stage.11.att.aggregator.agg0.conv.conv1.weight": (
        "body.stage3.gma_blocks.11.attn.aggregator.agg0.conv.conv1.weight"
    ),
    "groupmixformer_backbone.2.gma_stage.11.att.aggregator.norm0.running_mean": (
        "body.stage3.gma_blocks.11.attn.aggregator.norm0.running_mean"
    ),
    "groupmixformer_backbone.2.gma_stage.11.att.crpe.conv_list.2.bias": (
        "body.stage3.gma_blocks.11.attn.crpe.conv_list.2.bias"
    ),
    "groupmixformer_backbone.3.gma_stage.3.mlp.fc1.weight": "body.stage4.gma_blocks.3.mlp.0.weight",
    "groupmixformer_backbone.3.gma_stage.3.mlp.fc2.bias": "body.stage4.gma_blocks.3.mlp.3.bias",
    "norm4.running_mean": "features.0.running_mean",
    "head.weight": "classifier.weight",
}


@pytest.mark.parametrize(("ours", "theirs"), BIRDER_NAMES.items())
def test_names_of_birders_reimplementation(ours: str, theirs: str) -> None:
    value = torch.zeros(())
    assert list(to_birder({ours: value})) == [theirs] and list(from_birder({theirs: value})) == [ours]


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_name_and_shape_is_one_of_birders_and_back(name: str) -> None:
    """golden/birder_0.8.4_names.json.gz: the state dicts of birder 0.8.4's five variants, read off the package."""
    golden = Path(golden_numbers.__file__).parent / "golden" / "birder_0.8.4_names.json.gz"
    theirs = json.loads(gzip.decompress(golden.read_bytes()))[name]
    with torch.device("meta"):
        ours = timm.create_model(name).state_dict()
    assert {key: list(value.shape) for key, value in to_birder(ours).items()} == theirs
    assert list(from_birder(to_birder(ours))) == list(ours)


def test_a_file_for_birder_says_what_its_loader_asks_for(tmp_path: Path) -> None:
    names = ["cat", "dog", "cow", "hen", "pig", "fox", "ape"]
    content = {"model": network_of(1).state_dict(), "classes": names, "config": "DATA: {IMG_SIZE: 48}"}
    torch.save(content, tmp_path / "ckpt_best.pth")
    written = load_file(convert(tmp_path / "ckpt_best.pth", "birder", tmp_path).path)
    assert written["class_to_idx"] == {name: number for number, name in enumerate(names)}
    assert written["signature"]["inputs"] == [{"data_shape": [0, 3, 48, 48]}]
    assert written["signature"]["outputs"] == [{"data_shape": [0, 7]}]
    assert written["config"] == {key: list(SIZES[key]) for key in ("embed_dims", "depths", "mlp_ratios")}
    assert written["rgb_stats"] == {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    variant = {"model": timm.create_model("groupmixformer_miny", num_classes=3, in_chans=1).state_dict()}
    torch.save(variant | {"config": CfgNode({"MODEL": CfgNode({"NAME": "a"})})}, tmp_path / "variant.pth")
    written = load_file(convert(tmp_path / "variant.pth", "birder", tmp_path).path)
    assert "config" not in written and written["class_to_idx"] == {"0": 0, "1": 1, "2": 2}
    assert written["signature"]["inputs"] == [{"data_shape": [0, 1, 224, 224]}]


def test_logits_are_those_of_birders_reimplementation() -> None:
    from birder.net import groupmixformer

    sizes = dict(embed_dims=[40, 80, 120, 160], depths=[1, 1, 2, 1], mlp_ratios=[2.0, 4.0, 2.0, 4.0])
    theirs: nn.Module = groupmixformer.GroupMixFormer(3, 7, config={**sizes, "drop_path_rate": 0.0}).double().eval()
    ours = network_of(1, **sizes).double()
    theirs.load_state_dict(to_birder(ours.state_dict()))
    images = golden_numbers.images(2, 64, 96).double()  # multiples of 32: theirs takes no others
    expected = ours(images)
    assert (theirs(images) - expected).norm() / expected.norm() < 1e-14


def test_birder_loads_our_file_and_we_load_birders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from birder.common import fs_ops
    from birder.conf import settings

    monkeypatch.setattr(settings, "MODELS_DIR", tmp_path)
    images, state = golden_numbers.images(2, 64, 96), network_of(1).state_dict()
    torch.save({"model": state}, tmp_path / "ours.pth")
    path = convert(tmp_path / "ours.pth", "birder", tmp_path).path
    theirs, about = fs_ops.load_model(torch.device("cpu"), "groupmixformer_s", path=path, inference=True)
    ours = network_of(1)
    torch.testing.assert_close(theirs(images), ours(images), rtol=1e-5, atol=1e-5)
    nothing = (None,) * 4  # optimizer, scheduler, scaler, base weights
    fs_ops.checkpoint_model("a", 1, theirs, about.signature, about.class_to_idx, about.rgb_stats, *nothing)
    back, _ = read_weights(fs_ops.model_path("a", epoch=1))
    assert all(torch.equal(back[key], value) for key, value in state.items()) and list(back) == list(state)


# ------------------------------------------------------------------------------------------------------ other libraries
def test_timm_loads_what_was_converted(checkpoint: Path, tmp_path: Path) -> None:
    expected = logits(network_of(1).state_dict())
    for target in ("pth", "safetensors"):
        path = convert(checkpoint, target, tmp_path, which="raw").path
        loaded = timm.create_model("groupmixformer_miny", **SIZES, checkpoint_path=path).eval()
        assert torch.equal(loaded(golden_numbers.images(2, 33, 47)), expected)


# --------------------------------------------------------------------------------------------------------- command line
def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    try:
        status = main([*map(str, words)])
    except SystemExit as ending:
        status = ending.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_says_what_it_wrote(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (checkpoint, "--to", "safetensors", "--output", tmp_path / "new" / "folder", "--weights", "raw")
    report = tmp_path / "report.json"
    status, out, err = run(capsys, *words, "--json", report)
    done = json.loads(report.read_text())
    assert (status, err) == (0, "") and done["path"] in out and "raw weights" in out
    assert Path(done["path"]).name == f"ckpt_best-{done['sha256'][:8]}.safetensors"
    again = convert(done["path"], "pth", tmp_path)
    assert Path(again.path).name == f"ckpt_best-{again.sha256[:8]}.pth", "not two hashes"
    status, out, err = run(capsys, *words, "--json", "-", "--name", "other")
    assert json.loads(out) == {**done, "path": done["path"].replace("ckpt_best", "other")}


def test_nothing_is_overwritten(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = convert(checkpoint, "pth", tmp_path)
    before = Path(done.path).stat().st_mtime_ns
    status, out, err = run(capsys, checkpoint, "--to", "pth", "--output", tmp_path)
    assert status == 0 and done.path in out, "the same file, which is there already"
    assert Path(done.path).stat().st_mtime_ns == before
    Path(done.path).write_text("other")
    status, out, err = run(capsys, checkpoint, "--to", "pth", "--output", tmp_path)
    assert status == 2 and out == "" and err.count("\n") == 1 and done.path in err and "--name" in err
    assert Path(done.path).read_text() == "other"


def test_what_is_wrong_is_one_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = network_of(1).state_dict()
    torch.save({"model": state}, tmp_path / "raw.pth")
    torch.save({"model": {name: v for name, v in state.items() if name != "norm4.bias"}}, tmp_path / "short.pth")
    torch.save({"model": state | {"norm4.bias": torch.zeros(3)}}, tmp_path / "shape.pth")
    torch.save({"model": state | {"extra.weight": torch.zeros(3)}}, tmp_path / "long.pth")
    torch.save({"model": nn.Linear(3, 4).state_dict()}, tmp_path / "linear.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"\x09\x00")
    (tmp_path / "file").write_text("")
    for words, expected in (
        (["missing.pth"], "missing.pth: no such file"),
        (["missing.safetensors"], "missing.safetensors: no such file"),
        ([tmp_path], "is a folder"),
        ([tmp_path / "broken.safetensors"], "broken.safetensors: damaged"),
        ([tmp_path / "short.pth"], "norm4.bias"),
        ([tmp_path / "shape.pth"], "norm4.bias"),
        ([tmp_path / "long.pth"], "extra.weight"),
        ([tmp_path / "linear.pth"], "no weights of a GroupMixFormer"),
        ([tmp_path / "raw.pth", "--weights", "ema"], "holds no EMA weights"),
        ([checkpoint, "--output", tmp_path / "file"], "cannot be written"),
        ([checkpoint, "--name", "a/b"], "--name a/b"),
        ([checkpoint, "--wieghts", "raw"], "did you mean --weights?"),
    ):
        status, out, err = run(
            capsys, *words, "--to", "pth", *(["--output", tmp_path] if "--output" not in words else [])
        )
        assert status == 2 and out == "" and err.count("\n") == 1 and expected in err, (words, err)


def test_a_file_that_does_not_read_back_is_removed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = module._encode
    monkeypatch.setattr(
        module, "_encode", lambda state, to: encode(state | {"head.bias": state["head.bias"] + 1e-3}, to)
    )
    with pytest.raises(UserError, match="does not read back"):
        convert(checkpoint, "pth", tmp_path)
    assert not list(tmp_path.iterdir())
