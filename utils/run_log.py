"""The records of a run: log file of every process, console, metrics.jsonl, TensorBoard and trackers, provenance."""

import contextlib
import json
import logging
import math
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from tensorboardX import SummaryWriter
from tensorboardX.event_file_writer import EventsWriter
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm
from yacs.config import CfgNode

from configs.text import printable
from data.normalization import denormalize

from .failures import unwritable
from .files import atomic_write, finite_numbers
from .processes import Processes
from .trackers import Tracker, open_trackers

GRID_IMAGES = 16
METRICS_NAME = "metrics.jsonl"


class _ConsoleHandler(logging.StreamHandler):
    """Prints above a progress bar, where there is one, instead of through it; no more once nobody reads it.

    A terminal that was closed, or a `tee` that was killed, must not end a run of days: its log is in a file too.
    """

    def __init__(self, to_stderr: bool) -> None:
        super().__init__()
        self.to_stderr = to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if self.to_stderr else sys.stdout
        try:
            # In one piece with its end, or another process's line could come in between.
            tqdm.write(f"{self.format(record)}\n", file=stream, end="")
            stream.flush()
        except OSError as error:
            # What is buffered, and whatever else is printed, goes nowhere from now on, instead of failing each time.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            logging.getLogger(record.name).warning(
                f"{stream.name} is closed ({error.strerror}): further output is dropped, the log file continues"
            )


class _FileHandler(logging.FileHandler):
    """Leaves a line out where the disk is full: logging's own traceback for each would bury what ends the run."""

    reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.reported:
            self.reported = True
            _report(f"{unwritable(self.baseFilename, error).one_line()}; lines are left out")


def _report(line: str) -> None:
    tqdm.write(f"{line}\n", file=sys.stderr, end="")


