"""python -m tools.benchmark: what it computes from times, that all benchmarks run, and that wrong use is one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_pack import write
from torch import nn

from models import GroupMixFormer
from models.cpu.fused import FusedGroupMixFormer
from tools.benchmark import measuring, memory, networks
from tools.benchmark.__main__ import BENCHMARKS, main

CPU = torch.device("cpu")


def test_candidates_take_turns_and_ratios_are_taken_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = 0.0, []
    # A machine that gets slower and slower: each turn takes longer, the ratio stays.
    durations = {"reference": [9.0, 9.0, 2.0, 4.0, 8.0], "ours": [5.0, 5.0, 1.0, 2.0, 4.0]}
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now)

    def candidate(name: str) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            order.append(name)
            now += durations[name].pop(0)

        return run

    result = measuring.time_interleaved("a title", {name: candidate(name) for name in list(durations)}, 3, 10, CPU)
    assert order[4:] == ["reference", "ours"] * 3, "after the warm-up"
    ours = result["candidates"]["ours"]
    assert (ours["ratio"], ours["quartiles"], ours["seconds"]) == (2.0, [2.0, 2.0], 2.0)
    assert (ours["first_seconds"], ours["images_per_second"]) == (5.0, 5.0)
    assert result["candidates"]["reference"]["ratio"] == 1.0


def test_loading_is_written_as_json_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        write(tmp_path / "photos" / "c" / f"{number}.jpg", (300 + 50 * number, 260), number)
    out = tmp_path / "out"
    arguments = ["--only", "load", "--data-path", str(tmp_path / "photos"), "--trials", "1", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    content = json.loads((out / "benchmark.json").read_text())
    assert {"processor", "torch", "date", "commit"} <= set(content["machine"])
    train, validate = content["benchmarks"]
    assert [*train["candidates"]][:3] == ["exact", "fast", "fast, packed (256, quality 95)"]
    assert [*validate["candidates"]] == ["exact", "fast"]
    assert (out / "benchmark.md").read_text() in printed
    for result in (train, validate):
        assert f"**{result['title']}**" in printed and "| exact | " in printed


def test_every_network_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling itself is tested in test_fast.py."""
    compiled = shrink_networks(monkeypatch)
    assert main(["--batch-size", "2", "--size", "32", "--trials", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"]
    evaluate, train, *bfloat16 = [result for result in results if not result["title"].startswith("memory")]
    assert [*evaluate["candidates"]] == ["released order", "this network", "fused", "fused, compiled"]
    assert [*train["candidates"]] == ["released order", "this network", "compiled"]
    assert [type(network) for network in compiled] == [FusedGroupMixFormer, *[GroupMixFormer] * 4]
    kept = {name: numbers["held_bytes"] for name, numbers in results[-1]["candidates"].items()}
    assert kept["full checkpoints"] < kept["selective checkpoints"] < kept["this network"]
    assert "| held an image, MiB | moved an image, MiB |" in (tmp_path / "benchmark.md").read_text()
    for result in bfloat16:  # as the CPU has it
        assert [*result["candidates"]] == ["released order", "this network"]


def test_lack_of_memory_ends_one_benchmark_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: object) -> list:
        raise torch.OutOfMemoryError("CUDA out of memory")

    result = measuring.time_interleaved("training step", {"released order": lambda: None}, 1, 1, CPU)
    monkeypatch.setitem(BENCHMARKS, "evaluate", too_large)
    monkeypatch.setitem(BENCHMARKS, "train", lambda *_: [result])
    monkeypatch.delitem(BENCHMARKS, "memory")
    assert main(["--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"][1] == result
    printed = capsys.readouterr().out
    assert "**evaluate**\n\nnot measured: out of memory; try a smaller --batch-size" in printed
    assert "| released order | " in printed


def test_a_candidate_that_computes_something_else_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fuse_wrongly(network: nn.Module) -> Callable:
        return lambda images: 1.001 * network(images)

    shrink_networks(monkeypatch)
    monkeypatch.setattr(networks, "fuse", fuse_wrongly)
    with pytest.raises(RuntimeError, match="fused: computes something else than the reference"):
        main(["--only", "evaluate", "--batch-size", "2", "--size", "32", "--trials", "1", "--out", str(tmp_path)])


def shrink_networks(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Networks of one stage; returns the list that those end up in which would be compiled."""
    sizes = dict(embed_dims=(40,), depths=(2,), mlp_ratios=(4,), drop_path_rate=0.1)
    monkeypatch.setattr(networks, "build_network", lambda *_: GroupMixFormer(**sizes))
    compiled: list[nn.Module] = []
    monkeypatch.setattr(networks, "compile_blocks", lambda network, **options: compiled.append(network))
    monkeypatch.setattr(memory, "RELATIVES", {})
    return compiled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "load"], "--only load: needs photographs"),
        (["--only", "nothing"], "--only: invalid choice: 'nothing'"),
        (["--variant", "resnet50"], "--variant: invalid choice: 'resnet50'"),
        (["--trials", "0"], "--trials 0: must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--out", "/proc/benchmark"], "/proc/benchmark"),
        (["--only", "load", "--data-path", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_use_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tools.benchmark: error: ") and message in error and error.count("\n") == 1
