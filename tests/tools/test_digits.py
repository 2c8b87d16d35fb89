"""The handwritten digits of the quickstart."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data.sources import FolderSource
from tools import digits


@pytest.fixture(scope="session")
def written_digits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits") / "set"
    assert digits.write_digits(root)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_digits_data_set(written_digits):
    train, val = FolderSource(written_digits / "train"), FolderSource(written_digits / "val")
    assert train.classes == val.classes == [str(digit) for digit in range(10)]
    assert (len(train.samples), len(val.samples)) == (1442, 355)
    assert not {Path(p).name for p, _ in train.samples} & {Path(p).name for p, _ in val.samples}
    assert min(sum(label == digit for _, label in val.samples) for digit in range(10)) >= 34
    sizes = {(image.size, image.mode) for image in (Image.open(path) for path, _ in train.samples[::100])}
    assert sizes == {((32, 32), "L")}


def test_digits_are_the_right_pictures(written_digits):
    """Shrunk again, a picture is the original that its number and folder name."""
    from sklearn.datasets import load_digits

    original = load_digits()
    for path, label in FolderSource(written_digits / "val").samples[::20]:
        number = int(Path(path).stem)
        assert original.target[number] == label
        small = np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BOX), float).ravel()
        assert np.corrcoef(small, original.data[number])[0, 1] > 0.97


def test_digits_are_written_once_and_always_alike(written_digits, tmp_path):
    again = tmp_path / "deep" / "down" / "set"
    assert digits.write_digits(again)
    assert contents(again) == contents(written_digits)
    (again / "train" / "0" / "mine.png").write_bytes(b"kept")
    assert not digits.write_digits(again), "what is there is left alone"
    assert (again / "train" / "0" / "mine.png").exists()
    assert [path.name for path in again.parent.iterdir()] == ["set"]


@pytest.fixture
def few_digits(monkeypatch):
    """Only the first 20: writing all takes seconds."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    few = SimpleNamespace(images=digits.images[:20], target=digits.target[:20])
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: few)


def test_digits_written_by_two_processes_at_once(tmp_path, monkeypatch, few_digits):
    """The slower one finds the data set complete, and takes its own away."""
    rmtree = shutil.rmtree

    def the_other_is_faster(path, **options):  # the first thing that a writer does
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        (tmp_path / "set" / "train").mkdir(parents=True)

    monkeypatch.setattr(shutil, "rmtree", the_other_is_faster)
    assert not digits.write_digits(tmp_path / "set")
    assert list(contents(tmp_path)) == [] and [path.name for path in tmp_path.iterdir()] == ["set"]


def test_digits_that_cannot_be_written_are_one_line(tmp_path, monkeypatch, capsys, few_digits):
    (tmp_path / "file").touch()
    assert digits.main(["--output", str(tmp_path / "file" / "set")]) == 2
    assert digits.main(["--output", str(tmp_path / "file")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing half-written stays"
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert digits.main(["--output", str(tmp_path / "set")]) == 2
    folder, file, missing = capsys.readouterr().err.splitlines()
    assert folder == f"tools.digits: error: --output {tmp_path}/file/set: cannot be written: Not a directory"
    assert "file: cannot be written" in file and "pip install scikit-learn" in missing


def test_interrupted_digits_never_look_complete(tmp_path, monkeypatch, few_digits):
    save, calls = Image.Image.save, []

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return save(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            digits.write_digits(tmp_path / "set")
    assert not (tmp_path / "set").exists()
    assert digits.write_digits(tmp_path / "set")
    assert len(contents(tmp_path / "set")) == 20
