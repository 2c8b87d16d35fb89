"""A file that is named is used, or said not to be, or refused; where results go is tried before the work."""

import json
import os
import stat
from pathlib import Path

import pytest
import runs
import torch

import train
from configs import UserError, read_config, with_num_classes
from tasks import evaluate, keys_of
from tasks.classification import single_label
from tasks.networks import build_model
from utils import files
from utils.session import start_session

ONE_EPOCH = ("TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")


@pytest.fixture
def weights(data: Path, tmp_path: Path) -> Path:
    """Weights to start from."""
    network = build_model(with_num_classes(read_config(runs.arguments(data, tmp_path), keys_of), 3))
    torch.save({"model": network.state_dict()}, tmp_path / "w.pth")
    return tmp_path / "w.pth"


@pytest.fixture
def train_again(data, tmp_path, monkeypatch, capsys):
    """Run train.py in the same run folder; returns its status and what it printed."""

    def run(*flags):
        status = runs.train_here(monkeypatch, runs.arguments(data, tmp_path, *ONE_EPOCH, flags=[*map(str, flags)]))
        return status, capsys.readouterr().out

    return run


def test_weights_to_start_from_in_a_folder_that_resumes(train_again, weights, tmp_path, monkeypatch):
    """The same command continues the run; a second fine-tuning, from other weights, must not run into the first."""
    assert f"starting from raw weights of {weights}" in train_again("--pretrained", weights)[1]
    last = runs.run_folder(tmp_path) / "ckpt_epoch_0.pth"
    monkeypatch.chdir(tmp_path)
    status, out = train_again("--pretrained", weights.name)
    assert status == 0 and f"--pretrained w.pth is not used: the run continues from {last}" in out
    assert f"nothing to do: {last} is the end of a run of 1 epochs; train longer with" in out and "Train:" not in out
    status, out = train_again()
    assert status == 0 and "not used" not in out and "nothing to do" in out

    other = tmp_path / "other.pth"
    other.write_bytes(weights.read_bytes())
    with pytest.raises(UserError, match=r"another recipe: MODEL\.PRETRAINED '.*w\.pth' -> '.*other\.pth'; .* --tag"):
        train_again("--pretrained", other)
    status, out = train_again("--pretrained", other, "--allow-changes")
    assert status == 0 and "continuing with a change: MODEL.PRETRAINED" in out
    for flag in ("--pretrained", "--resume"):
        with pytest.raises(UserError, match=rf"^{flag} none\.pth: no such file"):
            train_again(flag, "none.pth")


def test_a_class_map_that_does_not_exist_is_an_error(data, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^MODEL\.CLASS_MAP none\.txt: no such file"):
        runs.train_here(monkeypatch, runs.arguments(data, tmp_path, "MODEL.CLASS_MAP", "none.txt"))
    assert not runs.run_folder(tmp_path).exists()


def evaluate_here(monkeypatch, data, tmp_path, *words):
    monkeypatch.setattr("sys.argv", ["test.py", *runs.arguments(data, tmp_path, flags=[*map(str, words)])])
    evaluate(start_session("", keys_of))


def test_weights_that_an_evaluation_does_not_use(weights, data, tmp_path, monkeypatch, capsys):
    evaluate_here(monkeypatch, data, tmp_path, "--resume", weights, "--pretrained", tmp_path / "w.pth", "--flops")
    out = capsys.readouterr().out
    assert f"--resume {weights} is not used: weights are not needed" in out
    assert f"--pretrained {weights} is not used: weights are not needed" in out
    other = tmp_path / "other.pth"
    other.touch()
    words = ("--resume", weights, "--pretrained", other, "--class-names", "names.txt")
    evaluate_here(monkeypatch, data, tmp_path, *words)
    out = capsys.readouterr().out
    assert f"--pretrained {other} is not used: {weights} is evaluated" in out
    assert "--class-names names.txt is not used: it is for --images" in out
    for flag in ("--resume", "--pretrained"):
        with pytest.raises(UserError, match=rf"^{flag} none\.pth: no such file"):
            evaluate_here(monkeypatch, data, tmp_path, "--flops", flag, "none.pth")


def test_results_that_nothing_writes_are_refused(weights, data, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", *runs.arguments(data, tmp_path, flags=["--json", "a.json"])])
    with pytest.raises(UserError, match=r"^--json a\.json: nothing is written there; leave it out"):
        train.main()
    with pytest.raises(UserError, match=r"^--out folder: nothing is written there; leave it out"):
        evaluate_here(monkeypatch, data, tmp_path, "--resume", weights, "--out", "folder")


# ------------------------------------------------------------------------------------------------- before the long work
def test_a_name_that_the_system_refuses_is_told_before_the_pass(weights, data, tmp_path, monkeypatch):
    """240 letters are a name for a file; with what the evaluation adds they are none for its folder."""
    long = tmp_path / f"{'w' * 240}.pth"
    weights.rename(long)
    monkeypatch.setattr(single_label, "predict", lambda *args: pytest.fail("the pass began"))
    with pytest.raises(
        UserError, match=r"/w+-val-data-32-uncropped: cannot be written: File name too long; name another"
    ):
        evaluate_here(monkeypatch, data, tmp_path, "--resume", long)
    target = tmp_path / f"{'j' * 249}.json"
    with pytest.raises(UserError, match=r"^--json .*/j+\.json: cannot be written: File name too long"):
        evaluate_here(monkeypatch, data, tmp_path, "--resume", long, "--json", target)
    assert not (runs.run_folder(tmp_path) / "evaluation").exists()


def test_what_is_tried_leaves_nothing_behind(tmp_path):
    files.check_folder(tmp_path / "a" / "b", "c.csv")
    (tmp_path / "x.json").write_text("mine")
    files.check_json_target(str(tmp_path / "x.json"))
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"] and (tmp_path / "x.json").read_text() == "mine"
    os.mkfifo(tmp_path / "pipe")
    files.check_json_target(str(tmp_path / "pipe"))  # and does not wait for a reader
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    for target in (tmp_path, tmp_path / "x.json" / "y", tmp_path / "none" / "y"):
        with pytest.raises(UserError, match=rf"^--json {target}: cannot be written: "):
            files.check_json_target(str(target))
    assert json.dumps([path.name for path in sorted(tmp_path.iterdir())]) == '["pipe", "x.json"]'
