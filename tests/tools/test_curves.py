"""tools.curves: what is read from metrics.jsonl, that numbers of any task are drawn, and that no run ends by it."""

import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from tools import curves


def write_metrics(folder: Path, epochs: int = 3, best: str = "acc1", **numbers: Any) -> list[dict[str, Any]]:
    """A metrics.jsonl as train.py writes it; returns its lines. `numbers` replace or add some; a list has one an epoch.

    A number whose value is None is null in the file.
    """
    lines = []
    for epoch in range(epochs):
        line = {"epoch": epoch, "updates": 25 * (epoch + 1), "lr": 0.0016 / (epoch + 1), "seconds": 12.3}
        line |= {"images_per_second": 130.0, "train_loss": 2.1 / (epoch + 1), "grad_norm": 1.2 + epoch}
        for weights, value in (("raw", 50.0 + epoch), ("ema", 40.0 + 9 * epoch)):
            line |= {f"{best}_{weights}": value, f"acc5_{weights}": 90.0, f"loss_{weights}": 1.9 / (epoch + 1)}
        lines.append(line | {k: v[epoch] if isinstance(v, list) else v for k, v in numbers.items()} | {"decides": best})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def lines_of(axis: Any) -> dict[str, list[float]]:
    return {line.get_label(): line.get_ydata().tolist() for line in axis.lines}


def test_the_panels_show_the_numbers_of_any_task(tmp_path: Path) -> None:
    """Nothing is known of the task: a network that detects, without EMA and without a loss of validation."""
    none = dict.fromkeys(("loss_raw", "loss_ema", "mAP_ema"))
    lines = write_metrics(tmp_path / "run", best="mAP", train_loss_boxes=1.0, **none)
    figure = curves.draw_figure([curves.read_run(tmp_path / "run")])
    loss, best, rate, norm = figure.axes
    assert lines_of(loss) == {"training": [line["train_loss"] for line in lines]}
    assert best.get_title(loc="left") == "Validation: mAP"
    assert lines_of(best) == {"raw weights, best 52": [50.0, 51.0, 52.0]}
    assert [*lines_of(rate).values()] == [[line["lr"] for line in lines]]
    assert [*lines_of(norm).values()] == [[1.2, 2.2, 3.2]]
    assert {tuple(line.get_xdata()) for axis in figure.axes for line in axis.lines} == {(1, 2, 3)}


def test_raw_and_ema_weights_are_drawn_and_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", acc1_ema=[40.0, None, 70.25])
    loss, best, _, _ = curves.draw_figure([curves.read_run(tmp_path / "run")]).axes
    assert [*lines_of(loss)] == ["training", "validation, raw weights", "validation, EMA weights"]
    raw, ema = best.lines
    assert (raw.get_label(), ema.get_label()) == ("raw weights, best 52", "EMA weights, best 70.25")
    assert str(ema.get_ydata().tolist()) == "[40.0, nan, 70.25]" and ema.get_linestyle() == "--"