def create_logger(folder: Path, processes: Processes, name: str = "log", to_stderr: bool = False) -> logging.Logger:
    """A logger that appends to `<folder>/<name>_rank<r>.txt`, and on the main process prints the bare message."""
    logger = logging.getLogger(f"groupmixformer.{folder}.{processes.rank}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    path = folder / f"{name}_rank{processes.rank}.txt"
    file = _FileHandler(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("[%(asctime)s] (%(filename)s %(lineno)d): %(levelname)s %(message)s"))
    logger.addHandler(file)
    if processes.is_main:
        console = _ConsoleHandler(to_stderr)
        console.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(console)
    return logger


def log_provenance(logger: logging.Logger, processes: Processes) -> None:
    """Log command line, code version, library versions and machine."""
    logger.info(f"command: {' '.join(map(printable, sys.argv))}")
    logger.info(
        f"git {git_commit()}; Python {sys.version.split()[0]}; torch {torch.__version__}; "
        f"torchvision {torchvision.__version__}"
    )
    name = torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else "CPU"
    logger.info(
        f"process {processes.rank} of {processes.world_size}: {name}, {torch.get_num_threads()} threads, "
        f"pid {os.getpid()} on {socket.gethostname()}"
    )


def git_commit() -> str:
    """The commit of this checkout, '+changes' where files differ from it; 'unknown' outside git."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), *args]
    return subprocess.run(command, capture_output=True, check=True, timeout=10).stdout.decode(errors="replace").strip()


class ProgressLog:
    """Console lines in the released shape, and a bar where a person watches.

    Args:
        logger: where lines go.
        title: what a line begins with, 'Train: [3/300]'.
        total: steps in all.
        initial: steps done already.
        every: steps between lines.
        show_bar: draw a bar where standard error is a terminal.
    """

    def __init__(
        self, logger: logging.Logger, title: str, total: int, initial: int = 0, every: int = 10, show_bar: bool = True
    ) -> None:
        self.logger, self.title, self.total, self.every = logger, title, total, every
        self.done = self.initial = initial
        self.start = self.last_line = time.perf_counter()
        self.done_at_last_line = initial
        hidden = not (show_bar and sys.stderr.isatty())
        self.bar = tqdm(total=total, initial=initial, desc=title, disable=hidden, leave=False, dynamic_ncols=True)

    @property
    def steps_done(self) -> int:
        return self.done - self.initial

    def step(self) -> bool:
        """Count one step; True where a line is due: every so many steps, and at the last one."""
        self.done += 1
        self.bar.update()
        return (self.done - 1) % self.every == 0 or self.done == self.total

    def line(self, fields: str, images_per_step: int, lr: float | None = None) -> float:
        """Write a line and return the images/s since the last one."""
        now = time.perf_counter()
        since_line = (now - self.last_line) / (self.done - self.done_at_last_line)
        average = (now - self.start) / (self.done - self.initial)
        seconds_left = round(average * (self.total - self.done))
        eta = f"{seconds_left // 3600}:{seconds_left // 60 % 60:02d}:{seconds_left % 60:02d}"
        speed = images_per_step / since_line
        rate = "" if lr is None else f" lr {lr:.8f}"
        head = f"{self.title}[{self.done - 1}/{self.total}]\teta {eta}{rate}\ttime {since_line:.4f} ({average:.4f})"
        self.logger.info(f"{head}\t{fields}\t{speed:.1f} images/s")
        self.last_line, self.done_at_last_line = now, self.done
        return speed

    def close(self) -> float:
        """Remove the bar; returns the seconds since the start."""
        self.bar.close()
        return time.perf_counter() - self.start


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory so far, MiB: what tensors took on the GPU, or on CPU what the process took in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def open_board(
    config: CfgNode, folder: Path, processes: Processes, num_updates: int, logger: logging.Logger
) -> "TensorBoard":
    """TensorBoard, and the trackers that LOG_WANDB and LOG_MLFLOW name, from this update on."""
    trackers = open_trackers(config, folder, num_updates > 0, logger) if processes.is_main else []
    return TensorBoard(folder, processes.is_main, num_updates, trackers)


class TensorBoard:
    """Event files in the run folder, written by the main process; everywhere else it does nothing.

    Trackers get the same numbers.
    """

    def __init__(self, folder: Path, enabled: bool, num_updates: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = trackers
        # What a run wrote after the checkpoint that it continues from, at later steps, is hidden, not shown twice.
        purge = num_updates + 1 if num_updates else None
        # The suffix keeps a run that is continued within the second from overwriting its own file.
        suffix = f".{num_updates}"
        self.writer = SummaryWriter(str(folder), purge_step=purge, filename_suffix=suffix) if enabled else None
        if self.writer is not None:
            self._outlive_a_full_disk(self.writer.file_writer.event_writer._ev_writer)

    @staticmethod
    def _outlive_a_full_disk(events: EventsWriter) -> None:
        """Keep tensorboardX's thread alive when it cannot write: its queue holds ten events, and without the thread the
        eleventh would wait without end. Nothing is added after half a record: readers would end there.
        """
        failed = False

        def attempt(function: Callable[..., None], *args: Any) -> None:
            nonlocal failed
            if failed:
                return
            try:
                function(*args)
            except OSError as error:
                failed = True
                _report(f"{unwritable(events._file_name, error).one_line()}; events are left out")

        events.write_event = partial(attempt, events.write_event)
        events.flush = partial(attempt, events.flush)

    def scalars(self, values: dict[str, float], step: int) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if self.writer is not None:
            for name, value in finite.items():  # of others tensorboardX warns without a name
                self.writer.add_scalar(name, value, step)
        for tracker in self.trackers:
            tracker.scalars(finite, step)

    def epoch(self, train_loss: float, validation: dict[str, float], num_updates: int) -> None:
        """Numbers of an epoch, written to disk now: epoch/train_loss, val/acc1_raw and so on."""
        values = {f"val/{name}": value for name, value in validation.items()}
        self.scalars({"epoch/train_loss": train_loss, **values}, num_updates)
        if self.writer is not None:
            self.writer.flush()

    def images(self, name: str, images: Tensor, step: int) -> None:
        """One grid of up to 16 normalised images (B, 3, H, W)."""
        if self.writer is not None and images.shape[1] == 3:
            self.writer.add_image(name, make_grid(denormalize(images[:GRID_IMAGES].float()), nrow=4).cpu(), step)

    def close(self) -> None:
        if self.writer is not None:
            with contextlib.suppress(OSError):  # a full disk is reported already
                self.writer.close()
        for tracker in self.trackers:
            tracker.close()


class EpochLog:
    """metrics.jsonl in the run folder: one JSON object a line and epoch, written by the main process.

    Args:
        folder: the run folder.
        enabled: whether this is the main process.
        next_epoch: the epoch that is trained next; lines of it and of later ones, from before a resume, are dropped.
    """

    def __init__(self, folder: Path, enabled: bool, next_epoch: int) -> None:
        self.path, self.enabled = folder / METRICS_NAME, enabled
        if not enabled or not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _epoch_of(line) < next_epoch]
        if not kept:
            self.path.unlink()
            return
        with atomic_write(self.path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def append(self, numbers: dict[str, Any]) -> None:
        """Add an epoch's line; numbers that are not finite become null. A full disk costs the line, not the run."""
        if not self.enabled:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite_numbers(numbers), allow_nan=False) + "\n")
        except OSError as error:
            _report(f"{unwritable(self.path, error).one_line()}; the line of this epoch is left out")


def _epoch_of(line: str) -> float:
    """The epoch of a line; infinity for a line that a kill has cut short."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
