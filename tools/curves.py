"""Curves of training runs: loss, learning rate, accuracy raw and EMA, gradient norm, over epochs.

    python -m tools.curves RUN [RUN ...] [--out FILE] [--json FILE]

RUN is a run folder. The numbers come from its TensorBoard event files: they hold all of them already, and a second
history beside them could disagree. One run is drawn to its own curves.png, several are compared in ./curves.png.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs import UserError
from configs.commands import CommandParser, command
from configs.errors import one_line
from utils.files import STDOUT, check_json_target, write_json

FILE_NAME = "curves.png"
COST_LIMIT = 0.02  # of the time of a run; the event files of a long one take seconds to read
# Okabe and Ito's colours, which people with any colour vision can tell apart; yellow is too pale for a thin line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LOG_FROM = 3  # ratio of the largest to the smallest gradient norm; below, a logarithmic axis would have no ticks
MARKED_POINTS = 40  # validations beyond which their points run into each other


@dataclass(frozen=True)
class Series:
    """One scalar of a run: (n,) updates in strictly ascending order, and (n,) values."""

    updates: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Run:
    """The scalars of a run by their TensorBoard tags."""

    name: str
    series: dict[str, Series]
    updates_per_epoch: float | None  # None before the first epoch is done

    def epochs(self, tag: str) -> np.ndarray:
        """(n,) where the points of a series lie, in epochs; in updates where no epoch is done."""
        return self.series[tag].updates / (self.updates_per_epoch or 1)


def read_run(folder: str | Path) -> Run:
    """Read the event files of a run folder.

    A continued run is shown once: of what was written before, only what lies before the point of continuation counts.
    Raises UserError where the folder is missing or holds no training.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    # Own purging, see _without_overwritten, also covers a run that began anew at update 0, where no purge is written.
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}, purge_orphaned_data=True)
    level = logging.getLogger("tensorboard").level
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    try:
        events.Reload()
    finally:
        logging.getLogger("tensorboard").setLevel(level)
    series = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        series[tag] = _without_overwritten([p.step for p in points], [p.value for p in points])
    if not any(tag.startswith(("train/", "val/")) for tag in series):
        raise UserError(f"{folder}: holds no numbers of a training run: no events.out.tfevents.* files of train.py")
    return Run("/".join(folder.resolve().parts[-2:]), series, _updates_per_epoch(series, folder))


def _without_overwritten(updates: Sequence[int], values: Sequence[float]) -> Series:
    """Points in the order written; one that steps back removes those at and after its own update."""
    kept: list[tuple[int, float]] = []
    for update, value in zip(updates, values):
        while kept and kept[-1][0] >= update:
            kept.pop()
        kept.append((update, value))
    return Series(np.array([u for u, _ in kept], dtype=np.int64), np.array([v for _, v in kept], dtype=np.float64))


def _updates_per_epoch(series: dict[str, Series], folder: Path) -> float | None:
    """From the updates at which epochs ended; of a single one, TRAIN.START_EPOCH says which it was."""
    ends = series["epoch/train_loss"].updates if "epoch/train_loss" in series else np.array([])
    if len(ends) > 1:
        return float(np.median(np.diff(ends)))
    if len(ends) == 0:
        return None
    try:
        start = json.loads((folder / "config.json").read_text())["TRAIN"]["START_EPOCH"]
    except (OSError, ValueError, KeyError):
        start = 0
    return float(ends[0] / (start + 1))


def draw(runs: Sequence[Run], path: str | Path) -> None:
    """Draw four panels to an image file; its suffix (.png, .svg, .pdf) is its format. UserError where it cannot be."""
    try:
        draw_figure(runs).savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written: {error}") from None


