"""An evaluation takes its configuration from the checkpoint, says where another differs, and writes beside the run."""

import json
import os
import re
from pathlib import Path

import pytest
import runs
import torch
import yaml
from yacs.config import CfgNode

import train
from configs import UserError, read_config
from configs.keys import KEYS, network, recipe
from configs.load import read_command
from models.weights import num_classes_of
from tasks import evaluate, keys_of
from tools import export, visualize
from utils.checkpoint import load_file
from utils.origin import config_of, run_folder_of
from utils.session import start_session

DIGITS = str(runs.ROOT / "configs" / "groupmixformer_digits.yaml")
OTHER = ("DATA.IMG_SIZE", "48", "TEST.CROP", "True", "DATA.INTERPOLATION", "nearest", "MODEL.GMA.NUM_HEADS", "16")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run whose size, preprocessing and heads are not those of its YAML file."""
    output = tmp_path_factory.mktemp("trained")
    short = ("TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    with pytest.MonkeyPatch.context() as patch:
        assert runs.train_here(patch, runs.arguments(data, output, *OTHER, *short)) == 0
    return runs.run_folder(output)


@pytest.fixture
def evaluate_here(trained, tmp_path, monkeypatch, capsys):
    """Run test.py in an empty folder; returns what it printed."""

    def run(*words, weights=trained / "ckpt_best.pth"):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["test.py", "--resume", *map(str, (weights, *words))])
        evaluate(start_session("", keys_of))
        return capsys.readouterr().out

    return run


def test_without_cfg_the_accuracy_is_that_of_the_run_and_the_results_are_in_its_folder(
    trained, data, evaluate_here, tmp_path
):
    out = evaluate_here("--data-path", data)
    (told,) = re.findall(r"Best acc1: (\S+)", (trained / "log_rank0.txt").read_text())
    assert out.splitlines()[-1].startswith(f" * Acc@1 {told} ")
    assert f"no --cfg: network, data set, image size and preprocessing are those that {trained}" in out
    assert "here, and was" not in out
    metrics = json.loads((trained / "evaluation" / "ckpt_best-val-data-48" / "metrics.json").read_text())
    assert (metrics["model"], metrics["image_size"], metrics["crop"]) == ("tiny", 48, True)
    assert list(tmp_path.iterdir()) == []


def test_with_cfg_each_difference_that_changes_results_is_one_line(trained, data, evaluate_here, tmp_path):
    opts = (*runs.TINY, "MODEL.NAME", "renamed", "TRAIN.EPOCHS", "7", "MODEL.GMA.NUM_HEADS", "16")
    out = evaluate_here("--cfg", DIGITS, "--data-path", data, "--opts", *opts)
    said = re.findall(rf"^(\S+) is (\S+) here, and was (\S+) when {trained}/ckpt_best.pth was trained", out, re.M)
    assert said == [
        ("DATA.IMG_SIZE", "32", "48"), ("DATA.INTERPOLATION", "'bicubic'", "'nearest'"), ("TEST.CROP", "False", "True"),
    ]  # fmt: skip
    assert (trained / "evaluation" / "ckpt_best-val-data-32-uncropped").is_dir() and list(tmp_path.iterdir()) == []
    evaluate_here("--data-path", data, "--output", tmp_path / "mine", "--tag", "t")
    assert (tmp_path / "mine" / "tiny" / "t" / "evaluation" / "ckpt_best-val-data-48").is_dir(), "where one says so"


def test_pictures_exports_drawings_and_measurements_take_it_too(
    trained, data, evaluate_here, tmp_path, monkeypatch, capsys
):
    picture = next((data / "val").rglob("*.png"))
    out = evaluate_here("--images", picture, "--out", tmp_path, "--json", tmp_path / "top.json")
    assert json.loads((tmp_path / "top.json").read_text())["image_size"] == 48 and "numbers are shown" not in out
    assert "tiny at 48 x 48, 3 classes: " in evaluate_here("--flops")

    assert visualize.main(["--resume", str(trained / "ckpt_best.pth"), "--image", str(picture), "--stage", "2"]) == 0
    assert (trained / "visualized" / f"{picture.stem}.png").is_file()

    sizes = []
    monkeypatch.setattr(export, "export", lambda network, path, to, size, report: (sizes.append(size), path.touch()))
    assert export.main(["--resume", str(trained / "ckpt_best.pth"), "--format", "pt2"]) == 0
    assert sizes == [(48, 48)] and Path("tiny.pt2").is_file()
    assert "here, and was" not in capsys.readouterr().out


def test_a_run_of_somebody_else_is_not_written_to(trained, monkeypatch):
    assert run_folder_of(trained / "ckpt_best.pth") == trained
    monkeypatch.setattr(os, "access", lambda path, mode: path != trained)
    assert run_folder_of(trained / "ckpt_best.pth") is None


def test_weights_outside_of_a_run_say_nothing_of_a_folder(trained, data, evaluate_here, tmp_path):
    copy = tmp_path / "elsewhere" / "mine.pth"
    copy.parent.mkdir()
    copy.write_bytes((trained / "ckpt_best.pth").read_bytes())
    evaluate_here("--data-path", data, weights=copy)
    assert (tmp_path / "output" / "tiny" / "default" / "evaluation" / "mine-val-data-48").is_dir()


def test_only_what_describes_network_and_preprocessing_is_taken(trained):
    """Not paths of another machine, and not how it was trained."""
    path = str(trained / "ckpt_best.pth")
    _, config, _ = read_command(
        ["--pretrained", path, "--opts", "TEST.CROP", "False"], keys_of, print, config_of=config_of
    )
    stored = config_of(path)
    assert stored["OUTPUT"] and stored["DATA.DATA_PATH"] and stored["TRAIN.EPOCHS"] == 1
    assert (config.OUTPUT, config.DATA.DATA_PATH, config.TRAIN.EPOCHS, config.DATA.BATCH_SIZE) == ("", "", 300, 128)
    assert (config.MODEL.NAME, config.DATA.IMG_SIZE, config.MODEL.GMA.NUM_HEADS) == ("tiny", 48, 16)
    assert config.MODEL.GMA.NUM_CLASSES == num_classes_of(load_file(path)["model"]) == 3
    assert config.TEST.CROP is False, "options win"


def test_another_task_says_on_its_cards_what_is_kept_with_weights():
    toys = {"toy": {"TOY.SIZE": network(3, "size, pixels"), "TOY.RATE": recipe(0.1, "a rate of training")}}
    stored = {"TASK": "toy", "TOY.SIZE": 5, "TOY.RATE": 0.2, "TOY.GONE": 1, "MODEL.NAME": "toys"}
    _, config, _ = read_command(
        ["--resume", "w.pth"], toys.__getitem__, lambda line: None, config_of=lambda path: stored
    )
    assert (config.TASK, config.TOY.SIZE, config.TOY.RATE, config.MODEL.NAME) == ("toy", 5, 0.1, "toys")
    stored["TOY.SIZE"] = "wide"
    with pytest.raises(UserError, match=r"^w\.pth: TOY.SIZE = 'wide': must be a whole number"):
        read_command(["--resume", "w.pth"], toys.__getitem__, lambda line: None, config_of=lambda path: stored)


@pytest.mark.parametrize("config", [None, CfgNode({"MODEL": {"NAME": "groupmixformer"}}), "not: [yaml", "A: 1"])
def test_released_files_hold_none_and_cfg_is_asked_for(tmp_path, evaluate_here, config):
    torch.save({"model": {"w": torch.zeros(1)}} | ({"config": config} if config else {}), tmp_path / "w.pth")
    assert config_of(tmp_path / "w.pth") is None
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/w.pth: holds no configuration of its network; name the YAML file"
    ):
        evaluate_here(weights=tmp_path / "w.pth")


def test_training_needs_cfg(trained, data, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--resume", str(trained / "ckpt_best.pth"), "--data-path", str(data)])
    with pytest.raises(UserError, match=r"^--cfg is missing: training needs the YAML file"):
        train.main()


def test_the_file_in_a_run_folder_and_the_one_in_its_checkpoint_are_the_same(trained):
    written = read_config(["--cfg", str(trained / "config.json")], keys_of)
    stored = config_of(trained / "ckpt_best.pth")
    assert (
        yaml.safe_load(yaml.safe_dump(stored)) == stored and stored.keys() == {**KEYS, **keys_of(written.TASK)}.keys()
    )
