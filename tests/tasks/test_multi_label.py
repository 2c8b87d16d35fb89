"""DATA.MULTI_LABEL: images of several classes or none."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import runs
import torch
from image_data import message_of
from PIL import Image
from pyarrow import parquet
from ranks import run_ranks

from configs import UserError
from data import fingerprint
from data.label_files import LabelFileSource
from data.sources import count_images
from data.splits import with_classes
from tasks import load_model
from tasks.classification.images import open_split, open_train_and_val, train_dataset
from tasks.classification.multi_label import numbers_of
from tasks.classification.transforms import eval_transform
from tools.report import read_evaluation

OFF = ("AUG.MIXUP", "0", "AUG.CUTMIX", "0", "MODEL.LABEL_SMOOTHING", "0")
# Of every image, its classes: none, one, two or three of them.
SETS = ("", "red", "green|red", "blue", "red|blue|green", "green")


@pytest.fixture
def files(image_folder, tmp_path) -> tuple[str, ...]:
    """Options of a multi-label data set: 18 images to train, 6 to validate."""
    opts = ["DATA.MULTI_LABEL", "True"]
    for split in ("train", "val"):
        paths = sorted(path.relative_to(image_folder) for path in (image_folder / split).rglob("*.png"))
        lines = [f"{path},{SETS[number % 6]}" for number, path in enumerate(paths)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["path,class", *lines]))
        opts += [f"DATA.{split.upper()}_LABELS", str(tmp_path / f"{split}.csv")]
    return tuple(opts)


# ----------------------------------------------------------------------------------------------------------------- data
def test_images_have_sets_of_classes(make_config, image_folder, files):
    config = make_config("--data-path", image_folder, "--opts", *files)
    source = open_split(config, "train", 0, 1)
    assert source.classes == ["blue", "green", "red"]
    assert [labels for _, labels in source.samples][:6] == [(), (2,), (1, 2), (0,), (0, 1, 2), (1,)]
    assert count_images(source) == [6, 9, 9]
    targets = [train_dataset(config, source)[index][1] for index in range(6)]
    assert torch.stack(targets).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 1, 0]]
    assert targets[0].dtype == torch.float32


def test_parquet_takes_lists(image_folder, tmp_path):
    paths = ["train/ant/0.png", "train/ant/1.png", "train/ant/2.png", "train/ant/3.png"]
    table = pyarrow.table({"path": paths, "class": [["b", "a"], [], None, ["b", "b"]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    source = LabelFileSource(image_folder, tmp_path / "a.parquet", several=True)
    assert [labels for _, labels in source.samples] == [(0, 1), (), (), (1,)]
    assert "a.parquet, row 1: has 2 classes instead of one" in message_of(
        LabelFileSource, image_folder, tmp_path / "a.parquet"
    )


def test_classes_are_matched_by_name_and_told_apart(image_folder, files):
    source = LabelFileSource(image_folder, files[3], several=True)
    mapped = with_classes(source, ["red", "violet", "green", "blue"])
    assert [labels for _, labels in mapped.samples][:6] == [(), (0,), (0, 2), (3,), (0, 2, 3), (2,)]
    assert fingerprint(mapped) != fingerprint(source)
    assert "only in val: blue" in message_of(with_classes, source, ["red", "green"])


def test_a_share_is_held_out(make_config, image_folder, files):
    config = make_config("--data-path", image_folder, "--opts", *files[:4], "DATA.VAL_SHARE", "0.3")
    train, val = open_train_and_val(config, 0, 1, lambda line: None)
    assert (len(train.samples), len(val.samples)) == (13, 5)
    every = dict(open_split(make_config("--data-path", image_folder, "--opts", *files), "train", 0, 1).samples)
    assert {**dict(train.samples), **dict(val.samples)} == every


# -------------------------------------------------------------------------------------------------------------- numbers
def average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """The definition: at every right image, in falling order of scores, the precision down to it; their mean."""
    right = targets[np.argsort(-scores)]
    return float((np.cumsum(right) / np.arange(1, len(right) + 1))[right].mean())


def test_mean_average_precision_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(40, 5)).astype(np.float32), rng.random((40, 5)) < 0.3
    targets[:, 3] = False
    numbers, precisions = numbers_of(logits, targets)
    expected = [100 * average_precision(logits[:, k], targets[:, k]) for k in (0, 1, 2, 4)]
    np.testing.assert_allclose(precisions[[0, 1, 2, 4]], expected)
    assert math.isnan(precisions[3]) and numbers["map"] == pytest.approx(np.mean(expected))
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    loss = -np.where(targets, np.log(probabilities), np.log(1 - probabilities)).mean()
    assert numbers["loss"] == pytest.approx(loss)


def test_extreme_outputs_give_numbers_or_nan():
    targets = np.array([[True, False], [False, True], [True, True]])
    assert numbers_of(np.where(targets, 1e4, -1e4).astype(np.float32), targets)[0] == {"map": 100.0, "loss": 0.0}
    assert numbers_of(np.zeros((3, 2), np.float32), targets)[0]["map"] == pytest.approx(200 / 3), "all scores equal"
    for wrong in (np.full((3, 2), np.nan, np.float32), np.full((3, 2), np.inf, np.float32)):
        assert all(map(math.isnan, numbers_of(wrong, targets)[0].values()))
    assert math.isnan(numbers_of(np.zeros((3, 2), np.float32), np.zeros((3, 2), bool))[0]["map"])


# ----------------------------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ((), "DATA.MULTI_LABEL: takes no AUG.MIXUP, AUG.CUTMIX; set AUG.MIXUP 0 AUG.CUTMIX 0"),
        ((*OFF, "MODEL.LABEL_SMOOTHING", "0.1"), "DATA.MULTI_LABEL: takes no MODEL.LABEL_SMOOTHING"),
        ((*OFF, "DATA.CLASS_BALANCE", "1"), "DATA.MULTI_LABEL: takes no DATA.CLASS_BALANCE; set DATA.CLASS_BALANCE 0"),
        (
            (*OFF, "LOSS.CLASS_WEIGHTS", "balanced"),
            "DATA.MULTI_LABEL: takes no LOSS.CLASS_WEIGHTS; set LOSS.CLASS_WEIGHTS ''",
        ),
        (
            (*OFF, "LOSS.NAME", "bce", "LOSS.BCE_THRESHOLD", "0.5"),
            "DATA.MULTI_LABEL: takes no LOSS.BCE_THRESHOLD; set LOSS.BCE_THRESHOLD None",
        ),
        ((*OFF, "DATA.TRAIN_LABELS", ""), "DATA.MULTI_LABEL: needs files with the classes of the images"),
    ],
)
def test_recipes_that_do_not_go_with_it_are_refused(image_folder, files, tmp_path, monkeypatch, opts, message):
    args = runs.arguments(image_folder, tmp_path, *files, "MODEL.LABEL_SMOOTHING", "0", *opts)
    assert message_of(runs.train_here, monkeypatch, args).startswith(message)


def test_the_loss_is_binary_cross_entropy(image_folder, files, tmp_path, monkeypatch):
    found = []

    def watched(task):
        def loss(model, batch):
            images, targets = batch
            right = model(images).detach().sigmoid()  # batch norms see the same batch, and no path is dropped
            total, parts = task.loss(model, batch)
            by_hand = -(targets * right.log() + (1 - targets) * (1 - right).log()).mean()
            found.append((total.detach(), by_hand))
            return total, parts

        return {"loss": loss}

    runs.change_task(monkeypatch, watched)
    args = runs.arguments(image_folder, tmp_path, *files, *OFF, "MODEL.GMA.DROP_PATH_RATE", "0")
    assert runs.train_here(monkeypatch, args, stop_at=2) == 75
    assert len(found) == 2
    for total, by_hand in found:
        torch.testing.assert_close(total, by_hand)


@pytest.mark.launch
def test_a_run_resumes_exactly_and_its_evaluation_is_exact_on_any_number_of_ranks(
    image_folder, files, tmp_path, monkeypatch
):
    def args(output: str) -> list[str]:
        return runs.arguments(image_folder, tmp_path / output, *files, *OFF)

    assert runs.train_here(monkeypatch, args("whole")) == 0
    assert runs.train_here(monkeypatch, args("stopped"), stop_at=2) == 75
    assert runs.train_here(monkeypatch, args("stopped")) == 0
    assert runs.final_state(tmp_path / "whole", 2) == runs.final_state(tmp_path / "stopped", 2)
    folder = runs.run_folder(tmp_path / "whole")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = max(line[f"map_{weights}"] for line in lines for weights in ("raw", "ema"))
    assert lines[0]["decides"] == "map" and lines[0]["higher_is_better"]
    assert re.findall(r"Best map: (\S+)", (folder / "log_rank0.txt").read_text())[-1] == f"{best:.3f}"

    found = []
    words = ["--resume", folder / "ckpt_best.pth", "--data-path", image_folder, "--batch-size", "1"]
    for processes in (1, 3):
        result = run_ranks("test.py", [*map(str, words), "--opts", *files[4:], "DATA.NUM_WORKERS", "0"], processes)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1].endswith(f" * mAP {best:.3f}")
        (results,) = folder.glob("evaluation/*")
        found.append([(results / name).read_text() for name in ("metrics.json", "per_class.csv", "predictions.csv")])
    assert found[0] == found[1]
    metrics = json.loads(found[0][0])
    assert metrics["map"] == pytest.approx(best, abs=1e-3) and metrics["images"] == 6
    rows = list(csv.DictReader(found[0][2].splitlines()))
    assert [row["labels"] for row in rows] == ["", "red", "green|red", "blue", "blue|green|red", "green"]
    for flags, what in (
        (["--tta", "flip"], "--tta"),
        (["--val-set", "a"], "--val-set"),
    ):
        result = run_ranks("test.py", [*map(str, words), *flags])
        assert result.returncode == 2
        assert f"DATA.MULTI_LABEL: {what} is for one class an image; leave it out" in result.stderr
    with pytest.raises(UserError, match="is of images of several classes"):
        read_evaluation(results)

    opts = ["--opts", *files[4:], "DATA.NUM_WORKERS", "0"]
    result = run_ranks("test.py", [*map(str, words), "--sizes", "48", str(metrics["image_size"]), *opts])
    header, larger, same, last = (line.split("INFO: ")[-1] for line in result.stdout.splitlines()[-4:])
    assert header.split() == ["size", "mAP", "loss"] and larger.split()[0] == "48"
    assert same.split()[1:] == [f"{best:.3f}", f"{metrics['loss']:.4f}"] and last == f" * mAP {best:.3f}"

    picture = image_folder / "val" / "ant" / "0.png"
    result = run_ranks("test.py", ["--resume", str(folder / "ckpt_best.pth"), "--images", str(picture)])
    assert result.returncode == 0, result.stderr
    shown = {
        entry["name"]: entry["probability"] for entry in json.loads(Path(f"{picture}.top5.json").read_text())["top"]
    }
    trained = load_model(str(folder / "ckpt_best.pth"))
    assert shown == pytest.approx(dict(zip(trained.classes, trained.predict(Image.open(picture)).tolist())), rel=1e-4)
    with torch.inference_mode():
        logits = trained.network(eval_transform(trained.config)(Image.open(picture).convert("RGB"))[None])[0]
    assert sorted(shown.values()) == pytest.approx(sorted(logits.sigmoid().tolist()), rel=1e-4)
