"""`python -m tools.export`: its files compute what the network computes, at any batch and size, or are not kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import Tensor, nn

from models import GroupMixFormer
from tools import export as module
from tools.export import main

OPTS = (
    *("--cfg", str(runs.ROOT / "configs" / "groupmixformer_digits.yaml"), "--img-size", "48"),
    *("--opts", "MODEL.GMA.EMBEDDING_DIMS", "[10,10,20,20]", "MODEL.GMA.SERIAL_DEPTHS", "[1,1,1,1]"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt_best.pth"
    raw, ema = (network_of(seed).state_dict() for seed in (1, 2))
    torch.save({"model": raw, "model_ema": ema, "best_weights": "ema"}, path)
    return path


def network_of(seed: int) -> GroupMixFormer:
    torch.manual_seed(seed)
    network = GroupMixFormer(7, embed_dims=(10, 10, 20, 20), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2))
    nn.init.normal_(network.head.weight)
    return network.eval()


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    try:
        status = main([*map(str, words)])
    except SystemExit as ending:
        status = ending.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def compute(path: Path, images: Tensor) -> list[Tensor]:
    if path.suffix == ".pt2":
        out = torch.export.load(path).module()(images)
        return [out] if isinstance(out, Tensor) else list(out)
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]


def need(to: str) -> None:
    if to == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)


@pytest.mark.parametrize(
    ("to", "which", "seed"),
    [
        ("onnx", "best", 2),
        pytest.param("onnx", "raw", 1, marks=pytest.mark.compile),
        pytest.param("pt2", "best", 2, marks=pytest.mark.compile),
    ],
)
def test_logits_are_the_networks_at_sizes_it_was_not_exported_with(
    checkpoint: Path, to: str, which: str, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need(to)
    path = tmp_path / f"network.{to}"
    status, out, err = run(capsys, "--resume", checkpoint, "--weights", which, "--format", to, "--output", path, *OPTS)
    assert status == 0, err
    assert out.count("verified") == 4 and str(path) in out.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == [path]
    for shape in ((1, 3, 65, 97), (5, 3, 80, 33)):
        images = torch.randn(shape)
        (logits,) = compute(path, images)
        torch.testing.assert_close(logits, network_of(seed)(images).detach(), rtol=0, atol=1e-4)
    if to == "onnx":  # viewers and other runtimes show these names
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
        assert session.get_outputs()[0].shape == ["batch", 7]


@pytest.mark.parametrize("to", [pytest.param("onnx", marks=pytest.mark.compile), "pt2"])
def test_features_are_the_stage_maps(
    checkpoint: Path, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need(to)
    path = tmp_path / f"network.{to}"
    words = ("--pretrained", checkpoint, "--weights", "raw", "--features", "--format", to, "--output", path)
    status, out, err = run(capsys, *words, "--json", "-", *OPTS)
    assert status == 0, err
    assert json.loads(out)["outputs"] == ["stage1", "stage2", "stage3", "stage4"]
    images = torch.randn(2, 3, 49, 70)
    with torch.no_grad():
        expected = network_of(1).forward_stages(images)
    torch.testing.assert_close(compute(path, images), expected, rtol=0, atol=1e-4)


def test_an_export_that_differs_is_not_kept(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = module._open

    def spoiled(path: Path, to: str) -> Any:
        function = open_file(path, to)
        # Right for one image, wrong for several: as if the batch had become a constant.
        return lambda images: tuple(out + 2e-4 * out.abs().max() * (len(images) > 1) for out in function(images))

    monkeypatch.setattr(module, "_open", spoiled)
    path = tmp_path / "network.pt2"
    status, out, err = run(capsys, "--resume", checkpoint, "--format", "pt2", "--output", path, *OPTS)
    assert status == 2 and err.count("\n") == 1 and "differs from the network" in err and "(3, 3, 48, 48)" in err
    assert "written" not in out and not list(tmp_path.iterdir())


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
        ([*OPTS, *weights, "--opset", "17"], "at least 18"),
        ([*OPTS, *weights, "--img-size", "32"], "at 33 pixels and more; pass --img-size 64"),
        ([*OPTS, *weights, "--image-size", "64"], "did you mean --img-size?"),
        ([*cfg, *weights], "at 33 pixels and more; pass --img-size 64"),
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