def test_the_command_draws_one_run_in_its_folder_and_compares_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_metrics(tmp_path / "a" / "one")
    write_metrics(tmp_path / "b" / "two", epochs=2, best="top1")
    monkeypatch.chdir(tmp_path)
    assert curves.main(["a/one"]) == 0
    with Image.open(tmp_path / "a" / "one" / "curves.png") as picture:
        assert picture.size == (1440, 1008)
    assert capsys.readouterr().out == "wrote a/one/curves.png\n"
    assert curves.main(["a/one", "b/two", "--json", "-"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["run"] for run in runs] == ["a/one", "b/two"] and runs[0]["epochs"] == lines
    assert (tmp_path / "curves.png").is_file()
    assert curves.main(["a/one", "--out", "both.svg"]) == 0 and (tmp_path / "both.svg").is_file()


def test_a_last_line_that_is_half_written_is_skipped(tmp_path: Path) -> None:
    lines = write_metrics(tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text + text[:40])
    assert curves.read_run(tmp_path).epochs == lines


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "metrics.jsonl: No such file or directory; give the folder of a run that has finished an epoch"),
        ("", "metrics.jsonl: holds no finished epoch"),
        ('{"epoch": 0', "metrics.jsonl: holds no finished epoch"),
        ('{"epoch": 0\n{"epoch": 1}\n', "metrics.jsonl: line 1 is damaged"),
        ('[1]\n{"epoch": 1}\n', "metrics.jsonl: line 1 is damaged"),
    ],
)
def test_a_folder_without_epochs_is_one_line(
    tmp_path: Path, content: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert curves.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_run_is_drawn_once_an_epoch_is_finished_and_within_its_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, drawn = 0.0, []

    def slow(runs: list[curves.RunMetrics], path: Path) -> None:
        nonlocal now
        now += 1
        drawn.append((path.name, len(runs[0].epochs)))

    monkeypatch.setattr(curves.time, "perf_counter", lambda: now)
    monkeypatch.setattr(curves, "draw", slow)
    drawing = curves.RunCurves(tmp_path, True, logging.getLogger("curves"))
    drawing.draw()
    assert drawn == [], "no epoch is finished"
    for epochs in (1, 2, 3):  # each takes 30 s, and drawing 1 s
        now += 30
        write_metrics(tmp_path, epochs)
        drawing.after_epoch()
    assert drawn == [("curves.png", 1), ("curves.png", 3)]


def test_a_failure_to_draw_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no fonts\nat all")

    write_metrics(tmp_path)
    monkeypatch.setattr(curves, "draw", broken)
    drawing = curves.RunCurves(tmp_path, True, logging.getLogger("curves"))
    drawing.after_epoch()
    drawing.draw()
    assert [record.getMessage() for record in caplog.records] == ["curves.png is not drawn: no fonts at all"]


@pytest.mark.parametrize("norms", [(1.1, 1.3), (0.03, 2.9), (0.02, 2.1), (1e-6, 1e4), (0.0, 2.0)], ids=str)
def test_axes_can_be_read(tmp_path: Path, norms: tuple[float, float]) -> None:
    """No tick label covers another, each axis has some, and epochs are whole."""
    write_metrics(tmp_path, 8, grad_norm=[*norms] * 4)
    figure = curves.draw_figure([curves.read_run(tmp_path)])
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


def test_the_legend_names_the_smallest_value_where_less_is_better(tmp_path: Path) -> None:
    write_metrics(tmp_path, best="rmse", rmse_raw=[0.9, 0.5, 0.6], higher_is_better=False)
    axis = curves.draw_figure([curves.read_run(tmp_path)]).axes[1]
    assert "raw weights, best 0.5" in lines_of(axis)


GOOD = [6.9, 4.0, 2.0, 1.5, 1.2, 1.0]


def panels_of_two(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> list[Any]:
    for name, numbers in (("first", first), ("second", second)):
        none = dict.fromkeys(("loss_raw", "loss_ema", "acc1_ema"))
        write_metrics(tmp_path / "m" / name, 6, **{**none, "grad_norm": 1.0, "acc1_raw": 50.0, **numbers})
    return curves.draw_figure([curves.read_run(tmp_path / "m" / name) for name in ("first", "second")]).axes


@pytest.mark.parametrize("other", [[6.9, 4.0, 900.0, 1e9, 1e12, None], [5e4, 60.0, 50.0, 9.0, 8.0, 7.0]], ids=str)
def test_a_run_that_diverged_does_not_flatten_the_others(tmp_path: Path, other: list[float | None]) -> None:
    """It may do so at the end or in the first epoch; the panel says what is cut off, whatever the axis was before."""
    first = {"train_loss": GOOD, "grad_norm": GOOD}
    loss, _, _, norm = panels_of_two(tmp_path, first, {"train_loss": other, "grad_norm": other})
    worst = max(value for value in other if value)
    for axis in (loss, norm):
        low, high = axis.get_ylim()
        assert 0 < low < 1.0 and 6.9 < high < 8
        assert [text.get_text() for text in axis.texts] == [f"cut off: m/second, up to {worst:.3g}"]


def test_an_accuracy_that_falls_out_of_the_others_range_is_cut_off_below(tmp_path: Path) -> None:
    first, second = [70.0, 72, 74, 75, 76, 77], [71.0, 73, 74, 0.1, 0.1, 0.1]
    _, best, _, _ = panels_of_two(tmp_path, {"acc1_raw": first}, {"acc1_raw": second})
    low, high = best.get_ylim()
    assert 69 < low < 70 and 77 < high < 78
    assert best.texts[0].get_text() == "cut off: m/second, down to 0.1"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (GOOD, [7.0, 5.0, 4.0, 3.0, 3.0, 3.0]),
        (GOOD, [1.2, 1.1, 1.0, 1.0, 1.0, 1.0]),  # fine-tuned
        (GOOD, [6.9, 3.0, 2.0, 2.0, 5.0, 9.0]),  # it fits too well: no reason to hide that
        ([2.0] * 6, [2.0, 2.1, 2.2, 2.3, 2.4, 2.5]),
        ([None] * 6, [6.9, 1e9, None, None, None, None]),
    ],
    ids=str,
)
def test_what_has_not_diverged_is_shown_whole(tmp_path: Path, first: list[Any], second: list[Any]) -> None:
    loss, *_ = panels_of_two(tmp_path, {"train_loss": first}, {"train_loss": second})
    assert loss.get_ylim()[1] >= max(value for value in (*first, *second) if value)
    assert not loss.texts


def test_names_are_drawn_letter_by_letter(tmp_path: Path) -> None:
    """`$` is no mathematics, bytes that are no text have a picture, and no run is missing from the legend."""
    names = ("$\\frac$", "_a$b$c\udce9")
    for name in names:
        write_metrics(tmp_path / name / "t", best="$m^2$")
    figure = curves.draw_figure([curves.read_run(tmp_path / name / "t") for name in names])
    FigureCanvasAgg(figure).draw()
    loss, best, *_ = figure.axes
    texts = [*loss.get_legend().get_texts(), best.title, best._left_title, best.yaxis.label]
    shown, mathematics = zip(*(text._preprocess_math(text.get_text()) for text in texts))
    assert not any(mathematics)
    expected = {"$\\frac$/t: training", " _a$b$c\\udce9/t: training", "Validation: $m^2$", "$m^2$"}
    assert expected <= set(shown)
