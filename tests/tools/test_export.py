"""`python -m tools.export`: its files compute what the network computes, at any batch and size, or are not kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import nn

from models import GroupMixFormer
from tools import export as module
from tools.export import main

OPTS = (
    *("--cfg", str(runs.ROOT / "configs" / "groupmixformer_digits.yaml"), "--img-size", "48"),
    *("--opts", "MODEL.GMA.EMBEDDING_DIMS", "[10,20]", "MODEL.GMA.SERIAL_DEPTHS", "[1,1]"),
    *("MODEL.GMA.MLP_RATIOS", "[2,2]", "MODEL.GMA.NUM_STAGES", "2"),
)


RAW_SEED, EMA_SEED = 1, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt_best.pth"
    raw, ema = (network_of(seed).state_dict() for seed in (RAW_SEED, EMA_SEED))
    torch.save({"model": raw, "model_ema": ema, "best_weights": "ema"}, path)
    return path


def network_of(seed: int) -> GroupMixFormer:
    torch.manual_seed(seed)
    network = GroupMixFormer(7, embed_dims=(10, 20), depths=(1, 1), mlp_ratios=(2, 2))
    nn.init.normal_(network.head.weight)
    return network.eval()


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    status = main([*map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.compile
def test_onnx_gives_the_networks_logits_at_sizes_it_was_not_exported_with(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "network.onnx"
    status, out, err = run(capsys, "--resume", checkpoint, "--format", "onnx", "--output", path, *OPTS)
    assert status == 0, err
    assert out.count("verified") == 4 and str(path) in out.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == [path]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 65, 97), (5, 3, 80, 33)):
        images = torch.randn(shape)
        (logits,) = session.run(None, {"images": images.numpy()})
        expected = network_of(EMA_SEED)(images).detach()  # the checkpoint was kept for these weights
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)
    # Viewers and other runtimes show these names.
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_outputs()[0].shape == ["batch", 7] and session.get_outputs()[0].name == "logits"


@pytest.mark.compile
@pytest.mark.parametrize(
    "options", [dict(local_branch=False, embed_dims=(8, 16)), dict(relative_position=False, num_heads=1)], ids=str
)
def test_ablations_become_onnx(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = GroupMixFormer(
        **{**dict(num_classes=7, embed_dims=(10, 20), depths=(1, 1), mlp_ratios=(2, 2)), **options}
    )
    differences = module.export(network.eval(), tmp_path / "network.onnx", "onnx", (48, 40), lambda line: None)
    assert len(differences) == 4 and max(differences.values()) < 1e-6


@pytest.mark.compile
def test_pt2_gives_the_stage_maps(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "network.pt2"
    words = ("--pretrained", checkpoint, "--weights", "raw", "--features", "--format", "pt2", "--output", path)
    status, out, err = run(capsys, *words, "--json", "-", *OPTS)
    assert status == 0, err
    assert json.loads(out)["outputs"] == ["stage1", "stage2"]
    images = torch.randn(2, 3, 49, 70)
    with torch.no_grad():
        expected = network_of(RAW_SEED).forward_stages(images)
    torch.testing.assert_close(list(torch.export.load(path).module()(images)), expected, rtol=0, atol=1e-4)


def test_an_export_that_differs_is_not_kept(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exporting itself is the tests' above: here the file is empty, and the network computes in its place."""
    network = network_of(EMA_SEED)
    # Right for one image, wrong for several: as if the batch had become a constant.
    spoiled = lambda images: (network(images) * (1 + 2e-4 * (len(images) > 1)),)  # noqa: E731
    monkeypatch.setattr(module, "_write", lambda network, images, path, to: path.touch())
    path = tmp_path / "network.pt2"
    for compute, expected in ((spoiled, 2), (lambda images: (network(images),), 0)):
        monkeypatch.setattr(module, "_open", lambda *_, compute=compute: compute)
        status, out, err = run(capsys, "--resume", checkpoint, "--format", "pt2", "--output", path, *OPTS)
        assert status == expected and path.exists() == (status == 0) and len(list(tmp_path.iterdir())) == path.exists()
        if status:
            assert err.count("\n") == 1 and "differs from the network" in err and "(3, 3, 48, 48)" in err
            assert "written" not in out


def test_an_exporter_that_fails_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(module, "_write", fail)
    path = tmp_path / "network.pt2"
    status, _, err = run(capsys, "--resume", checkpoint, "--format", "pt2", "--output", path, *OPTS)
    assert status == 2 and err.count("\n") == 1 and "first line" in err and "second" not in err
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_is_one_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken.pt2").write_text("mine")
    weights, cfg = ("--resume", checkpoint), OPTS[:2]
    for words, expected in (
        ([*OPTS], "no weights to export"),
        ([*OPTS, "--resume", "missing.pth"], "missing.pth: no such file"),
        ([*OPTS, *weights, "--output", tmp_path / "taken.pt2"], "not overwritten"),
        ([*OPTS, *weights, "--img-size", "32"], "must be at least 33; pass --img-size 64"),
        ([*OPTS, *weights, "--image-size", "64"], "did you mean --img-size?"),
        ([*cfg, *weights], "must be at least 33; pass --img-size 64"),
        ([*cfg, *weights, "--img-size", "48"], "weights of another network"),
    ):
        status, _, err = run(capsys, *words, "--format", "pt2")
        assert status == 2 and err.count("\n") == 1 and expected in err, (words, err)
    assert (tmp_path / "taken.pt2").read_text() == "mine"


def test_missing_extras_are_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    status, _, err = run(capsys, "--resume", checkpoint, "--format", "onnx", "--output", tmp_path / "a.onnx", *OPTS)
    assert status == 2 and err.count("\n") == 1 and "onnxruntime" in err and "requirements-extras.txt" in err
