"""What a user sees who made a mistake: one line that names it, exit status 2, no traceback.

Most cases call the scripts' `main` in this process; what only a process can show starts one.
"""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch
from ranks import run_ranks

import test as test_script
import train as train_script
from data.workers import STOP_SIGNALS
from tasks.networks import build_model
from utils import failures
from utils.session import run_script

ROOT = Path(__file__).resolve().parents[2]
DIGITS = str(ROOT / "configs" / "groupmixformer_digits.yaml")
# A network, a batch and a run that take a moment.
SMALL = (
    "MODEL.GMA.EMBEDDING_DIMS", "[10,10,10,10]", "MODEL.GMA.SERIAL_DEPTHS", "[1,1,1,1]", "DATA.NUM_WORKERS", "0",
    "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "MODEL.NAME", "not_released",
)  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run 'train' or 'test' in this process: (exit status, standard output, standard error)."""

    def exit_now(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", exit_now)  # how scripts leave after an error; here pytest would leave with them
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    main = {"train": train_script.main, "test": test_script.main}

    def run_main(script: str, *words: object, opts: tuple[str, ...] = (), cfg: str = DIGITS) -> tuple[int, str, str]:
        arguments = ["--cfg", cfg, "--output", tmp_path / "out", *words, "--opts", *SMALL, *opts]
        runs.without_curves(monkeypatch.setattr)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            run_script(main[script])
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    yield run_main
    for number, handler in handlers.items():
        signal.signal(number, handler)


def error_line(result: tuple[int, str, str], script: str) -> str:
    """The one line of a run that must have ended in a mistake of the user."""
    status, out, err = result
    assert status == 2, err
    assert err.count("\n") == 1 and err.startswith(f"{script}.py: error: "), err
    assert "Traceback" not in out + err
    return err.removeprefix(f"{script}.py: error: ").strip()


def save_weights(make_config, path: Path, num_classes: int = 3) -> Path:
    network = build_model(make_config("--opts", *SMALL, "MODEL.GMA.NUM_CLASSES", str(num_classes)))
    torch.save({"model": network.state_dict()}, path)
    return path


# --------------------------------------------------------------------------------------------------------- run folder
@pytest.mark.parametrize("script", ["train", "test"])
def test_a_command_that_fails_leaves_no_empty_run_folder(run, tmp_path, image_folder, script):
    flag = "--resume" if script == "test" else "--pretrained"
    (tmp_path / "damaged.pth").write_bytes(b"PK")
    for words in (["--data-path", tmp_path / "absent"], ["--data-path", image_folder, flag, tmp_path / "damaged.pth"]):
        error_line(run(script, *words), script)
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    error_line(run(script, *words), script)
    assert list((tmp_path / "out").iterdir()) == [], "what was there before stays"


def test_a_command_that_fails_leaves_an_older_run_folder_as_it_was(run, tmp_path):
    folder = tmp_path / "out" / "not_released" / "run"
    folder.mkdir(parents=True)
    (folder / "log_rank0.txt").write_text("an older run\n")
    error_line(run("train", "--data-path", tmp_path / "absent", "--tag", "run"), "train")
    assert (folder / "log_rank0.txt").read_text().startswith("an older run\n")


@pytest.mark.parametrize("words", [["test"], ["train", "--eval"], ["train", "--flops"]], ids=" ".join)
def test_an_evaluation_does_not_write_to_the_log_of_a_run(run, tmp_path, image_folder, make_config, words):
    weights = save_weights(make_config, tmp_path / "w.pth")
    folder = tmp_path / "out" / "not_released" / "run"
    folder.mkdir(parents=True)
    (folder / "log_rank0.txt").write_text("a run\n")
    script, *flags = words
    assert run(script, *flags, "--data-path", image_folder, "--tag", "run", "--resume", weights)[0] == 0
    assert (folder / "log_rank0.txt").read_text() == "a run\n"
    assert "command: " in (folder / "log_eval_rank0.txt").read_text()
    names = {path.name for path in folder.iterdir()}
    assert names - {"evaluation"} == {"log_eval_rank0.txt", "log_rank0.txt"}


# ------------------------------------------------------------------------------------------------------- command line
@pytest.mark.parametrize("script", ["train", "test"])
def test_wrong_command_line(run, script):
    """The command line itself, the configuration and the network's file; tests/config has the other mistakes."""
    line = error_line(run(script, "--bach-size", "4"), script)
    assert line == "unknown argument --bach-size; did you mean --batch-size?"
    line = error_line(run(script, opts=("TRAIN.EPOCH", "3")), script)
    assert line == "--opts: unknown key TRAIN.EPOCH; did you mean TRAIN.EPOCHS?"
    line = error_line(run(script, "--model-file", "groupmix.py"), script)
    assert line.startswith("--model-file groupmix.py: no such file in models/; there are groupmixformer.py")


