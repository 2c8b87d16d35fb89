"""Signals, lost processes and non-finite numbers: how all processes come to the same conclusion, in bounded time."""

import ctypes
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn

from configs import UserError
from configs.errors import first_line

from .distributed import Processes

# What a stopped and saved run exits with (sysexits' EX_TEMPFAIL): start the same command again to go on.
EXIT_STOPPED = 75
STORE_SECONDS = 5  # how long the launcher's store may take to say which process was lost
PATIENCE = 0.1  # of the time limit: so long a process is waited for before the log says so
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequested(Exception):
    """All processes agreed to stop here; the state is that of a whole update."""


@dataclass(frozen=True)
class UpdateVerdict:
    """What all processes know of an update, the same on each."""

    loss: float  # mean over the processes; NaN where one is not finite
    nonfinite_ranks: tuple[int, ...]  # processes whose loss is not finite; all, where only the gradients are not
    stop: bool  # a process was asked to stop


class Watch:
    """Listens for signals, and lets the processes compare notes once an update.

    The notes travel over a gloo group of their own, on the CPU, whatever backend the gradients use.

    Args:
        processes: this process among all.
        timeout_seconds: how long to wait for the others.
        report: is told, in a line, which processes the others have been waiting for, after PATIENCE of the timeout.
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
        self._meetings = 0
        self._beats = 0  # periods of PATIENCE that this process has lived through; a stopped one stays behind

    def listen(self) -> None:
        """From now on SIGTERM, SIGINT and SIGUSR1 ask the run to stop at the next update; a second SIGINT kills.

        All processes must call this together: it makes the group that they compare notes in.
        """
        self.listening = True
        if self.processes.distributed:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
            self._store = dist.distributed_c10d._get_default_store()
            threading.Thread(target=self._report_waiting, daemon=True).start()
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def stop_agreed(self) -> bool:
        """Whether any process was asked to stop; all must call this together, and all get the same answer."""
        return self.listening and self._sum([float(self.received != 0)])[0] > 0

    def conclude_update(self, loss: float, grad_norm: float) -> UpdateVerdict:
        """Tell the others this process's loss and gradient norm; all must call this together."""
        world_size = self.processes.world_size
        finite = math.isfinite(loss)
        notes = [loss if finite else 0.0, float(not math.isfinite(grad_norm)), float(self.received != 0)]
        bad_loss = [0.0] * world_size
        bad_loss[self.processes.rank] = float(not finite)
        total_loss, bad_norms, stops, *bad_losses = self._sum(notes + bad_loss)
        ranks = tuple(rank for rank, bad in enumerate(bad_losses) if bad)
        if bad_norms and not ranks:  # gradients are averaged already: whose they were cannot be told
            ranks = tuple(range(world_size))
        return UpdateVerdict(math.nan if ranks else total_loss / world_size, ranks, stops > 0)

    def _sum(self, values: list[float]) -> list[float]:
        if self._group is None:
            return values
        self.arrive()
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        return tensor.tolist()

    def arrive(self) -> None:
        """Note that this process is about to meet the others, so that one that does not come can be named."""
        self._meetings += 1
        if self._group is not None:
            self._store.set(f"meeting/{self.processes.rank}", f"{self._meetings} {socket.gethostname()}")

    def _report_waiting(self) -> None:
        """Say so when this process has come and others have not for long; for a thread of its own.

        On GPUs it is the only line that names them: NCCL's watchdog ends a process that has waited too long.
        """
        period = PATIENCE * self._timeout.total_seconds()
        seen = reported = 0
        try:
            while True:
                self._beats += 1
                self._store.set(f"beat/{self.processes.rank}", f"{self._beats} {socket.gethostname()}")
                time.sleep(period)
                if seen == self._meetings != reported and (missing := self._not_come()):
                    self._report(f"waiting for {missing}, for more than {period:g} s now")
                    reported = seen
                seen = self._meetings
        except RuntimeError:  # the store has gone: who waits for it finds out
            return

    @contextmanager
    def naming_lost_processes(self) -> Iterator[None]:
        """Turn the failure of a collective operation into one line that names who did not come."""
        try:
            yield
        except (UserError, FloatingPointError):
            raise
        except RuntimeError as error:
            if self._group is None or lost_loader_worker(error) or not _is_communication_failure(error):
                raise
            raise UserError(f"{self._who_is_missing()}: {first_line(error)}") from None

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
            cause = f"{self._not_come() or silent or 'another process'} was lost or too slow"
            return self._store.compare_set("cause", "", cause).decode()
        except RuntimeError:
            return "the node of process 0 cannot be reached"

    def _not_come(self) -> str:
        """The processes that have not come to this meeting; '' where all have."""
        return self._behind("meeting", self._meetings)

    def _behind(self, what: str, mark: int) -> str:
        """The processes whose note of this kind is below the mark."""
        missing = []
        for rank in range(self.processes.world_size):
            key = f"{what}/{rank}"
            note = self._store.get(key).decode() if self._store.check([key]) else "0 unknown host"
            count, host = note.split(" ", 1)
            if int(count) < mark:
                missing.append(f"process {rank} on {host}")
        return ", ".join(missing)


