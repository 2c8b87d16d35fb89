"""Names that cannot be printed end nothing: they are escaped, on any terminal and in any log."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import pytest
import runs
from image_data import png
from ranks import in_fork, script

from configs.commands import command
from configs.errors import UserError
from configs.text import escape_output, printable
from tasks.classification.predictions import Predictions
from utils.run_log import METRICS_NAME, git_commit

CLASSES = ("größe", "caf\udce9", "猫 $x_1$")  # the second is not UTF-8
PICTURE = "b\udce4d.png"


@pytest.fixture
def odd_names(tmp_path):
    """4 images a class; one for training is damaged."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                (folder / f"{number}{PICTURE}").write_bytes(png(40 * number, (32, 32)))
    (root / "train" / CLASSES[1] / f"0{PICTURE}").write_bytes(b"no image")
    return root


def narrow(encoding: str):
    """Let standard output be as with PYTHONIOENCODING."""

    def prepare() -> None:
        sys.stdout.reconfigure(encoding=encoding, errors="strict")

    return prepare


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_a_run_its_evaluation_and_pictures_of_names_that_cannot_be_printed(odd_names, tmp_path, encoding):
    args = runs.arguments(odd_names, tmp_path / "out", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    code, output = in_fork(script("train.py", args, narrow(encoding)))
    assert code == 0 and f"{ascii(CLASSES[1])[1:-1]}/0" in output and "Logging error" not in output, output
    folder = runs.run_folder(tmp_path / "out")
    log = (folder / "log_rank0.txt").read_text(encoding="utf-8")
    assert "caf\\udce9/0b\\udce4d.png" in log and "is used instead" in log
    assert json.loads((folder / METRICS_NAME).read_text())["epoch"] == 0

    weights = ["--pretrained", str(folder / "ckpt_epoch_0.pth"), "--json", "-"]
    code, output = in_fork(script("test.py", [*args[:8], *weights, *args[8:]], narrow(encoding)))
    assert code == 0, output
    (predictions,) = folder.glob("evaluation/*/predictions.csv")
    assert f"{CLASSES[1]}/0{PICTURE}" in Predictions.load(predictions).paths
    with open(predictions, encoding="utf-8", errors="surrogateescape") as file:
        assert {row["label_name"] for row in csv.DictReader(file)} == set(CLASSES)

    pictures = ["--images", str(odd_names / "train" / CLASSES[1])]
    code, output = in_fork(script("test.py", [*args[:8], *weights[:2], *pictures, *args[8:]], narrow(encoding)))
    assert code == 1 and "1 of 4 pictures: see above" in output and "Logging error" not in output, output


def test_text_is_escaped_where_it_is_none():
    assert printable("größe 猫") == "größe 猫"
    assert printable("größe\n\x1b[31mcaf\udce9") == r"größe\n\x1b[31mcaf\udce9"
    assert printable(printable("a\udce9")) == "a\\udce9"
    assert UserError("caf\udce9/x\x07: damaged").one_line() == r"caf\udce9/x\x07: damaged"


def test_a_command_prints_on_any_terminal(monkeypatch):
    narrow_out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow_out)
    monkeypatch.setattr(sys, "stderr", None)  # closed: `2>&-`

    @command("tools.example")
    def main(argv: object) -> None:
        print("größe caf\udce9")
        raise UserError("größe")

    assert main([]) == 2
    narrow_out.flush()
    assert narrow_out.buffer.getvalue() == b"gr\\xf6\\xdfe caf\\udce9\n"
    assert sys.stderr.name == os.devnull
    sys.stderr.close()


def test_a_notebook_prints_itself(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    escape_output()


def test_a_changed_file_of_any_name_is_no_hindrance_to_git(monkeypatch, tmp_path):
    fake = tmp_path / "git"
    fake.write_bytes(b"#!/bin/sh\nprintf 'M caf\\351'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert git_commit().endswith("+changes") and Path(fake).exists()


def test_a_path_that_the_system_refuses_ends_a_command_in_one_line(capsys):
    main = command("tools.example")(lambda argv: Path(argv[0]).stat() and None)
    assert main(["x" * 600]) == 2
    assert capsys.readouterr().err == f"tools.example: error: {'x' * 600}: File name too long\n"