def test_output_that_cannot_be_a_folder(run, tmp_path):
    (tmp_path / "file").touch()
    line = error_line(run("train", "--output", tmp_path / "file"), "train")
    assert "--output" in line and str(tmp_path / "file") in line


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("MODEL.GMA.EMBEDDING_DIMS", "[10,10,10,12]", "12"),
        ("MODEL.GMA.NUM_HEADS", "6", "6 equal heads"),
    ],
)
def test_network_that_cannot_be_cut_evenly(run, image_folder, key, value, expected):
    line = error_line(run("train", "--data-path", image_folder, "--batch-size", "6", opts=(key, value)), "train")
    assert line.startswith("MODEL.GMA") and expected in line


# --------------------------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize("script", ["train", "test"])
def test_missing_data(run, make_config, tmp_path, script):
    weights = ["--pretrained", save_weights(make_config, tmp_path / "w.pth")] if script == "test" else []
    assert "--data-path" in error_line(run(script, *weights), script)
    line = error_line(run(script, *weights, "--data-path", tmp_path / "nowhere"), script)
    split = {"train": "train", "test": "val"}[script]
    assert line == f"--data-path {tmp_path / 'nowhere'}: no such folder; give the one that holds {split}"
    (tmp_path / "empty").mkdir()
    line = error_line(run(script, *weights, "--data-path", tmp_path / "empty"), script)
    assert str(tmp_path / "empty") in line and f"{split}/" in line


def test_classes_of_train_and_val_differ(run, make_config, image_folder, tmp_path):
    (image_folder / "val" / "bee").rename(image_folder / "val" / "wasp")
    weights = save_weights(make_config, tmp_path / "w.pth")
    for script, words in (("train", []), ("test", ["--pretrained", weights])):
        line = error_line(run(script, "--data-path", image_folder, *words), script)
        assert "wasp" in line and str(image_folder) in line


def test_training_set_smaller_than_a_batch(run, image_folder):
    line = error_line(run("train", "--data-path", image_folder, "--batch-size", "20"), "train")
    assert "18 images" in line and "20" in line and "--batch-size" in line


def test_odd_batch_is_for_evaluation_only(run, make_config, image_folder, tmp_path):
    words = ["--data-path", image_folder, "--batch-size", "5"]
    mix = ("AUG.MIXUP", "0.8")
    assert error_line(run("train", *words, opts=mix), "train").startswith("DATA.BATCH_SIZE = 5: mixup and cutmix")
    weights = save_weights(make_config, tmp_path / "w.pth")
    status, out, err = run("test", *words, "--pretrained", weights, opts=mix)
    assert (status, err) == (0, "") and out.splitlines()[-1].startswith(" * Acc@1 ")


def test_a_batch_with_one_value_for_a_batch_norm(run, image_folder):
    words = ["--data-path", image_folder, "--batch-size", "1"]
    line = error_line(run("train", *words), "train")
    assert line.startswith("DATA.BATCH_SIZE = 1 at DATA.IMG_SIZE = 32: ")
    assert line.endswith("take batches of 2, or images of at least 33 pixels")
    assert run("train", *words, opts=("DATA.IMG_SIZE", "33", "TRAIN.UPDATES", "1"))[0] == 0


