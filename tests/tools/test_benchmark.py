"""python -m tools.benchmark: what it computes from times, and that its rows run. Its figures are no test."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_pack import write
from torch import nn

from models import GroupMixFormer
from tools.benchmark import measuring, networks, processes, tables
from tools.benchmark.__main__ import ROWS, _parse, main, measurable_rows
from tools.benchmark.size import _activation_bytes

CPU = torch.device("cpu")


def test_ways_take_turns_and_ratios_are_taken_turn_by_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = 0.0, []
    # A machine that gets slower and slower: each turn takes longer, the ratio stays.
    durations = {"reference": [9.0, 9.0, 2.0, 4.0, 8.0], "ours": [5.0, 5.0, 1.0, 2.0, 4.0]}
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now)

    def way(name: str) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            order.append(name)
            now += durations[name].pop(0)

        return run

    row = measuring.time_in_turns("a row", {name: way(name) for name in list(durations)}, 3, 10, CPU)
    assert order[4:] == ["reference", "ours"] * 3, "after the first turn, which warms up"
    ours = row["ways"]["ours"]
    assert (ours["ratio"], ours["quartiles"], ours["seconds"]) == (2.0, [2.0, 2.0], 2.0)
    assert (ours["first_seconds"], ours["images_per_second"]) == (5.0, 5.0)
    assert row["ways"]["reference"]["ratio"] == 1.0


def test_ways_with_batches_of_their_own_are_compared_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now)

    def way(seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += seconds

        return run

    ways = {"reference": way(4.0), "ours": way(6.0)}
    row = measuring.time_in_turns("a row", ways, 2, {"reference": 64, "ours": 192}, CPU, share_memory=False)
    assert row["ways"]["ours"]["ratio"] == 2.0, "32 images a second against 16"
    assert [way["images_per_second"] for way in row["ways"].values()] == [16.0, 32.0]


@pytest.mark.parametrize(
    "text", ["CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", "unable to find an engine to execute this", ""]
)
def test_cudas_libraries_may_say_in_their_own_words_that_a_batch_does_not_fit(text: str) -> None:
    def run(batch_size: int) -> None:
        if batch_size > 100:
            raise RuntimeError(text or "something else")

    if text:
        assert measuring.largest_batch(run) == 64
    else:
        with pytest.raises(RuntimeError, match="something else"):
            measuring.largest_batch(run)


def test_what_does_not_fit_is_said_to_be_missing_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(args, device: torch.device) -> list:
        raise torch.OutOfMemoryError("CUDA out of memory")

    row = {"title": "a start", "seconds": {"all": 0.0123}}
    monkeypatch.setitem(ROWS, "size", too_large)
    monkeypatch.setitem(ROWS, "start", lambda args, device: [row])
    assert main(["--rows", "size", "start", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "benchmark.json").read_text())["rows"][1] == row
    printed = capsys.readouterr().out
    assert "**size**\n\nnot measured: it takes more memory than there is" in printed and "| all | 0.0123 |" in printed


def test_a_step_that_ran_out_of_memory_spoils_no_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    args = _parse(["--variant", "groupmixformer_miny", "--size", "32", "--batch-size", "2"])
    network = networks.build_network(args, CPU).train()
    optimizer, scaler = torch.optim.SGD(network.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    step = networks.training_step("", network, network, optimizer, scaler, nn.Module(), CPU, networks.default_autocast)
    batch = networks.random_batch(args, 2, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
        with pytest.raises(torch.OutOfMemoryError):
            step(*batch)
    with pytest.raises(AttributeError, match="update"):  # it gets as far as the average, which is none here
        step(*batch)


def test_the_cause_of_a_failed_process_is_found_in_torchruns_report() -> None:
    report = "Traceback\n[rank0]: torch.OutOfMemoryError: CUDA out of memory\nE1128 failed\n=====\nFAILED\n====="
    assert processes.cause_of(report) == "[rank0]: torch.OutOfMemoryError: CUDA out of memory"
    assert processes.cause_of("killed\n") == "killed"


@pytest.mark.parametrize(("room", "expected"), [(7, 0), (63, 56), (64, 64), (700, 640), (1000, 960), (1024, 1024)])
def test_the_largest_batch_that_fits_is_found(room: int, expected: int) -> None:
    tried = []

    def run(batch_size: int) -> None:
        tried.append(batch_size)
        if batch_size > room:
            raise torch.OutOfMemoryError("no room")

    assert measuring.largest_batch(run) == expected
    assert len(tried) == len(set(tried)) <= 12, "no size is tried twice"


def test_a_row_has_the_largest_batch_of_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    args = _parse(["--variant", "groupmixformer_miny", "--size", "64", "--trials", "1"])
    steps = networks.training_steps(args, CPU, networks.default_autocast)
    steps["compiled"] = steps["this network"]  # compiling is another test's
    images = networks.random_batch

    def batch_that_fits(args, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if size > 70:
            raise torch.OutOfMemoryError("no room")
        return images(args, 2, device)

    monkeypatch.setattr(networks, "random_batch", batch_that_fits)
    row = networks._row_of_largest_batches(steps, args, CPU)
    assert row["title"].endswith("64 x 64, largest batches that fit: 64, 64, 64")
    assert row["items"] == dict.fromkeys(steps, 64)
    assert "largest batches" in tables.format_markdown(measuring.describe_machine(CPU), [row])


def test_batches_fill_the_device() -> None:
    args, gpu = _parse([]), torch.device("cuda")
    sizes = [networks.batch_size_of(args, device, training) for device in (CPU, gpu) for training in (True, False)]
    assert sizes == [8, 8, 128, 256]
    assert networks.batch_size_of(_parse(["--batch-size", "4"]), gpu, training=True) == 4


def test_rows_that_a_machine_cannot_measure_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for gpus, two_processes in ((1, False), (2, True)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert ("processes" in measurable_rows(gpu, True)) == two_processes
    assert measurable_rows(CPU, True) == list(ROWS)
    assert set(ROWS) - set(measurable_rows(CPU, False)) == {"load"}


def test_memory_is_the_largest_sum_of_live_tensors() -> None:
    network = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
    images = torch.randn(512, 256)
    bytes_needed = _activation_bytes(network, images, CPU, "")
    hidden = 4 * 512 * 1024
    assert 2 * hidden <= bytes_needed < 3 * hidden, "the hidden layer before and after ReLU"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(4):
        write(tmp_path / "photos" / "c" / f"{number}.jpg", (300 + 50 * number, 260), number)
    return tmp_path / "photos"


def test_rows_are_written_as_json_tables_and_plots(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--rows", "load", "size", "roofline", "--variant", "groupmixformer_miny", "--data-path", str(photos)]
    arguments += ["--batch-size", "1", "--trials", "1", "--largest", "320", "--images", "4", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    content = json.loads((out / "benchmark.json").read_text())
    assert {"processor", "torch", "date", "commit"} <= set(content["machine"])
    load_train, load_val, size, roofline = content["rows"]
    assert next(iter(load_train["ways"])) == next(iter(load_val["ways"])) == "exact"
    assert [point["size"] for point in size["points"]["groupmixformer_miny"]] == [224, 320]
    for points in size["points"].values():
        assert points[1]["bytes_over_linear"] == pytest.approx(1, abs=0.25)
    assert all(part["seconds"] > 0 for part in roofline["parts"].values())
    assert (out / "benchmark.md").read_text() in printed
    for row in content["rows"]:
        assert f"**{row['title']}**" in printed
    for name in ("size.png", "roofline.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.compile
def test_the_rows_that_compile_and_start_processes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_stage(*_: object) -> GroupMixFormer:  # a stage is what is compiled: a third of the time
        return GroupMixFormer(embed_dims=(40,), depths=(2,), mlp_ratios=(4,), drop_path_rate=0.1)

    monkeypatch.setattr(networks, "build_network", one_stage)
    out = tmp_path / "out"
    arguments = ["--rows", "evaluate", "train", "processes", "start", "--variant", "groupmixformer_miny"]
    arguments += ["--batch-size", "2", "--size", "32", "--trials", "1", "--out", str(out)]
    assert main(arguments) == 0
    evaluate, train, *bfloat16, processes, start = json.loads((out / "benchmark.json").read_text())["rows"]
    assert list(evaluate["ways"]) == ["released order", "this network", "fused", "fused, compiled"]
    assert [row["title"] for row in bfloat16] in ([], [f"{train['title']}, autocast to bfloat16"])  # as the CPU has it
    assert list(train["ways"]) == ["released order", "this network", "compiled"]
    for row in bfloat16:
        assert list(row["ways"]) == ["released order", "this network"]
    assert len(processes["seconds"]) == 3
    parts = start["seconds"]
    assert parts["all, command to first update"] >= parts["imports"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "load"], "load: needs --data-path DIR"),
        (["--rows", "nothing"], "--rows: invalid choice: 'nothing'"),
        (["--variant", "resnet50"], "--variant resnet50: one of groupmixformer_miny"),
        (["--trials", "0"], "--trials 0: at least 1"),
        (["--batch-size", "0"], "--batch-size 0: at least 1"),
        (["--out", "/proc/benchmark"], "/proc/benchmark"),
        (["--rows", "load", "--data-path", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_use_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tools.benchmark: error: ") and message in error and error.count("\n") == 1
