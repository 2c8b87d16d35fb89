"""Signals, lost processes and non-finite numbers: how all processes come to the same conclusion, in bounded time."""

import atexit
import ctypes
import json
import math
import multiprocessing
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
from torch import Tensor, nn

from configs import UserError
from configs.errors import first_line

from .compilation import is_compiler_failure
from .processes import Processes

# What a stopped and saved run exits with (sysexits' EX_TEMPFAIL): start the same command again to go on.
EXIT_STOPPED = 75
EXIT_MISTAKE = 2  # of the user's, found before training: starting the same command again does not help
STORE_SECONDS = 5  # how long the launcher's store may take to say which process was lost
NAMING_SECONDS = 2  # of those, to see which process has ended
PATIENCE = 0.1  # of the time limit: so long a process is waited for before the log says so
POLL_SECONDS = 1  # how often a process looks whether another one has failed
GRACE_SECONDS = 20  # how long it then has to end by itself; torchrun kills what is left of a node after 30
NOT_FINITE = -1.0  # stands for a gradient norm: what is not a number cannot be compared
SAME_NORM = 1e-3  # relative: processors of different kinds may differ by rounding
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


SAVING = threading.Lock()  # held while a checkpoint is written: no thread ends the process then


class Fault(UserError):
    """No mistake in the command: processes that do not meet, and whatever ends a run that has begun to train.

    Starting the same command again may help, which multi_machine_start.py does.
    """


class CompilerStopped(Fault):
    """A signal asked this run to stop, and ended the compiler too: the state is not that of a whole update."""


class StopRequested(Exception):
    """All processes agreed to stop here; the state is that of a whole update."""


@dataclass(frozen=True)
class UpdateVerdict:
    """What all processes know of an update, the same on each."""

    loss: float  # mean over the processes; NaN where one is not finite
    grad_norm: float  # of the averaged gradients; whether the others found the same is known an update later
    nonfinite_ranks: tuple[int, ...]  # processes whose loss is not finite; all, where only the gradients are not
    stop: bool  # a process was asked to stop


