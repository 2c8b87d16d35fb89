"""Runs whose length is given in updates, and validation every few epochs: what `train.py` makes of them."""

import json
import re
from pathlib import Path

import pytest
import runs
import torch

from tasks.classification.task import accuracy_by_chance
from tools.curves import draw_figure, read_run
from utils.checkpoint import load_file
from utils.schedule import run_length, unusual_settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

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
    loss, best, *_ = draw_figure([read_run(folder)]).axes
    assert [list(line.get_xdata()) for line in best.lines] == [[2, 3], [2, 3]], "one line, without gaps"
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3]


def test_a_run_that_continues_keeps_the_warm_up_that_it_began_with(data, tmp_path, monkeypatch):
    """As one that was begun before warm-ups followed does: with EPOCHS alone it had the file's 2 epochs of warm-up."""
    pairs = zip(runs.TINY[::2], runs.TINY[1::2])
    tiny = [word for pair in pairs if pair[0] not in ("TRAIN.EPOCHS", "TRAIN.WARMUP_EPOCHS") for word in pair]
    monkeypatch.setattr(runs, "TINY", tiny)
    outputs = tmp_path / "straight", tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr("configs.load.follow_length", lambda settings, keys: {})
        for output, stop_at in zip(outputs, (None, 3)):
            args = runs.arguments(data, output, "TRAIN.EPOCHS", "3")
            assert runs.train_here(patch, args, stop_at) == (75 if stop_at else 0)
    args = runs.arguments(data, outputs[1], "TRAIN.EPOCHS", "3")
    assert runs.train_here(monkeypatch, args) == 0
    log = (runs.run_folder(outputs[1]) / "log_rank0.txt").read_text()
    assert "TRAIN.WARMUP_EPOCHS = 2: of the run that continues" in log
    digests = [runs.digest(runs.run_folder(output) / "ckpt_epoch_2.pth") for output in outputs]
    assert digests[0] == digests[1]
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path, "TRAIN.EPOCHS", "1")) == 0
    log = (runs.run_folder(tmp_path) / "log_rank0.txt").read_text()
    assert "TRAIN.WARMUP_EPOCHS = 0.1: for TRAIN.EPOCHS = 1 as 2 for TRAIN.EPOCHS = 20; set it" in log
    assert "4 in all, 0 of warm-up" in log


@pytest.mark.parametrize(
    ("cfg", "processes", "opts", "lines"),
    [
        ("small", 8, (), []),
        ("small", 16, (), ["global batch 2048 instead of the recipe's 1024, and learning rates"]),
        ("small", 16, ("TRAIN.RECIPE_BATCH", "2048"), []),
        ("small", 1, ("TRAIN.ACCUMULATION_STEPS", "8"), []),
        ("large_384", 8, ("DATA.BATCH_SIZE", "16", "TRAIN.ACCUMULATION_STEPS", "4"), []),
        ("digits", 1, (), []),
        ("digits", 2, (), ["global batch 128 instead of the recipe's 64"]),
        ("digits", 1, ("EMA.DECAY", "0.9999"), []),
        (
            "digits",
            1,
            ("EMA.DECAY", "0.9999", "EMA.WARMUP", "False"),
            ["EMA.DECAY = 0.9999 averages over 10000 updates"],
        ),
    ],
)
def test_what_is_seldom_meant_is_one_line(make_config, cfg, processes, opts, lines):
    config = make_config("--cfg", str(CONFIGS / f"groupmixformer_{cfg}.yaml"), *(["--opts", *opts] if opts else []))
    found = unusual_settings(config, processes, run_length(config, 22 if cfg == "digits" else 1251))
    assert len(found) == len(lines) and all(line.startswith(start) for line, start in zip(found, lines))


def test_a_run_that_ends_at_chance_says_so(data, tmp_path, monkeypatch):
    """All images get one class: what guessing reaches too. A run whose network has learnt says nothing."""
    assert accuracy_by_chance([0, 1] * 5000) == pytest.approx(51)
    assert accuracy_by_chance([0] * 30 + [1] * 10) == pytest.approx(75 + 200 * (0.75 * 0.25 / 40) ** 0.5)
    assert accuracy_by_chance([0, 1]) is None, "two images tell nothing"
    for best, told in ((49.9, True), (51.1, False)):
        runs.change_task(monkeypatch, lambda task, b=best: {"validate": lambda network: {"acc1": b}, "by_chance": 51.0})
        args = runs.arguments(data, tmp_path / str(best), "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
        assert runs.train_here(monkeypatch, args) == 0
        log = (runs.run_folder(tmp_path / str(best)) / "log_rank0.txt").read_text()
        assert ("best acc1 49.900: guessing may reach 51.000 on so many images, so nothing shows" in log) == told