def draw_figure(runs: Sequence[Run]) -> Any:
    """The four panels as a matplotlib Figure: loss, accuracy, learning rate, gradient norm."""
    # Imported here: a training run goes on without matplotlib. Figure, not pyplot, keeps no global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    legend_inches = 0.55 * len(runs) if len(runs) > 1 else 0
    figure = Figure(figsize=(12, 8.4 + legend_inches), layout="constrained")
    axes = list(figure.subplots(2, 2).flat)
    titles = ("Loss", "Accuracy", "Learning rate", "Gradient norm before clipping")
    units = ("cross-entropy, nats", "Acc@1 on validation images, %", "learning rate", "L2 norm")
    for axis, title, unit in zip(axes, titles, units):
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_ylabel(unit)
        axis.set_xlabel("epoch" if all(run.updates_per_epoch for run in runs) else "update (no epoch is done yet)")
        axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    loss, accuracy, rate, norm = axes
    for number, run in enumerate(runs):
        _draw_run(run, number, len(runs) > 1, loss, accuracy, rate, norm)
    recorded = [run.series["train/grad_norm"].values for run in runs if "train/grad_norm" in run.series]
    norms = np.concatenate(recorded or [np.array([])])
    norms = norms[np.isfinite(norms) & (norms > 0)]
    if len(norms) and norms.max() > LOG_FROM * norms.min():
        norm.set_yscale("log")
        norm.set_ylabel("L2 norm (logarithmic)")
        few_decades = norms.max() < 1000 * norms.min()
        norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
        norm.yaxis.set_minor_locator(NullLocator())  # their labels would cover each other
        norm.yaxis.set_major_formatter("{x:g}")
    for axis in axes if len(runs) == 1 else (loss, accuracy):
        if axis.get_legend_handles_labels()[0]:
            below = {"loc": "upper left", "bbox_to_anchor": (0, -0.14)}  # so many lines would cover the curves
            axis.legend(fontsize=8.5, frameon=False, **(below if len(runs) > 1 else {}))
        else:
            axis.text(0.5, 0.5, "nothing recorded yet", ha="center", va="center", transform=axis.transAxes, color="0.4")
    figure.suptitle(runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared", fontweight="bold")
    return figure


def _draw_run(run: Run, number: int, compared: bool, loss: Any, accuracy: Any, rate: Any, norm: Any) -> None:
    """Colour tells runs apart where there are several, else the kinds of weights; EMA is dashed in both cases."""
    prefix = f"{run.name}: " if compared else ""

    def line(axis: Any, tag: str, label: str, own: int, **style: Any) -> None:
        if tag in run.series:
            values = run.series[tag].values
            if tag.startswith("val/") and len(values) <= MARKED_POINTS:
                style |= {"marker": "o", "markersize": 3.5}
            colour = COLOURS[(number if compared else own) % len(COLOURS)]
            shown = np.where(np.isfinite(values), values, math.nan)
            axis.plot(run.epochs(tag), shown, color=colour, label=prefix + label, **style)

    line(loss, "train/loss", "training", 0, linewidth=0.8, alpha=0.6)
    line(loss, "val/loss_raw", "validation, raw weights", 1, linewidth=1.6)
    line(loss, "val/loss_ema", "validation, EMA weights", 2, linewidth=1.6, linestyle="--")
    for key, name, own in (("raw", "raw weights", 1), ("ema", "EMA weights", 2)):
        tag = f"val/acc1_{key}"
        best = f", best {run.series[tag].values.max():.2f} %" if tag in run.series else ""
        line(accuracy, tag, name + best, own, linewidth=1.6, linestyle="--" if key == "ema" else "-")
    line(rate, "train/lr", "learning rate", 0, linewidth=1.6)
    line(norm, "train/grad_norm", "gradient norm", 0, linewidth=0.9)


class RunCurves:
    """Keeps curves.png of the run that is going on, on the main process. Nothing in here ends a run."""

    def __init__(self, folder: Path, enabled: bool, logger: logging.Logger) -> None:
        self.folder, self.enabled, self.logger = folder, enabled, logger
        self.last_seconds, self.last_end = 0.0, time.perf_counter()

    def after_epoch(self) -> None:
        """Draw, unless drawing would take more than COST_LIMIT of the time."""
        if self.last_seconds <= COST_LIMIT * (time.perf_counter() - self.last_end):
            self.draw()

    def draw(self) -> None:
        """Draw now; a failure is one line in the log, and the last one: later epochs would repeat it."""
        if not self.enabled:
            return
        start = time.perf_counter()
        try:
            draw([read_run(self.folder)], self.folder / FILE_NAME)
        except Exception as error:  # whatever it is, a picture is not worth a run
            self.enabled = False
            self.logger.warning(f"{FILE_NAME} is not drawn: {one_line(error)}")
        self.last_end = time.perf_counter()
        self.last_seconds = self.last_end - start


def describe(runs: Sequence[Run]) -> dict[str, Any]:
    """The runs as JSON holds them: updates, epochs and values of every series."""
    return {
        "runs": [
            {
                "run": run.name,
                "updates_per_epoch": run.updates_per_epoch,
                "series": {
                    tag: {
                        "update": series.updates.tolist(),
                        "epoch": run.epochs(tag).tolist() if run.updates_per_epoch else None,
                        "value": series.values.tolist(),
                    }
                    for tag, series in sorted(run.series.items())
                },
            }
            for run in runs
        ]
    }


@command("tools.curves")
def main(argv: Sequence[str] | None = None) -> None:
    """Draw the runs of a command line."""
    parser = CommandParser("tools.curves", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, <output>/<MODEL.NAME>/<tag>")
    parser.add_argument("--out", metavar="FILE", help="image to write: .png, .svg or .pdf")
    parser.add_argument("--json", metavar="FILE", help="write the numbers for programs; - is standard output")
    args = parser.parse_args(argv)
    check_json_target(args.json)
    runs = [read_run(folder) for folder in args.runs]
    out = Path(args.out or (Path(args.runs[0]) / FILE_NAME if len(runs) == 1 else FILE_NAME))
    draw(runs, out)
    if args.json:
        write_json(args.json, describe(runs))
    print(f"wrote {out}", file=sys.stderr if args.json == STDOUT else sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
