"""Supervision of a run: signals, lost processes and non-finite numbers.

All processes reach the same conclusion, in bounded time.
"""

import atexit
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from configs import UserError
from configs.errors import CompilerStopped, Fault, first_line
from data.workers import STOP_SIGNALS, lost_loader_worker

from .checkpoint import SAVING
from .failures import STORE_SECONDS, is_communication_failure, is_compiler_failure, report_failure
from .processes import Processes, rendezvous_errors
from .shortages import shortage
from .thread_waits import ThreadWaits

NAMING_SECONDS = 2  # of STORE_SECONDS, to see which process has ended
PATIENCE = 0.1  # share of the time limit after which the log names a process that others wait for
POLL_SECONDS = 1  # how often a process looks whether another one has failed
PROVEN_UPDATES = 100  # of one start: by then the loaders were full, and the command works on this machine
GRACE_SECONDS = 20  # how long it then has to end by itself; torchrun kills what is left of a node after 30
NOT_FINITE = -1.0  # stands for a gradient norm: what is not a number cannot be compared
SAME_NORM = 1e-3  # relative: processors of different kinds may differ by rounding


@dataclass(frozen=True)
class StepStatus:
    """What all processes know of an update before they apply it, the same on each."""

    loss: float  # mean over the processes; NaN where one is not finite
    parts: dict[str, float]  # named parts of the loss, likewise
    grad_norm: float  # of the averaged gradients, before clipping
    nonfinite_ranks: tuple[int, ...]  # processes whose loss is not finite; all, where only the gradients are not
    stop: bool  # a process was asked to stop

    @property
    def finite(self) -> bool:
        return not self.nonfinite_ranks