class Watch:
    """Listens for signals, and lets the processes compare notes once an update.

    The notes travel with the gradients: they are the gradient of `notes`, a parameter that `wrap_distributed` puts
    beside the network's. A message of their own would make short updates slower. Outside of updates the processes
    meet in a gloo group, on the CPU, whatever backend the gradients use.

    Args:
        processes: this process among all.
        timeout_seconds: how long to wait for the others.
        report: is told, in a line, which processes the others have been waiting for, after PATIENCE of the timeout.
    """

    def __init__(
        self, processes: Processes, timeout_seconds: float, report: Callable[[str], None] = lambda line: None
    ) -> None:
        self.processes = processes
        # Loss, wish to stop; of every process whether its loss is not finite; of every process its last gradient norm.
        self.notes = nn.Parameter(torch.zeros(2 + 2 * processes.world_size, device=processes.device))
        self.listening = False
        self.received = 0  # the signal that asked this process to stop
        self._timeout = timedelta(seconds=timeout_seconds)
        self._report = report
        self._group = None
        self._store: dist.Store | None = None
        self._last_norm = 0.0  # gradient norm that the others are yet to be told, NOT_FINITE where it is not
        self._ending = threading.Event()
        self._meetings = 0
        self._beats = 0  # periods of PATIENCE that this process has lived through; a stopped one stays behind

    def listen(self) -> None:
        """From now on SIGTERM, SIGINT and SIGUSR1 ask the run to stop within two updates; a second SIGINT kills.

        All processes must call this together: it makes the group that they meet in outside of updates.
        """
        self.listening = True
        if self.processes.distributed:
            with meeting(self._timeout.total_seconds()):
                self._group = dist.new_group(backend="gloo", timeout=self._timeout)
            self._store = dist.distributed_c10d._get_default_store()
            self._store.set(f"pid/{self.processes.rank}", f"{os.getpid()} {socket.gethostname()}")
            thread = threading.Thread(target=self._look_after_others, daemon=True)
            thread.start()
            atexit.register(self._stop_looking, thread)
        for number in STOP_SIGNALS:
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
        told = torch.zeros(1 + self.processes.world_size, dtype=torch.float64)
        told[0], told[1 + self.processes.rank] = float(self.received != 0), self._last_norm
        dist.all_reduce(told, group=self._group)
        stops, *norms = told.tolist()
        _compare_norms(norms)
        return stops > 0

    def notes_term(self, loss: Tensor) -> Tensor:
        """0, to be added to a batch's loss: its backward pass brings `conclude_update` the notes. Waits for no GPU.

        Args:
            loss: of this process's batch; those of an update are added up.
        """
        loss = loss.detach()
        finite = loss.isfinite()
        told = torch.zeros_like(self.notes)
        told[0] = torch.where(finite, loss, 0)
        told[1] = float(self.received != 0)
        told[2 + self.processes.rank] = ~finite
        told[2 + self.processes.world_size + self.processes.rank] = self._last_norm
        self._last_norm = 0.0
        return self.notes @ told

    def conclude_update(self, grad_norm: Tensor) -> UpdateVerdict:
        """What all processes noted in this update, once its gradients are averaged.

        Raises FloatingPointError where they found different norms for the gradients of the update before.
        """
        world_size = self.processes.world_size
        values = torch.cat([self.notes.grad, grad_norm.to(self.notes).view(1)])
        # The update's one wait for a GPU, but for those in torch's synchronised batch norms.
        loss, stops, *marks, grad_norm = values.tolist()
        self.notes.grad = None
        _compare_norms([norm * world_size for norm in marks[world_size:]])
        ranks = tuple(rank for rank, bad in enumerate(marks[:world_size]) if bad)
        if not math.isfinite(grad_norm) and not ranks:  # averaged already: whose they were cannot be told
            ranks = tuple(range(world_size))
        self._last_norm = grad_norm if math.isfinite(grad_norm) else NOT_FINITE
        stop = stops > 0 or (not self.processes.distributed and self.received != 0)
        return UpdateVerdict(math.nan if ranks else loss, grad_norm, ranks, stop)

    def arrive(self) -> None:
        """Note that this process is about to meet the others, so that one that does not come can be named."""
        self._meetings += 1
        if self._group is not None:
            self._store.set(f"meeting/{self.processes.rank}", f"{self._meetings} {socket.gethostname()}")

    def _look_after_others(self) -> None:
        """Say so when this process has come and others have not for long; end it after one of them has failed.

        For a thread of its own. On GPUs nothing else does either: a process that waits in NCCL is ended by a watchdog,
        without a cause.
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
    def naming_lost_processes(self) -> Iterator[None]:
        """Turn the failure of a collective operation into one line that names who did not come.

        A compiler that got the signal which asks this run to stop, as each process of a job may, is no failure either.
        """
        try:
            yield
        except (FloatingPointError, torch.OutOfMemoryError):
            raise
        except UserError as error:
            raise Fault(error.one_line()) from error
        except RuntimeError as error:
            if self.received and is_compiler_failure(error):
                what = f"{signal.Signals(self.received).name} has stopped the run and its compiler"
                raise CompilerStopped(f"{what}; the same command continues from the last checkpoint") from None
            if self._group is None or lost_loader_worker(error) or not _is_communication_failure(error):
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
            # A process that is killed closes its connections some moments before it has ended, and those of another
            # node cannot see it: they leave the naming to those of its own.
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
            "in the last update the processes found different norms for the gradients that they share, in the order of "
            f"their ranks {found}: their weights are no longer the same; a checkpoint taken since may hold that update"
        )


@contextmanager
def meeting(timeout_seconds: float) -> Iterator[None]:
    """Around the making of a process group: what goes wrong is one line, and takes no longer than twice the timeout.

    gloo counts its timeout anew for every other process.
    """

    def line(cause: object) -> str:
        interface = os.environ.get("GLOO_SOCKET_IFNAME") or "the one of its host name"
        return (
            f"{socket.gethostname()} has not met the other processes (MASTER_ADDR {os.environ.get('MASTER_ADDR')}, "
            f"network interface {interface}); where the nodes reach each other by another one, set GLOO_SOCKET_IFNAME, "
            f"and NCCL_SOCKET_IFNAME for GPUs: {str(cause).strip().splitlines()[0][:200]}"
        )

    def give_up() -> None:
        report_failure(line(f"nothing within {2 * timeout_seconds:g} s"))
        os._exit(2)

    timer = threading.Timer(2 * timeout_seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        if not _is_communication_failure(error):
            raise
        raise Fault(line(error)) from None
    finally:
        timer.cancel()


def tell_others(message: str) -> None:
    """Leave the cause of this process's failure for the others, and wait until they have seen it: the store may go
    with this process. No longer than STORE_SECONDS, and for nothing where no process has failed for the first time.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def tell() -> None:
        with suppress(RuntimeError):
            store = dist.distributed_c10d._get_default_store()
            cause = f"process {rank} on {socket.gethostname()} has failed: {message}"
            first = store.compare_set("cause", "", cause).decode() == cause
            while first and store.check([f"beat/{rank}"]) and store.add("told", 0) < world_size:
                time.sleep(POLL_SECONDS / 10)

    if dist.is_initialized():
        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(STORE_SECONDS)


