"""The page about fine-tuning: its five commands go from photographs to a picture, and its other commands train."""

import importlib
import re
import shlex
import shutil
import sys

import pytest
import runs
import timm
import torch
import yaml

import models  # noqa: F401 - registers the teacher with timm
from configs import read_config, with_num_classes
from configs.load import to_dict
from tasks import keys_of
from tasks.classification import evaluation
from tasks.networks import build_model
from utils.session import start_session

PAGE = (runs.ROOT / "docs" / "fine-tuning.md").read_text()
BLOCKS = [
    [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
]
WALK, OTHERS = BLOCKS[0], [command for block in BLOCKS[1:] for command in block]
# The last lines that the page shows, in the order of the commands. Here numbers and folders differ, and a network that
# has learnt nothing gets a warning as well.
SHOWN = re.findall(r"^\| \d \|.*\| `(.*)` \|$", PAGE, re.MULTILINE)
# A small network of four stages, of which tools.visualize shows the last; what the recipes decide stays.
SMALL = (
    *("DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", "0", "MODEL.GMA.EMBEDDING_DIMS", "[20, 20, 20, 20]"),
    *("MODEL.GMA.SERIAL_DEPTHS", "[1, 1, 1, 1]", "MODEL.GMA.MLP_RATIOS", "[2, 2, 2, 2]", "MODEL.GMA.NUM_STAGES", "4"),
)
SHORT = (*SMALL, "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")


@pytest.fixture
def weights(data, tmp_path):
    """A checkpoint of the small network for other classes, three too."""
    config = with_num_classes(read_config(runs.arguments(data, tmp_path, *SMALL), keys_of), 3)
    torch.save({"model": build_model(config).state_dict(), "config": yaml.safe_dump(to_dict(config))}, tmp_path / "w")
    return tmp_path / "w"


def run_command(words, monkeypatch, capsys):
    """A command of the page in this process; returns what it shows, a text."""
    monkeypatch.setattr(sys, "argv", words[1:])
    if words[1] == "train.py":
        assert runs.train_here(monkeypatch, words[2:]) == 0
    elif words[1] == "test.py":
        evaluation.evaluate(start_session("", keys_of))
    else:
        assert importlib.import_module(words[2]).main(words[3:]) == 0
    shown = capsys.readouterr()
    return shown.out + shown.err


def likeness(line):
    """A pattern for a line with other numbers and in another folder."""
    line = re.sub(r"output/\S+/", "FOLDER", re.sub(r"\d+(\.\d+)?", "0", line))
    return re.escape(line).replace("FOLDER", r"\S+/").replace("0", r"\d+(\.\d+)?").replace("raw", "(raw|ema)")


@pytest.mark.long
def test_the_five_commands(data, weights, tmp_path, monkeypatch, capsys):
    photographs, new = tmp_path / "photographs", tmp_path / "new"
    shutil.copytree(data / "train", photographs)
    shutil.copytree(data / "val" / "ant", new)
    shutil.copy(new / "0.png", new / "ship.png")
    places = {"<photographs>": photographs, "groupmixformer_small.pth": weights, "<folder>": new}
    places |= {"<picture>": new / "ship.png"}
    best = "output/groupmixformer_small/fine_tuning/ckpt_best.pth"
    places[best] = tmp_path / "output" / "tiny" / "fine_tuning" / "ckpt_best.pth"
    assert len(WALK) == len(SHOWN) == 5
    for command, shown in zip(WALK, SHOWN):
        words = [str(places.get(word, runs.ROOT / word if word.startswith("configs/") else word)) for word in command]
        if "train.py" in words:
            words += ["--output", str(tmp_path / "output"), "--batch-size", "6", "--opts", "MODEL.NAME", "tiny", *SHORT]
        elif "tools.check" in words:
            words += ["--opts", "DATA.BATCH_SIZE", "6"]
        text = run_command(words, monkeypatch, capsys)
        assert re.search(rf"^{likeness(shown)}$", text, re.MULTILINE), (shown, text)
    folder = tmp_path / "output" / "tiny" / "fine_tuning"
    assert len(list((folder / "evaluation").glob("*/predictions.csv"))) == 1
    assert len((folder / "evaluation" / "ckpt_best-pictures.csv").read_text().splitlines()) == 4
    assert (folder / "visualized" / "ship.png").is_file()


@pytest.mark.parametrize("command", OTHERS, ids=" ".join)
def test_the_other_commands_train(command, data, weights, tmp_path, monkeypatch):
    """One epoch of the small network, with all that the recipes decide."""
    teacher = tmp_path / "teacher.pth"
    if "<teacher>" in command:
        torch.save(timm.create_model("groupmixformer_miny", num_classes=3).state_dict(), teacher)
    quickstart = "output/groupmixformer_digits/quickstart/ckpt_best.pth"
    places = {"<weights>": weights, "<teacher>": teacher, quickstart: weights, "datasets/digits": data}
    places |= dict.fromkeys(("<first>", "<others>", "<all>", "<photographs>"), data)
    assert command[:2] == ["python", "train.py"]
    words = [str(places.get(word, runs.ROOT / word if word.startswith("configs/") else word)) for word in command[2:]]
    words += ["--output", str(tmp_path / "output"), "--batch-size", "6", "--opts", "MODEL.NAME", "tiny", *SHORT]
    assert runs.train_here(monkeypatch, words) == 0
    assert len(list((tmp_path / "output" / "tiny").glob("*/ckpt_best.pth"))) == 1


def test_sentences_are_short():
    """A page for readers who are new here."""
    text = re.sub(r"```.*?```|`[^`]*`", "x", PAGE, flags=re.DOTALL)
    sentences = re.split(r"[.:!?]\s|\n\n|\||^#+ ", text, flags=re.MULTILINE)
    assert [sentence for sentence in sentences if len(sentence.split()) > 30] == []
