"""What is drawn of a picture: contributions that add up to the projection's output, Grad-CAM, errors in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.groupmixformer import GroupMixFormer
from tools import visualize

# The network of these tests, which is not that of `runs.TINY`.
SIZES = (
    *("DATA.IMG_SIZE", "32", "MODEL.GMA.EMBEDDING_DIMS", "[10, 10, 20, 20]", "MODEL.GMA.SERIAL_DEPTHS", "[1, 1, 1, 1]"),
    *("MODEL.GMA.MLP_RATIOS", "[2, 2, 2, 2]"),
)
CFG = ("--cfg", str(Path(__file__).resolve().parents[2] / "configs" / "groupmixformer_digits.yaml"))


@pytest.fixture
def network() -> GroupMixFormer:
    torch.manual_seed(0)
    return GroupMixFormer(3, 3, (10, 10, 20, 20), (1, 2, 1, 1), (2, 2, 2, 2)).eval()


def test_responses_are_those_of_each_segment_alone(network: GroupMixFormer) -> None:
    image = torch.randn(3, 70, 101)
    attention = network.groupmixformer_backbone[1].gma_stage[1].att
    seen = []
    handle = attention.proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    result = visualize.explain(network, image)
    handle.remove()
    chosen = visualize.choose_block(result.branches, 2, -1)
    assert (chosen.stage, chosen.block, chosen.responses.shape) == (2, 2, (5, 9, 13))
    for branch in range(5):
        alone = torch.zeros_like(seen[0])
        alone[..., 2 * branch : 2 * branch + 2] = seen[0][..., 2 * branch : 2 * branch + 2]
        expected = (attention.proj(alone) - attention.proj.bias).norm(dim=-1).reshape(9, 13)
        np.testing.assert_allclose(chosen.responses[branch], expected.detach(), rtol=1e-4, atol=1e-6)
    assert chosen.shares.sum() == pytest.approx(1, abs=1e-5)
    assert not attention.proj._forward_hooks, "hooks are removed"


@pytest.mark.parametrize(("size", "stage"), [(64, 4), (32, 3), (33, 4)])
def test_by_default_the_last_maps_that_show_something_are_drawn(network: GroupMixFormer, size: int, stage: int) -> None:
    assert (
        visualize.choose_block(visualize.explain(network, torch.randn(3, size, size)).branches, None, -1).stage == stage
    )


def test_without_the_local_branch_the_others_are_the_whole_output() -> None:
    torch.manual_seed(0)
    network = GroupMixFormer(3, 3, (16, 16), (1, 1), (2, 2), local_branch=False, num_heads=1).eval()
    attention, seen = network.groupmixformer_backbone[1].gma_stage[0].att, []
    attention.proj.register_forward_hook(lambda module, args, output: seen.append(args[0][0]))
    block = visualize.choose_block(visualize.explain(network, torch.randn(3, 64, 40)).branches, 2, 1)
    assert block.names == ["single tokens", "3x3 groups", "5x5 groups", "7x7 groups"]
    for branch, y in enumerate(seen[0].split(4, dim=-1)):
        expected = (y @ attention.proj.weight[:, 4 * branch : 4 * branch + 4].T).norm(dim=-1).reshape(8, 5)
        np.testing.assert_allclose(block.responses[branch], expected.detach(), rtol=1e-4, atol=1e-6)


def test_a_branch_that_is_switched_off_contributes_nothing(network: GroupMixFormer) -> None:
    """Each of the first four segments fills whole heads: one without weight shows in its own map only."""
    aggregator = network.groupmixformer_backbone[2].gma_stage[0].att.aggregator
    torch.nn.init.zeros_(aggregator.norm2.weight)
    torch.nn.init.zeros_(aggregator.norm2.bias)
    block = visualize.choose_block(visualize.explain(network, torch.randn(3, 64, 64)).branches, 3, 1)
    assert block.responses[2].max() == block.proxies[2].max() == 0
    assert (block.norms[[0, 1, 3, 4]] > 0).all()


def test_grad_cam_is_the_class_activation_map(network: GroupMixFormer) -> None:
    """After mean pooling and one linear layer, Grad-CAM is the weights of the class times the map."""
    image = torch.randn(3, 96, 128)
    maps = []
    handle = network.norm4.register_forward_hook(lambda module, args, output: maps.append(output.detach()))
    result = visualize.explain(network, image)
    handle.remove()
    weights = network.head.weight[int(result.probabilities.argmax())].detach()
    expected = torch.einsum("c,chw->hw", weights, maps[0][0]).relu()
    np.testing.assert_allclose(result.cam, expected / expected.max().clamp(min=1e-30), rtol=1e-3, atol=1e-5)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    network = GroupMixFormer(3, 3, (10, 10, 20, 20), (1, 1, 1, 1), (2, 2, 2, 2))
    weights, picture = tmp_path / "weights.pth", tmp_path / "a $x$.png"
    torch.save({"model": network.state_dict()}, weights)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 333, 3), dtype=np.uint8)).save(picture)
    return weights, picture


def test_the_command_draws_the_numbers_that_it_prints_and_writes_and_not_beside_the_picture(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a data set, a drawing beside the picture would be one more image of the class."""
    weights, picture = files
    before = set(tmp_path.iterdir())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    args = [*CFG, "--resume", str(weights), "--image", str(picture), "--json", "numbers.json", "--opts", *SIZES]
    assert visualize.main(args) == 0
    content = json.loads((elsewhere / "numbers.json").read_text())
    assert len(content["blocks"]) == 4 and len(content["top"]) == 3
    assert content["branches"] == ["single tokens", "3x3 groups", "5x5 groups", "7x7 groups", "local branch"]
    assert f"{100 * content['top'][0]['probability']:.2f} %" in capsys.readouterr().out
    assert set(tmp_path.iterdir()) - before == {elsewhere}
    with Image.open(elsewhere / "output" / "visualized" / f"{picture.stem}.png") as drawn:
        assert drawn.width > 1000


def test_probabilities_of_several_classes_are_those_of_each_alone(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `test.py --images` gives them: they do not add up to 1."""
    weights, picture = files
    found = []
    for several in ("True", "False"):
        args = [*CFG, "--resume", str(weights), "--image", str(picture), "--out", str(tmp_path / "a.png"), "--json"]
        assert visualize.main([*args, "-", "--opts", *SIZES, "DATA.MULTI_LABEL", several]) == 0
        top = json.loads(capsys.readouterr().out)["top"]
        found.append(torch.tensor([entry["probability"] for entry in top], dtype=torch.float64))
    each, one = found
    assert one.sum() == pytest.approx(1) and each.sum() > 1.2
    torch.testing.assert_close(each.logit().softmax(0), one, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--resume", ""], "no weights"),
        (["--image", "missing.png"], "missing.png: no such file"),
        (["--stage", "5"], "stages 1 to 4"),
        (["--block", "2"], "blocks 1 to 1"),
        (["--block", "0"], "blocks 1 to 1"),
    ],
)
def test_mistakes_are_one_line(
    files: tuple[Path, Path], tmp_path: Path, change: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, picture = files
    args = [*CFG, "--resume", str(weights), "--image", str(picture), "--out", str(tmp_path / "out.png"), *change]
    assert visualize.main([*args, "--opts", *SIZES]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1] and not (tmp_path / "out.png").exists()
