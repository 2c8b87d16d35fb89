"""Runs whose length is given in updates, and validation every few epochs: what `train.py` makes of them."""

import json
import re

import pytest
import runs
import torch

from utils.checkpoint import load_file

# 18 images, 4 an update: epochs of 4 updates, the last one of 2. The rate falls at the same updates, however long.
STEPS = ("TRAIN.LR_SCHEDULER.NAME", "multistep", "TRAIN.LR_SCHEDULER.MILESTONES", "[3, 5]")
OPTS = (*STEPS, "TRAIN.UPDATES", "6", "TRAIN.WARMUP_UPDATES", "2")


def results(output):
    """Digest of the last checkpoint of two epochs, and the samples."""
    folder = runs.run_folder(output)
    return runs.digest(folder / "ckpt_epoch_1.pth"), (folder / "samples_rank0.txt").read_text()


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        output = tmp_path_factory.mktemp("straight")
        assert runs.train_here(monkeypatch, runs.arguments(data, output, *OPTS)) == 0
    return output


def test_a_run_of_so_many_updates(straight):
    """Its last epoch is short, and validated and saved like every other."""
    folder = runs.run_folder(straight)
    log = (folder / "log_rank0.txt").read_text()
    assert re.findall(r"Train: (\S+)", log)[-3:] == ["[0/2][3/4]", "[1/2][0/2]", "[1/2][1/2]"]
    assert "4 updates per epoch, 6 in all, 2 of warm-up" in log and "6 updates done: best acc1" in log
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["updates"] for line in lines] == [4, 6] and all("acc1_raw" in line for line in lines)
    checkpoint = load_file(folder / "ckpt_epoch_1.pth")
    assert (checkpoint["num_updates"], checkpoint["epoch"]) == (6, 1)
    assert int(checkpoint["optimizer"]["state"][0]["step"]) == 6


@pytest.mark.parametrize("stop_at", [5, 6])
def test_stopped_in_the_short_epoch(data, tmp_path, monkeypatch, straight, stop_at):
    args = runs.arguments(data, tmp_path, *OPTS)
    assert runs.train_here(monkeypatch, args, stop_at) == 75
    assert (runs.run_folder(tmp_path) / f"ckpt_epoch_1_update_{stop_at - 4}.pth").is_file()
    torch.manual_seed(12345)
    assert runs.train_here(monkeypatch, args) == 0
    assert results(tmp_path) == results(straight)
    assert runs.train_here(monkeypatch, args) == 0, "a finished run that is started again"
    assert results(tmp_path) == results(straight)


def test_a_run_of_updates_that_is_to_be_longer_goes_on_within_its_last_epoch(data, tmp_path, monkeypatch):
    longer = (*OPTS, "TRAIN.UPDATES", "10")
    outputs = tmp_path / "straight", tmp_path / "longer"
    assert runs.train_here(monkeypatch, runs.arguments(data, outputs[0], *longer)) == 0
    assert runs.train_here(monkeypatch, runs.arguments(data, outputs[1], *OPTS)) == 0
    args = runs.arguments(data, outputs[1], *longer, flags=["--allow-changes"])
    assert runs.train_here(monkeypatch, args, stop_at=7) == 75
    assert runs.train_here(monkeypatch, args) == 0, "the checkpoint of the short epoch is not taken for the newest"
    samples = [(runs.run_folder(output) / "samples_rank0.txt").read_text() for output in outputs]
    assert samples[0] == samples[1]
    first, second = (load_file(runs.run_folder(output) / "ckpt_epoch_2.pth") for output in outputs)
    assert first["num_updates"] == second["num_updates"] == 10
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())


def test_validation_every_few_epochs(data, tmp_path, monkeypatch):
    args = runs.arguments(data, tmp_path, "TRAIN.VAL_FREQ", "2", "TRAIN.EPOCHS", "3")
    assert runs.train_here(monkeypatch, args) == 0
    folder = runs.run_folder(tmp_path)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert ["acc1_ema" in line for line in lines] == [False, True, True], "the last one always"
    assert (folder / "log_rank0.txt").read_text().count("Best acc1") == 2
    assert [load_file(folder / f"ckpt_epoch_{epoch}.pth")["is_best"] for epoch in range(2)] == [False, True]
