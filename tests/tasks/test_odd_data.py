"""Whole runs on data sets that are not as they should be: what the log says, and what is counted."""

import csv
import json
import shutil

import pytest
import runs
from image_data import deep_images, zip_image_folder

import tasks
from tasks import keys_of
from tasks.classification.evaluation import evaluate_weights
from utils.checkpoint import load_file
from utils.session import start_session


def train(monkeypatch, data, output, *flags) -> str:
    """Train two epochs; returns the log."""
    assert runs.train_here(monkeypatch, runs.arguments(data, output, flags=flags)) == 0
    return (runs.run_folder(output) / "log_rank0.txt").read_text()


def evaluate(monkeypatch, capsys, data, output, *flags) -> str:
    """Evaluate the best checkpoint; returns what is printed."""
    weights = str(runs.run_folder(output) / "ckpt_best.pth")
    args = runs.arguments(data, output, flags=["--resume", weights, *flags])
    monkeypatch.setattr("sys.argv", ["test.py", *args])
    capsys.readouterr()
    evaluate_weights(start_session("", keys_of))
    return capsys.readouterr().out


def test_an_odd_data_set_is_trained_on_and_its_oddities_are_said(image_folder, tmp_path, monkeypatch, capsys):
    for path in (image_folder / "train" / "bee").iterdir():
        path.write_bytes(deep_images()["12_of_16.png"][0])
    (image_folder / "train" / "ant" / "x.heic").write_bytes(b"")
    (image_folder / "train" / "__MACOSX").mkdir()
    (image_folder / "train" / "ant" / "._0.png").write_bytes(b"")
    shutil.rmtree(image_folder / "val" / "ant")
    log = train(monkeypatch, image_folder, tmp_path)
    for said in (
        "left out of the training images: 1 .heic",
        "1 of 3 classes have no validation images (ant)",
        "comes out nearly constant: its values 0 to 4095 become levels 0 to 15 of 0 to 255",
    ):
        assert log.count(said) == 1, said
    assert log.count(" images in this epoch are like the first that was named") == 1
    assert load_file(runs.run_folder(tmp_path) / "ckpt_best.pth")["classes"] == ["ant", "bee", "cat"]

    shutil.rmtree(image_folder / "train")  # the checkpoint knows the order of the classes
    shutil.rmtree(image_folder / "val" / "bee")
    (image_folder / "val" / "cat").rename(image_folder / "val" / "bee")
    shutil.copytree(image_folder / "val" / "bee", image_folder / "val" / "cat")
    text = evaluate(monkeypatch, capsys, image_folder, tmp_path)
    assert "1 of 3 classes have no validation images (ant)" in text and "other names" not in text
    (folder,) = (runs.run_folder(tmp_path) / "evaluation").iterdir()
    summary = json.loads((folder / "metrics.json").read_text())
    rows = list(csv.DictReader((folder / "per_class.csv").open()))
    assert [row["acc1"] == "" for row in rows] == [True, False, False]
    assert summary["mean_class_acc1"] == pytest.approx(sum(float(row["acc1"]) for row in rows[1:]) / 2)
    assert summary["acc1"] == pytest.approx(50), "the same images as bees and as cats"
    assert f"mean over 2 classes {summary['mean_class_acc1']:.3f}" in text


def test_folders_and_their_zip_files_have_the_same_classes(image_folder, tmp_path, monkeypatch, capsys):
    zip_image_folder(image_folder, tmp_path / "z")
    train(monkeypatch, image_folder, tmp_path / "a")
    train(monkeypatch, tmp_path / "z", tmp_path / "b", "--zip")
    for output in ("a", "b"):
        assert load_file(runs.run_folder(tmp_path / output) / "ckpt_best.pth")["classes"] == ["ant", "bee", "cat"]
    assert "other names" not in evaluate(monkeypatch, capsys, tmp_path / "z", tmp_path / "a", "--zip")
    assert "other names" not in evaluate(monkeypatch, capsys, image_folder, tmp_path / "b")


def test_a_run_that_knew_its_classes_by_numbers_continues(image_folder, tmp_path, monkeypatch):
    """Zip files had no names of classes once."""
    zip_image_folder(image_folder, tmp_path / "z")
    args = runs.arguments(tmp_path / "z", tmp_path, flags=["--zip"])
    with monkeypatch.context() as patch:
        build = tasks.build

        def numbered(session):
            task = build(session)
            task.identity["classes"] = ["0", "1", "2"]
            return task

        patch.setattr(tasks, "build", numbered)
        assert runs.train_here(patch, args, stop_at=3) == 75
    assert runs.train_here(monkeypatch, args) == 0
    assert load_file(runs.run_folder(tmp_path) / "ckpt_epoch_1.pth")["classes"] == ["ant", "bee", "cat"]
