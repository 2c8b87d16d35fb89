"""Signals, lost processes and non-finite numbers: how all processes come to the same conclusion, in bounded time."""

import ctypes
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn

from configs import UserError

from .distributed import Processes

# What a stopped and saved run exits with (sysexits' EX_TEMPFAIL): start the same command again to go on.
EXIT_STOPPED = 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequested(Exception):
    """All processes agreed to stop here; the state is that of a whole update."""


@dataclass(frozen=True)
class UpdateVerdict:
    """What all processes know of an update, the same on each."""

    loss: float  # mean over the processes
    nonfinite_ranks: tuple[int, ...]  # processes whose loss or gradients are not finite
    stop: bool  # a process was asked to stop


class Watch:
    """Listens for signals, and lets the processes compare notes once an update.

    The notes travel over a gloo group of their own, on the CPU, whatever backend the gradients use.

    Args:
        processes: this process among all.
        timeout_seconds: how long to wait for the others.
    """

    def __init__(self, processes: Processes, timeout_seconds: float) -> None:
        self.processes = processes
        self.listening = False
        self.received = 0  # the signal that asked this process to stop
        self._group = None
        if processes.distributed:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    def listen(self) -> None:
        """From now on SIGTERM, SIGINT and SIGUSR1 ask the run to stop at the next update; a second SIGINT kills."""
        self.listening = True
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
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        world_size = self.processes.world_size
        notes = [loss if math.isfinite(loss) else 0.0, float(self.received != 0)] + [0.0] * world_size
        notes[2 + self.processes.rank] = float(not finite)
        total_loss, stops, *bad = self._sum(notes)
        ranks = tuple(rank for rank, count in enumerate(bad) if count)
        return UpdateVerdict(total_loss / world_size, ranks, stops > 0)

    def _sum(self, values: list[float]) -> list[float]:
        if self._group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        return tensor.tolist()

    def arrive(self, update: int) -> None:
        """Note that this process is about to meet the others at this update, so that a missing one can be named."""
        if self._group is not None:
            _store().set(f"arrived/{self.processes.rank}", f"{update} {socket.gethostname()}")

    @contextmanager
    def naming_lost_processes(self, update_now: object) -> Iterator[None]:
        """Turn the failure of a collective operation into one line that names who did not come.

        `update_now()` gives the update that this process is in.
        """
        try:
            yield
        except (UserError, FloatingPointError):
            raise
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                raise UserError(f"a loader worker was lost: {str(error).strip().splitlines()[0]}") from None
            if self._group is None or not _is_communication_failure(error):
                raise
            raise UserError(
                f"{self._who_is_missing(update_now())}: {str(error).strip().splitlines()[0][:200]}"
            ) from None

    def _who_is_missing(self, update: int) -> str:
        missing = []
        try:
            store = _store()
            store.set_timeout(timedelta(seconds=5))
            for rank in range(self.processes.world_size):
                key = f"arrived/{rank}"
                note = store.get(key).decode() if store.check([key]) else "-1 unknown host"
                reached, host = note.split(" ", 1)
                if int(reached) < update:
                    missing.append(f"process {rank} on {host}")
        except RuntimeError:
            return f"at update {update} the node of process 0 cannot be reached"
        names = ", ".join(missing) or "another process"
        return f"{names} was lost or too slow at update {update}"


class KeptStatistics:
    """A copy of a network's buffers (running statistics), to go back to where an update is not to count."""

    def __init__(self, network: nn.Module) -> None:
        self._buffers = [buffer for buffer in network.buffers() if buffer.numel()]
        self._copies = [buffer.clone() for buffer in self._buffers]

    def keep(self) -> None:
        torch._foreach_copy_(self._copies, self._buffers)

    def restore(self) -> None:
        torch._foreach_copy_(self._buffers, self._copies)


def exit_stopped() -> NoReturn:
    """End this process with EXIT_STOPPED, and leave word for the launcher: torchrun turns every such code into 1."""
    if path := os.environ.get("LAUNCHER_EXIT_FILE"):
        Path(path).write_text(str(EXIT_STOPPED))
    sys.exit(EXIT_STOPPED)


def die_with_launcher() -> None:
    """Let the kernel ask this process to stop when torchrun dies, so that it does not train on unseen.

    Only under torchrun: a run started by hand outlives its shell, as nohup users expect.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    _set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was told
        sys.exit(1)


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


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _is_communication_failure(error: RuntimeError) -> bool:
    """Failures of gloo and NCCL; gloo raises plain RuntimeErrors."""
    words = ("gloo", "nccl", "connection", "timed out", "timeout", "peer", "socket", "broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