def failure_of_another(error: Exception) -> str:
    """Where an error is that another process has gone, the cause that it has left, if it has; else ''."""
    answer: list[str] = []

    def ask() -> None:
        with suppress(RuntimeError):
            store = dist.distributed_c10d._get_default_store()
            if store.check(["cause"]):
                answer.append(store.get("cause").decode())

    if isinstance(error, RuntimeError) and _is_communication_failure(error) and dist.is_initialized():
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(STORE_SECONDS)
    return answer[0] if answer else ""


def report_failure(message: str, code: int | None = None, to_stderr: bool = True) -> None:
    """Report why this process ends, on standard error and to the launchers; `code`: see `leave_report`."""
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    who = "error" if world_size == "1" else f"error on process {rank} of {world_size}"
    line = f"{Path(sys.argv[0]).name}: {who}: {message}"
    if to_stderr:
        with suppress(OSError):  # nobody may be reading it any more
            # The line and its end in one piece: print writes them one by one, and another process may write in between.
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
    leave_report(line, code)


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
        buffers = [buffer for buffer in network.buffers() if buffer.numel()]
        by_type = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype for b in buffers}]
        # A list a dtype: of mixed ones torch copies one tensor after the other.
        self._pairs = [([buffer.clone() for buffer in alike], alike) for alike in by_type]

    def keep(self) -> None:
        for copies, buffers in self._pairs:
            torch._foreach_copy_(copies, buffers)

    def restore(self) -> None:
        for copies, buffers in self._pairs:
            torch._foreach_copy_(buffers, copies)


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
    """End this process with EXIT_STOPPED."""
    leave_report("stopped by a signal, and saved", EXIT_STOPPED)
    sys.exit(EXIT_STOPPED)


def leave_report(line: str, code: int | None = None) -> None:
    """Write why this process ends to torchrun's error file, in the form that torchrun reads and prints.

    multi_machine_start.py reads the report of the first process to fail, and repeats its line.

    Args:
        line: the cause.
        code: exit code for multi_machine_start.py, where this process ends with a purpose. (torchrun ends with 1.)
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": line, "timestamp": time.time()}
        report = {"message": {"message": line, "errorCode": code, "extraInfo": extra}}
        with suppress(OSError):  # torchrun cannot read half a file: rename it when it is whole
            Path(f"{path}.partial").write_text(json.dumps(report))
            os.replace(f"{path}.partial", path)


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
            raise Fault(f"torchrun at {where[0]}:{where[1]} cannot be reached, it has ended: {error}") from None


def quiet_loader_worker(worker_id: int) -> None:
    """For `worker_init_fn`: a loader worker leaves stopping to its process, and never outlives it.

    torchrun and terminals signal whole process groups, schedulers every process of a job: a worker that took the
    signal would end before its process has saved. See `end_loader_workers`.
    """
    os.setpgrp()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        _set_parent_death_signal(signal.SIGKILL)


def end_loader_workers() -> None:
    """Kill the loader workers that are left when the script ends: Python would ask them with SIGTERM, and wait."""
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker is killed
    for worker in workers:
        worker.kill()


def _set_parent_death_signal(number: int) -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def _is_communication_failure(error: RuntimeError) -> bool:
    """Failures of gloo and NCCL; gloo raises plain RuntimeErrors."""
    words = ("gloo", "nccl", "timed out", "timeout", "connection", "closed by peer", "broken pipe")
    text = str(error).lower()
    if text.startswith("cuda error"):  # "the launch timed out" among them
        return False
    return isinstance(error, dist.DistError) or any(word in text for word in words)