class RunSupervisor:
    """Listens for signals, and lets the processes agree on each update and outside of updates.

    In an update, one small all-reduce after the gradients' own carries the numbers that processes share. Outside of
    updates the processes meet in a gloo group, on the CPU, whatever backend the gradients use.

    Args:
        processes: this process among all.
        timeout_seconds: how long to wait for the others.
        report: is called with one line that names the processes that others wait for, after PATIENCE of the timeout.
    """

    def __init__(
        self, processes: Processes, timeout_seconds: float, report: Callable[[str], None] = lambda line: None
    ) -> None:
        self.processes = processes
        self.listening = False
        self.received = 0  # the signal that asked this process to stop
        self._timeout = timedelta(seconds=timeout_seconds)
        self._report = report
        self._group = None
        self._store: dist.Store | None = None
        self._ending = threading.Event()
        self._waits = ThreadWaits()
        self._updates = 0  # since this process began
        self._meetings = 0
        self._beats = 0  # periods of PATIENCE that this process has lived through; a stopped one stays behind

    # ------------------------------------------------------------------------------------------------ signals, stops
    def listen(self) -> None:
        """From now on STOP_SIGNALS ask the run to stop after the current update; a second SIGINT kills.

        Those that are ignored already stay so: `nohup` ignores SIGHUP, a shell SIGINT for background jobs of a script.
        All processes must call this together: it makes the group in which they meet outside of updates.
        """
        self.listening = True
        if self.processes.distributed:
            with rendezvous_errors(self._timeout.total_seconds()):
                self._group = dist.new_group(backend="gloo", timeout=self._timeout)
            self._store = dist.distributed_c10d._get_default_store()
            self._store.set(f"pid/{self.processes.rank}", f"{os.getpid()} {socket.gethostname()}")
            thread = threading.Thread(target=self._look_after_others, daemon=True)
            thread.start()
            atexit.register(self._stop_looking, thread)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _stop_looking(self, thread: threading.Thread) -> None:
        """A thread that is inside the store when the interpreter goes would end the process with SIGABRT."""
        self._ending.set()
        thread.join(STORE_SECONDS)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def stop_agreed(self) -> bool:
        """Whether any process was asked to stop; all must call this together, and all get the same answer."""
        if self._group is None:
            return self.listening and self.received != 0
        self.arrive()
        stops = torch.tensor([float(self.received != 0)])
        dist.all_reduce(stops, group=self._group)
        return stops.item() > 0

    # ------------------------------------------------------------------------------------------- agreement on updates
    def agree_on_update(self, loss: Tensor, parts: Mapping[str, Tensor], grad_norm: Tensor) -> StepStatus:
        """Share what this process found in an update; all processes must call this together.

        Args:
            loss: mean over this process's batches.
            parts: named parts of it; the same names on all processes.
            grad_norm: of the gradients, which are averaged over the processes already.

        Raises FloatingPointError where the processes found different norms for these gradients.
        """
        world_size, rank = self.processes.world_size, self.processes.rank
        finite = loss.isfinite()
        stats = torch.zeros(2 + len(parts) + 2 * world_size, device=self.processes.device)
        stats[0] = float(self.received != 0)
        stats[1 : 2 + len(parts)] = torch.where(finite, torch.stack([loss, *parts.values()]), 0)
        marks, norms = stats[2 + len(parts) :].split(world_size)
        marks[rank] = ~finite
        norms[rank] = torch.where(grad_norm.isfinite(), grad_norm, NOT_FINITE)
        if self.processes.distributed:
            dist.all_reduce(stats)
        self._updates += 1
        if self.processes.is_main and self.processes.device.type == "cpu":
            self._waits.after_update(self._report)
        # The update's one wait for a GPU, but for those in torch's synchronised batch norms.
        stop, *values = stats.tolist()
        means = [value / world_size for value in values[: 1 + len(parts)]]
        marks, norms = values[1 + len(parts) : -world_size], values[-world_size:]
        _compare_norms(norms)
        ranks = tuple(rank for rank, mark in enumerate(marks) if mark)
        if norms[0] == NOT_FINITE and not ranks:  # averaged already: whose they were is unknown
            ranks = tuple(range(world_size))
        norm = math.nan if norms[0] == NOT_FINITE else norms[0]
        means = [math.nan] * len(means) if ranks else means
        return StepStatus(means[0], dict(zip(parts, means[1:])), norm, ranks, stop > 0)

    # --------------------------------------------------------------------------------------------- lost processes
    def arrive(self) -> None:
        """Note that this process is about to meet the others, so that one that does not come can be named."""
        self._meetings += 1
        if self._group is not None:
            self._store.set(f"meeting/{self.processes.rank}", f"{self._meetings} {socket.gethostname()}")

    def _look_after_others(self) -> None:
        """Report processes that others wait for; end this process after another one has failed.

        For a thread of its own. On GPUs nothing else does either: a watchdog ends a process that waits in NCCL, without
        a cause.
        """
        period = PATIENCE * self._timeout.total_seconds()
        seen = reported = 0
        try:
            while not self._ending.is_set():
                self._beats += 1
                self._store.set(f"beat/{self.processes.rank}", f"{self._beats} {socket.gethostname()}")
                next_beat = time.monotonic() + period
                while (left := next_beat - time.monotonic()) > 0:
                    if self._ending.wait(min(left, POLL_SECONDS)):
                        return
                    if self._store.check(["cause"]):
                        self._end_after_failure()
                if seen == self._meetings != reported and (missing := self._not_come()):
                    self._report(f"waiting for {missing}, for more than {period:g} s now")
                    reported = seen
                seen = self._meetings
        except RuntimeError:  # the store has gone: who waits for it finds out
            return

    def _end_after_failure(self) -> NoReturn:
        """End this process, with the cause of the one that failed, unless it ends by itself in time."""
        cause = self._store.get("cause").decode()
        self._store.add("told", 1)
        if self._ending.wait(GRACE_SECONDS):
            sys.exit()  # of this thread
        with SAVING:
            report_failure(cause)
            os._exit(2)

    @contextmanager
    def explain_lost_ranks(self) -> Iterator[None]:
        """Turn the failure of a collective operation into one line that names the processes that did not come.

        A compiler that got the signal which asks this run to stop, as each process of a job may, is no failure either.
        """
        try:
            yield
        except FloatingPointError:
            raise
        except UserError as error:
            raise Fault(error.one_line()) from error
        except (MemoryError, OSError, RuntimeError) as error:
            if line := shortage(error):  # another start helps only where something else took what there is
                raise (Fault if self._updates >= PROVEN_UPDATES else UserError)(line) from None
            if not isinstance(error, RuntimeError):
                raise
            if self.received and is_compiler_failure(error):
                what = f"{signal.Signals(self.received).name} has stopped the run and its compiler"
                raise CompilerStopped(f"{what}; the same command continues from the last checkpoint") from None
            if self._group is None or lost_loader_worker(error) or not is_communication_failure(error):
                raise
            raise Fault(f"{self._who_is_missing()}: {first_line(error)}") from None

    def _who_is_missing(self) -> str:
        """Ask the store, in a thread: where its node cannot be reached, torch's client waits for it without end."""
        answer: list[str] = []
        thread = threading.Thread(target=lambda: answer.append(self._agreed_cause()), daemon=True)
        thread.start()
        thread.join(STORE_SECONDS)
        return answer[0] if answer else "the node of process 0 cannot be reached"

    def _agreed_cause(self) -> str:
        """What the first process to give up found: the others, the slow one too, then miss that one only."""
        try:
            silent = self._behind("beat", self._beats - round(0.5 / PATIENCE))  # it stopped after it had come
            missing, patience_ends = self._not_come() or silent, time.monotonic() + NAMING_SECONDS
            # A killed process closes its connections some moments before it has ended. Those of another node cannot
            # see it: they leave the naming to those of its own.
            while not (missing := missing or self._ended()) and time.monotonic() < patience_ends:
                if self._store.check(["cause"]):
                    return self._store.get("cause").decode()
                time.sleep(POLL_SECONDS / 10)
            cause = f"{missing or 'another process'} was lost or too slow"
            return self._store.compare_set("cause", "", cause).decode()
        except RuntimeError:
            return "the node of process 0 cannot be reached"

    def _not_come(self) -> str:
        """The processes that have not come to this meeting; '' where all have."""
        return self._behind("meeting", self._meetings)

    def _behind(self, what: str, mark: int) -> str:
        """The processes whose note of this kind is below the mark."""
        return ", ".join(process for process, count, _ in self._notes_of_all(what) if count < mark)

    def _ended(self) -> str:
        """The processes of this host that have ended."""
        here, notes = socket.gethostname(), self._notes_of_all("pid")
        return ", ".join(process for process, pid, host in notes if host == here and not _is_running(pid))

    def _notes_of_all(self, what: str) -> Iterator[tuple[str, int, str]]:
        """Name of every process, number and host in its note of this kind; 0 and "unknown host" where it has none."""
        for rank in range(self.processes.world_size):
            key = f"{what}/{rank}"
            note = self._store.get(key).decode() if self._store.check([key]) else "0 unknown host"
            number, host = note.split(" ", 1)
            yield f"process {rank} on {host}", int(number), host


def _is_running(pid: int) -> bool:
    """Whether a process of this host has not ended; one that nobody has waited for yet has."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # no /proc, or another user's
        return True
    return state not in "ZX"


def _compare_norms(norms: list[float]) -> None:
    """Raise FloatingPointError where the processes found different norms for the gradients that they share."""
    if max(norms) - min(norms) > SAME_NORM * max(map(abs, norms)):
        found = ", ".join("not finite" if norm < 0 else f"{norm:.6g}" for norm in norms)
        raise FloatingPointError(
            "the processes found different norms for the gradients that they share, in the order of their ranks "
            f"{found}: their weights are no longer the same; this update is not applied"
        )
