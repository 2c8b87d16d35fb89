"""How long the threads of this process wait for a core: more threads than cores make updates many times slower."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from data.workers import available_cores

MEASURED_SECONDS = 3  # at least, from the end of the first update on
WAITING_SHARE = 0.25  # of the time in which threads could run


class ThreadWaits:
    """Reports once, after the first slow updates, that threads of this process wait for a core. Linux alone knows."""

    def __init__(self) -> None:
        self._began: tuple[float, int, int] | None = None
        self._done = torch.get_num_threads() == 1  # one thread is the advice

    def after_update(self, report: Callable[[str], None]) -> None:
        """Note that an update has ended; `report` gets the line where it is due."""
        if self._done:
            return
        now = (time.monotonic(), *thread_times())
        if self._began is None:
            self._began = now
        elif now[0] - self._began[0] >= MEASURED_SECONDS:
            self._done = True
            ran, waited = (after - before for before, after in zip(self._began[1:], now[1:]))
            if waited > WAITING_SHARE * (ran + waited):
                report(
                    f"slow updates: the {torch.get_num_threads()} threads of this process wait "
                    f"{100 * waited / (ran + waited):.0f} % of their time for one of {available_cores()} cores; "
                    "other programs take the cores, or there are too many threads: then start again with the "
                    "environment variable OMP_NUM_THREADS at the number of cores divided by that of processes"
                )


def thread_times(tasks: Path = Path("/proc/self/task")) -> tuple[int, int]:
    """Nanoseconds that the threads of this process have run, and that they have waited for a core; 0 if unknown."""
    ran = waited = 0
    for path in tasks.glob("*/schedstat"):
        with suppress(OSError, ValueError):  # the thread has ended
            on_core, in_queue, _ = path.read_text(encoding="ascii").split()
            ran, waited = ran + int(on_core), waited + int(in_queue)
    return ran, waited
