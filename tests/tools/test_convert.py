"""`python -m tools.convert`: every direction by equal logits, what a published file holds, and what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import golden_numbers
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from models import GroupMixFormer
from tools import convert as module
from tools.convert import SUFFIXES, convert, main, read_weights
from utils.checkpoint import load_file

SIZES = dict(embed_dims=(10, 20, 30, 40), depths=(1, 1, 2, 1), mlp_ratios=(2, 4, 2, 4), num_classes=7)


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
    """A file as the released code ('pth') and safetensors write it themselves."""
    path = folder / f"from_{kind}{SUFFIXES[kind]}"
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        config = CfgNode({"MODEL": CfgNode({"NAME": "groupmixformer"})})
        torch.save({"model": state, "optimizer": {}, "epoch": 299, "config": config}, path)
    return path


@pytest.mark.parametrize("target", list(SUFFIXES))
@pytest.mark.parametrize("kind", list(SUFFIXES))
def test_every_direction_gives_equal_logits(kind: str, target: str, tmp_path: Path) -> None:
    state = network_of(1).state_dict()
    done = convert(write(state, kind, tmp_path), target, tmp_path / "out")
    content = load_file(done.path)
    assert torch.equal(logits(content["model"] if target == "pth" else content), logits(state))
    assert done.parameters == sum(p.numel() for p in network_of(1).parameters()) and done.num_classes == 7


def test_a_ratio_whose_product_rounds_down_is_recovered() -> None:
    hidden = GroupMixFormer(embed_dims=(100, 100, 100, 100), depths=(1,) * 4, mlp_ratios=(1.15,) * 4, num_classes=0)
    assert int(100 * (114 / 100)) == 113, "the case"
    module.describe_network(hidden.state_dict())[1].load_state_dict(hidden.state_dict(), assign=True)


@pytest.mark.parametrize("way", ["checkpoint_path", "pretrained_cfg_overlay"])
def test_timm_loads_released_files_converted_files_and_the_moving_average_of_checkpoints(
    checkpoint: Path, way: str, tmp_path: Path
) -> None:
    """A released file holds a pickled CfgNode."""
    released = write(network_of(1).state_dict(), "pth", tmp_path)
    converted = convert(checkpoint, "safetensors", tmp_path, which="raw").path
    for path, seed in ((released, 1), (converted, 1), (checkpoint, 2)):
        overlay = {"file": str(path), "num_classes": 7}
        options = (
            {"checkpoint_path": str(path)}
            if way == "checkpoint_path"
            else {"pretrained": True, "pretrained_cfg_overlay": overlay}
        )
        network = timm.create_model("groupmixformer_miny", **SIZES, **options).eval()
        assert torch.equal(network(golden_numbers.images(2, 33, 47)), logits(network_of(seed).state_dict())), path


@pytest.mark.parametrize(("which", "seed"), [("raw", 1), ("ema", 2), ("best", 2)])
def test_weights_of_a_training_checkpoint_are_chosen(checkpoint: Path, which: str, seed: int, tmp_path: Path) -> None:
    done = convert(checkpoint, "safetensors", tmp_path, which=which)
    assert done.weights == f"{'raw' if which == 'raw' else 'ema'} weights of {checkpoint}"
    written, expected = read_weights(done.path).state, network_of(seed).state_dict()
    assert list(written) == list(expected) and all(torch.equal(written[key], expected[key]) for key in expected)


@pytest.mark.parametrize("target", list(SUFFIXES))
def test_a_published_file_holds_the_weights_alone_and_carries_its_hash(
    checkpoint: Path, target: str, tmp_path: Path
) -> None:
    done = convert(checkpoint, target, tmp_path, name="mine")
    path = Path(done.path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"mine-{digest[:8]}{SUFFIXES[target]}" and done.sha256 == digest
    state = network_of(1).state_dict()
    assert set(load_file(path)) == ({"model"} if target == "pth" else set(state))
    # Each record of a zip has a header of its own.
    assert path.stat().st_size < sum(v.nbytes for v in state.values()) + 1000 * len(state)
    again = convert(checkpoint, target, tmp_path / "again", name="mine")
    assert Path(again.path).read_bytes() == path.read_bytes(), "same weights, another hash"


def test_views_do_not_bring_their_storage_along(tmp_path: Path) -> None:
    state = network_of(1).state_dict()
    state["head.weight"] = torch.zeros(100_000, 40)[:7]
    torch.save({"model": state}, tmp_path / "views.pth")
    assert convert(tmp_path / "views.pth", "pth", tmp_path / "out").bytes < 4_000_000


def test_a_variant_is_recognised_by_its_shapes() -> None:
    with torch.device("meta"):
        state = timm.create_model("groupmixformer_tiny", num_classes=3, in_chans=1).state_dict()
    sizes, network = module.describe_network(state)
    assert sizes.variant == "groupmixformer_tiny" and network.num_classes == 3 and network.in_chans == 1


def test_networks_without_head_or_bias_convert(tmp_path: Path) -> None:
    network = network_of(1, num_classes=0, qkv_bias=False)
    torch.save({"model": network.state_dict()}, tmp_path / "a.pth")
    written = read_weights(convert(tmp_path / "a.pth", "safetensors", tmp_path).path)
    assert written.state.keys() == network.state_dict().keys()


def test_a_network_within_another_converts_alone_under_the_name_of_its_run(tmp_path: Path) -> None:
    state = {f"backbone.{name}": value for name, value in network_of(1).state_dict().items()}
    content = {"state_dict": state | {"decoder.weight": torch.zeros(3)}, "config": "MODEL: {NAME: mine}"}
    torch.save(content, tmp_path / "a.pth")
    done = convert(tmp_path / "a.pth", "pth", tmp_path)
    assert Path(done.path).name == f"mine-{done.sha256[:8]}.pth"
    assert done.weights.endswith("; 1 entries of other parts are left out (decoder.weight)")
    assert torch.equal(logits(load_file(done.path)["model"]), logits(network_of(1).state_dict()))


# --------------------------------------------------------------------------------------------------------- command line
def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    status = main([*map(str, words)])
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
        (["missing.safetensors"], "missing.safetensors: no such file"),
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(group_sizes=(7, 3)), "group_sizes (7, 3)"),
        (dict(local_branch=False), "without the local branch"),
        (dict(embed_dims=(15, 30), relative_position=False, num_heads=3), "without the relative position"),
    ],
    ids=str,
)
def test_other_shapes_convert(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    network = GroupMixFormer(3, **{**dict(embed_dims=(32, 32), depths=(1, 1), mlp_ratios=(2, 2)), **options})
    torch.save({"model": network.state_dict()}, tmp_path / "a.pth")
    assert words in module.convert(tmp_path / "a.pth", "safetensors", tmp_path).network
