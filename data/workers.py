"""Loader workers: how many there are, how they treat signals, how the failure or loss of one shows, how they end."""

import ctypes
import multiprocessing
import multiprocessing.queues
import os
import re
import signal
import sys
from typing import Any

from torch._utils import ExceptionWrapper
from yacs.config import CfgNode

from configs.errors import first_line

# The signals that ask a run to stop. Loader workers ignore them. SIGHUP: its terminal or connection has gone.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def available_cores() -> int:
    """CPU cores that this process may use: a scheduler or container may allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_workers(config: CfgNode) -> int:
    """DATA.NUM_WORKERS, but no more than this process's share of the CPU cores. Results do not depend on it."""
    return min(config.DATA.NUM_WORKERS, max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def init_worker(worker_id: int) -> None:
    """For `worker_init_fn`: a worker ignores the stop signals, and never outlives its process.

    torchrun and terminals signal whole process groups, schedulers every process of a job. A worker that took the
    signal would end before its process has saved. `end_loader_workers` ends them instead.
    """
    os.setpgrp()
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    set_parent_death_signal(signal.SIGKILL)


def _send_error(queue: multiprocessing.queues.Queue, error: Exception, batch: tuple[int, Any]) -> None:
    """Send the error in place of a batch that could not be sent: the loader would wait for that one without end.

    Python's hook for this prints the error, and drops the batch.
    """
    number, _ = batch
    queue.put((number, ExceptionWrapper((type(error), error, error.__traceback__), "in DataLoader worker process")))


def set_parent_death_signal(number: int) -> None:
    """Let the kernel send this process a signal when its parent ends. Linux only; elsewhere it does nothing."""
    PR_SET_PDEATHSIG = 1  # linux/prctl.h
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def worker_error(error: BaseException) -> str:
    """What a loader worker, or the thread that pins its batches, raised: 'KeyError: name'; '' for any other error.

    torch raises it again with the traceback as its message, and without what else the exception held.
    """
    text = str(error.args[0]) if error.args else ""
    if not re.match(r"Caught \w+ in .*\nOriginal Traceback", text):
        return ""
    end = text[text.rindex('\n  File "') + 1 :]  # the frame that raised; its lines are indented
    return next((line for line in end.splitlines() if not line.startswith(" ")), "")


def lost_loader_worker(error: BaseException | None) -> str:
    """One line where an exception comes from a lost loader worker, else ''.

    The loss shows in several ways: torch's handler of SIGCHLD raises wherever the process is, at times on top of the
    connection's own failure.
    """
    found = ""
    while error is not None and not worker_error(error):
        if "killed by signal" in str(error):
            advice = "; where memory is short, lower DATA.NUM_WORKERS" if "signal: Killed" in str(error) else ""
            return f"a loader worker was lost: {first_line(error).rstrip(' .')}{advice}"
        if "DataLoader worker" in str(error):
            found = found or f"a loader worker was lost: {first_line(error)}"
        if isinstance(error, ConnectionError | EOFError):
            found = found or f"a loader worker was lost: {type(error).__name__} while its batch was fetched"
        error = error.__cause__ or error.__context__
    return found


def end_loader_workers() -> None:
    """Kill the loader workers that are left when the script ends: Python would ask them with SIGTERM, and wait."""
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker is killed
    for worker in workers:
        worker.kill()
