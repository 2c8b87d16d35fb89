"""python -m tools.pack: what it writes is the same data set, smaller."""

import io
from pathlib import Path

import numpy as np
import pytest
import runs
from PIL import Image

from data import fingerprint
from data.datasets import decode_image
from data.sources import FolderSource, ZipSource
from tools.pack import main, shrink


def write(path: Path, size: tuple[int, int], seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse.resize(size, Image.Resampling.BICUBIC).save(path, quality=95)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for number, (split, name) in enumerate((s, c) for s in ("train", "val") for c in ("ant", "bee")):
        write(root / split / name / "wide.jpg", (640, 480), number)
        write(root / split / name / "sub" / "high.jpg", (90, 200), number + 10)
    return root


def test_large_training_images_shrink_and_all_else_keeps_its_bytes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    assert main(["--data-path", str(folder), "--out", str(out), "--short-side", "120", "--workers", "2"]) == 0
    for split in ("train", "val"):
        before, after = FolderSource(folder / split), ZipSource(out, split)
        assert fingerprint(before) == fingerprint(after)
        for index, (path, _) in enumerate(before.samples):
            if split == "train" and path.endswith("wide.jpg"):
                old, new = (decode_image(source.read(index)) for source in (before, after))
                assert new.size == (160, 120)
                reference = np.asarray(old.resize(new.size, Image.Resampling.LANCZOS), dtype=float)
                assert np.abs(np.asarray(new, dtype=float) - reference).mean() < 1.5
            else:
                assert after.read(index) == before.read(index)


def test_a_run_trains_on_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "packed"
    assert main(["--data-path", str(folder), "--out", str(out), "--workers", "0"]) == 0
    assert runs.train_here(monkeypatch, runs.arguments(out, tmp_path / "o", flags=["--zip"])) == 0


def test_quality_decides_the_size() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(buffer, "PNG")
    assert len(shrink(buffer.getvalue(), 100, 50)) < len(shrink(buffer.getvalue(), 100, 95))
    assert shrink(buffer.getvalue(), 200, 50) == buffer.getvalue()


@pytest.mark.parametrize(("split", "workers"), [("train", "0"), ("val", "2")])
def test_an_unreadable_image_is_named_and_nothing_is_left(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, workers: str
) -> None:
    victim = folder / split / "bee" / "wide.jpg"
    victim.write_bytes(victim.read_bytes()[:500])
    assert main(["--data-path", str(folder), "--out", str(tmp_path / "packed"), "--workers", workers]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tools.pack: error: {victim}: cannot be read as an image") and error.count("\n") == 1
    left = {path.name for path in (tmp_path / "packed").iterdir()}
    assert left == ({"val.zip", "val_map.txt"} if split == "train" else set())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quality", "96"], "--quality 96: 1 to 95"),
        (["--short-side", "8"], "--short-side 8: at least 32"),
        (["--workers", "-1"], "--workers -1: at least 0"),
        (["--nonsense"], "--nonsense"),
        (["--data-path", "/nowhere"], "/nowhere: no such folder"),
        (["--out", "/proc/packed"], "--out /proc/packed: cannot be made"),
    ],
)
def test_wrong_use_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["--data-path", str(folder), "--out", str(tmp_path / "packed"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_nothing_is_overwritten(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "val.zip").write_bytes(b"mine")
    assert main(["--data-path", str(folder), "--out", str(tmp_path / "packed")]) == 2
    assert "val.zip: exists already" in capsys.readouterr().err
    assert (tmp_path / "packed" / "val.zip").read_bytes() == b"mine"
