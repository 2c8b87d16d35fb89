"""Curves of training runs: loss, the validation number that decides, learning rate and gradient norm over epochs.

    python -m tools.curves RUN [RUN ...] [--out FILE] [--json FILE]

RUN is a run folder; its metrics.jsonl holds one line for each finished epoch. One run is drawn to curves.png in its own
folder, several are compared in ./curves.png.
"""

import json
import logging
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
from utils.run_log import METRICS_NAME

PICTURE_NAME = "curves.png"
COST_LIMIT = 0.02  # share of a run's time that drawing may take
# Okabe and Ito's colours, which people with any colour vision can tell apart; yellow is too pale for a thin line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LOG_FROM = 100  # ratio of the largest to the smallest gradient norm
MARKED_POINTS = 40  # epochs beyond which their points run into each other


@dataclass(frozen=True)
class RunMetrics:
    """The finished epochs of a run, each as its line in metrics.jsonl."""

    name: str
    epochs: list[dict[str, Any]]

    @property
    def deciding(self) -> str:
        """Name of the validation number that decides which weights are best, such as 'acc1'."""
        return self.epochs[-1].get("decides") or ""

    def best_of(self, values: np.ndarray) -> float:
        """The best of some values of the number that decides."""
        return values.max() if self.epochs[-1].get("higher_is_better", True) else values.min()

    def values(self, key: str) -> np.ndarray:
        """(epochs,) values; NaN where an epoch has none, or none that is finite."""
        return np.array([epoch.get(key) for epoch in self.epochs], dtype=np.float64)


def read_run(folder: str | Path) -> RunMetrics:
    """Read metrics.jsonl of a run folder. UserError where it is missing, damaged or without a finished epoch."""
    path = Path(folder) / METRICS_NAME
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a run that has finished an epoch") from None
    epochs = []
    for number, line in enumerate(lines, 1):
        try:
            epoch = json.loads(line)
            if not isinstance(epoch.get("epoch"), int):
                raise ValueError
            epochs.append(epoch)
        except (ValueError, AttributeError):  # no JSON; no object
            if number < len(lines):
                raise UserError(f"{path}: line {number} is damaged; remove it") from None
            # The last line may be half written: the run was killed, or is writing it now.
    if not epochs:
        raise UserError(f"{path}: holds no finished epoch; wait for the first one")
    return RunMetrics("/".join(Path(folder).resolve().parts[-2:]), epochs)


def draw(runs: Sequence[RunMetrics], path: str | Path) -> None:
    """Draw four panels to an image file; its suffix (.png, .svg, .pdf) is its format. UserError where it cannot be."""
    try:
        draw_figure(runs).savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written: {error}") from None


def draw_figure(runs: Sequence[RunMetrics]) -> Any:
    """The panels as a matplotlib Figure: loss, the validation number that decides, learning rate, gradient norm."""
    # Imported here, because a run trains without matplotlib. Figure, unlike pyplot, keeps no global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    compared = len(runs) > 1
    figure = Figure(figsize=(12, 8.4 + 0.55 * len(runs) * compared), layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    deciding = " / ".join(dict.fromkeys(run.deciding for run in runs))
    titles = ("Loss", f"Validation: {deciding}", "Learning rate", "Gradient norm before clipping")
    units = ("loss", deciding, "learning rate at the end of the epoch", "L2 norm, mean over the epoch")
    for axis, title, unit in zip(panels, titles, units):
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set(xlabel="epoch", ylabel=unit)
        axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for number, run in enumerate(runs):
        _draw_run(panels, run, number if compared else None)
    _, _, _, norm = panels
    norms = np.concatenate([run.values("grad_norm") for run in runs])
    norms = norms[norms > 0]
    if len(norms) and norms.max() > LOG_FROM * norms.min():
        norm.set(yscale="log", ylabel="L2 norm, mean over the epoch (logarithmic)")
    below = {"loc": "upper left", "bbox_to_anchor": (0, -0.14)}  # the lines of several runs would cover the curves
    for axis in panels:
        if not axis.lines:
            axis.text(0.5, 0.5, "nothing recorded", ha="center", va="center", transform=axis.transAxes, color="0.4")
        elif axis in panels[:2]:
            axis.legend(fontsize=8.5, frameon=False, **(below if compared else {}))
    figure.suptitle(f"{len(runs)} runs compared" if compared else runs[0].name, fontweight="bold")
    return figure


def _draw_run(panels: Sequence[Any], run: RunMetrics, number: int | None) -> None:
    """Colour tells runs apart where there are several (`number`), else the kinds of weights; EMA is always dashed."""
    loss, best, rate, norm = panels
    prefix = "" if number is None else f"{run.name}: "
    marker = {"marker": "o", "markersize": 3.5} if len(run.epochs) <= MARKED_POINTS else {}
    epochs = np.array([epoch["epoch"] + 1 for epoch in run.epochs])  # 1 is the end of the first epoch

    def line(axis: Any, key: str, label: str, own: int, **style: Any) -> None:
        there = np.array([key in epoch for epoch in run.epochs])  # not in epochs that were not validated
        values = run.values(key)[there]
        if np.isfinite(values).any():
            colour = COLOURS[(own if number is None else number) % len(COLOURS)]
            style = {"linewidth": 1.6, **marker, **style}
            axis.plot(epochs[there], values, color=colour, label=prefix + label, **style)

    line(loss, "train_loss", "training", 0, linewidth=0.8, alpha=0.6)
    for key, name, own in (("raw", "raw weights", 1), ("ema", "EMA weights", 2)):
        linestyle = "--" if key == "ema" else "-"
        line(loss, f"loss_{key}", f"validation, {name}", own, linestyle=linestyle)
        values = run.values(f"{run.deciding}_{key}")
        finite = values[np.isfinite(values)]
        if len(finite):
            line(best, f"{run.deciding}_{key}", f"{name}, best {run.best_of(finite):.5g}", own, linestyle=linestyle)
    line(rate, "lr", "", 0)
    line(norm, "grad_norm", "", 0)


class RunCurves:
    """Keeps curves.png of the current run, on the main process. Nothing in here ends a run."""

    def __init__(self, folder: Path, enabled: bool, logger: logging.Logger) -> None:
        self.folder, self.enabled, self.logger = folder, enabled, logger
        self.last_seconds, self.last_end = 0.0, time.perf_counter()

    def after_epoch(self) -> None:
        """Draw, unless drawing would take more than COST_LIMIT of the time."""
        if self.last_seconds <= COST_LIMIT * (time.perf_counter() - self.last_end):
            self.draw()

    def draw(self) -> None:
        """Draw now, if an epoch is finished. A failure is one line in the log, once: later epochs would repeat it."""
        if not self.enabled or not (self.folder / METRICS_NAME).exists():
            return
        start = time.perf_counter()
        try:
            draw([read_run(self.folder)], self.folder / PICTURE_NAME)
        except Exception as error:  # whatever it is, a picture is not worth a run
            self.enabled = False
            self.logger.warning(f"{PICTURE_NAME} is not drawn: {one_line(error)}")
        self.last_end = time.perf_counter()
        self.last_seconds = self.last_end - start


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
    out = Path(args.out or (Path(args.runs[0]) / PICTURE_NAME if len(runs) == 1 else PICTURE_NAME))
    draw(runs, out)
    if args.json:
        write_json(args.json, {"runs": [{"run": run.name, "epochs": run.epochs} for run in runs]})
    print(f"wrote {out}", file=sys.stderr if args.json == STDOUT else sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