def unwritable(path: str | Path, error: Exception, needed_bytes: int | None = None) -> UserError:
    """The line for a file that cannot be written: path, cause, space needed (where known) and free."""
    needs = "" if needed_bytes is None else f"it needs about {needed_bytes / 2**20:.0f} MiB, "
    try:
        free = f"{shutil.disk_usage(Path(path).parent).free / 2**20:.0f} MiB are free"
    except OSError as folder_error:
        free = f"its folder cannot be reached: {folder_error.strerror}"
    return UserError(f"{path}: cannot be written ({first_line(error)}); {needs}{free}")


class KeptStatistics:
    """A copy of a network's buffers (running statistics), to go back to where an update is not to count."""

    def __init__(self, network: nn.Module) -> None:
        self._buffers = [buffer for buffer in network.buffers() if buffer.numel()]
        self._copies = [buffer.clone() for buffer in self._buffers]

    def keep(self) -> None:
        torch._foreach_copy_(self._copies, self._buffers)

    def restore(self) -> None:
        torch._foreach_copy_(self._buffers, self._copies)


def lost_loader_worker(error: BaseException | None) -> str:
    """One line where an exception comes from a loader worker that was lost, else ''.

    It shows in several ways: torch's handler of SIGCHLD raises wherever the process is, at times on top of the
    connection's own failure.
    """
    while error is not None:
        if "DataLoader worker" in str(error) and "Caught" not in str(error):
            return f"a loader worker was lost: {first_line(error)}"
        if isinstance(error, ConnectionError | EOFError):
            return f"a loader worker was lost: {type(error).__name__} while its batch was fetched"
        error = error.__cause__ or error.__context__
    return ""


def exit_stopped() -> NoReturn:
    """End this process with EXIT_STOPPED, and leave word for the launcher: torchrun turns every such code into 1."""
    if path := os.environ.get("LAUNCHER_EXIT_FILE"):
        Path(path).write_text(str(EXIT_STOPPED))
    sys.exit(EXIT_STOPPED)


def tell_launcher(line: str) -> None:
    """Leave the cause of a failure for multi_machine_start.py to repeat; the first process to fail does."""
    if path := os.environ.get("LAUNCHER_CAUSE_FILE"):
        with suppress(OSError), open(path, "x") as file:
            file.write(line)


def die_with_launcher() -> None:
    """Let the kernel kill this process when torchrun dies, so that it does not train on unseen.

    Only under torchrun: a run started by hand outlives its shell, as nohup users expect.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    _set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was told
        sys.exit(1)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # or even while this process imported torch
        where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        try:
            socket.create_connection(where, timeout=10).close()
        except OSError as error:
            raise UserError(f"torchrun at {where[0]}:{where[1]} cannot be reached, it has ended: {error}") from None


def quiet_loader_worker(worker_id: int) -> None:
    """For `worker_init_fn`: a loader worker leaves stopping to its process, and never outlives it.

    torchrun and terminals signal whole process groups: a worker that is in one would end before its process has saved.
    """
    os.setpgrp()
    for number in STOP_SIGNALS:  # not the handlers of the process that it was forked from
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        _set_parent_death_signal(signal.SIGKILL)


def _set_parent_death_signal(number: int) -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def _is_communication_failure(error: RuntimeError) -> bool:
    """Failures of gloo and NCCL; gloo raises plain RuntimeErrors."""
    words = ("gloo", "nccl", "timed out", "timeout", "connection", "closed by peer", "broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