def test_truncated_image_in_training(run, image_folder):
    path = image_folder / "train" / "cat" / "2.png"
    path.write_bytes(path.read_bytes()[:50])
    words = ["--data-path", image_folder, "--batch-size", "18"]
    line = error_line(run("train", *words, opts=("DATA.MAX_UNREADABLE", "0")), "train")
    assert str(path) in line and "DATA.MAX_UNREADABLE = 0" in line
    status, out, err = run("train", *words, "--tag", "second")
    assert (status, err) == (0, ""), "with the default, the run names it and goes on"
    assert sum(str(path) in text and "is used instead" in text for text in out.splitlines()) == 1


def test_truncated_image_in_validation(run, make_config, image_folder, tmp_path):
    path = image_folder / "val" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:50])
    words = ["--data-path", image_folder, "--pretrained", save_weights(make_config, tmp_path / "w.pth")]
    assert error_line(run("test", *words), "test").startswith(f"{path}: cannot be read as an image")


# ------------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize(("script", "words"), [("test", []), ("train", ["--eval"])])
def test_evaluating_without_weights(run, image_folder, script, words):
    line = error_line(run(script, *words, "--data-path", image_folder), script)
    assert "no weights" in line and "--resume" in line and "--pretrained" in line
    assert "pretrained/not_released.pth" in line


@pytest.mark.parametrize("flag", ["--resume", "--pretrained"])
def test_weights_that_cannot_be_loaded(run, make_config, image_folder, tmp_path, flag):
    path = tmp_path / "w.pth"
    words = ["--data-path", image_folder, flag, path]
    assert error_line(run("test", *words), "test").startswith(f"{flag} {path}: no such file")
    save_weights(make_config, path)
    path.write_bytes(path.read_bytes()[:5000])
    assert error_line(run("test", *words), "test").startswith(f"{path}: damaged")
    save_weights(make_config, path, num_classes=10)
    line = error_line(run("test", *words), "test")
    assert line.startswith(f"{path}: its head has 10 classes, but the data has 3")
    torch.save({"model": {"w": torch.zeros(1)}}, path)
    line = error_line(run("test", *words), "test")
    assert line == f"{path}: holds no weights of a GroupMixFormer; its first names are w"


def test_resuming_from_weights_alone(run, make_config, image_folder, tmp_path):
    path = save_weights(make_config, tmp_path / "w.pth")
    words = ["--data-path", image_folder, "--batch-size", "6", "--resume", path]
    line = error_line(run("train", *words), "train")
    assert str(path) in line and "--pretrained" in line


# -------------------------------------------------------------------------------------------------------- as processes
@pytest.mark.launch
def test_process_ends_with_status_2_and_one_line():
    result = runs.launch("train.py", ["--cfg", DIGITS, "--data_path", "x"])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "train.py: error: unknown argument --data_path; did you mean --data-path?\n"


def test_unreadable_image_in_a_worker_process(make_config, image_folder, tmp_path):
    """torch wraps a worker's exception into its traceback; the user sees the message alone."""
    path = image_folder / "val" / "bee" / "0.png"
    path.write_bytes(b"not an image")
    weights = save_weights(make_config, tmp_path / "w.pth")
    words = ["--cfg", DIGITS, "--data-path", image_folder, "--output", tmp_path / "out", "--pretrained", weights]
    result = run_ranks("test.py", [*map(str, words), "--opts", *SMALL, "DATA.NUM_WORKERS", "1"])
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"test.py: error: {path}: cannot be read as an image: ")


def test_the_line_of_a_failure_is_written_in_one_piece(monkeypatch):
    """Processes share a terminal: written in two, another process's line may come in between."""
    written = []
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    failures.report_failure("no space")
    assert written == ["train.py: error: no space\n"]
