"""curves.png: what is read from the event files, and that drawing never ends a run."""

import json
import logging
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from runs import arguments, run_folder, train_here

from configs import UserError
from tools import curves
from utils.run_log import TensorBoard


def write(folder: Path, first: int, last: int, value: float, num_updates: int = 0) -> None:
    board = TensorBoard(folder, True, num_updates)
    for update in range(first, last + 1):
        board.scalars({"train/loss": value, "train/lr": value}, update)
    board.close()


def test_a_run_draws_its_curves_and_a_stopped_one_continues_without_points_twice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(data, tmp_path)
    train_here(monkeypatch, args, stop_at=3)
    assert (run_folder(tmp_path) / "curves.png").is_file(), "a stopped run draws too"
    assert curves.read_run(run_folder(tmp_path)).updates_per_epoch is None
    train_here(monkeypatch, args)
    run = curves.read_run(run_folder(tmp_path))
    assert run.series["train/loss"].updates.tolist() == list(range(1, len(run.series["train/loss"].updates) + 1))
    assert run.epochs("val/acc1_raw").tolist() == [1, 2]
    assert set(run.series) >= {"train/lr", "train/grad_norm", "val/acc1_ema", "val/loss_raw"}
    with Image.open(run_folder(tmp_path) / "curves.png") as picture:
        assert picture.size == (1440, 1008)


@pytest.mark.parametrize("continued_at", [0, 3])
def test_what_a_continued_run_overwrote_is_not_shown(tmp_path: Path, continued_at: int) -> None:
    write(tmp_path, 1, 6, 1.0)
    (before,) = tmp_path.iterdir()
    before.rename(tmp_path / "events.out.tfevents.1000000000.host.0")  # names tell the second: not the same twice
    write(tmp_path, continued_at + 1, continued_at + 2, 2.0, continued_at)
    for series in curves.read_run(tmp_path).series.values():
        assert series.updates.tolist() == list(range(1, continued_at + 3))
        assert series.values.tolist() == [1.0] * continued_at + [2.0] * 2


def test_a_failure_to_draw_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no fonts\nat all")

    write(tmp_path, 1, 2, 1.0)
    monkeypatch.setattr(curves, "draw", broken)
    drawing = curves.RunCurves(tmp_path, True, logging.getLogger("curves"))
    drawing.after_epoch()
    drawing.draw()
    assert [record.getMessage() for record in caplog.records] == ["curves.png is not drawn: no fonts at all"]


def test_several_runs_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        write(folder, 1, 3, 0.5)
    picture = tmp_path / "both.png"
    assert curves.main([*map(str, folders), "--out", str(picture), "--json", "-"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["run"].split("/")[-1] for run in runs] == ["a", "b"]
    assert runs[0]["series"]["train/loss"] == {"update": [1, 2, 3], "epoch": None, "value": [0.5, 0.5, 0.5]}
    assert picture.is_file()


@pytest.mark.parametrize("norms", [(0.09, 3), (1.1, 1.3), (1.1, 3.4), (1e-6, 1e4), (0.0, 2.0)], ids=str)
def test_axes_can_be_read(norms: tuple[float, float]) -> None:
    """No tick label covers another, each axis has some, and epochs are whole."""
    updates = np.arange(1, 201)
    series = {
        "train/loss": curves.Series(updates, np.linspace(3, 1, 200)),
        "train/lr": curves.Series(updates, np.linspace(1e-3, 1e-6, 200)),
        "train/grad_norm": curves.Series(updates, np.geomspace(norms[0] or 0.5, norms[1], 200) * (norms[0] > 0)),
        "val/acc1_raw": curves.Series(updates[9::10], np.linspace(10, 90, 20)),
    }
    figure = curves.draw_figure([curves.Run("a/b", series, 10.0)])
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    for axes in figure.axes:
        for axis, along in ((axes.xaxis, "x"), (axes.yaxis, "y")):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            labels = [t.label1 for t in ticks if low <= t.get_loc() <= high and t.label1.get_text()]
            assert len(labels) >= 2
            extents = [label.get_window_extent(renderer) for label in labels]
            boxes = sorted(tuple(sorted(getattr(extent, f"interval{along}"))) for extent in extents)
            assert all(box[1] < following[0] for box, following in pairwise(boxes))
            assert along == "y" or all(label.get_text().isdigit() for label in labels)


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_no_run_is_one_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        curves.read_run(tmp_path / name)
    assert curves.main([str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
