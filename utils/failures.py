"""How a run ends other than by finishing: the causes of failures, who hears of them, and exit codes."""

import errno
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from configs import UserError
from configs.errors import EXIT_MISTAKE, EXIT_STOPPED, CompilerStopped, Fault, first_line
from configs.text import printable
from data import lost_loader_worker
from data.workers import worker_error

from .shortages import shortage, space, space_everywhere

STORE_SECONDS = 5  # how long the launcher's store may take to answer
STORE_POLL_SECONDS = 0.1
# What disks, and names that are no files' names, do to a program that is correct.
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
DISK_FAULTS = FULL_DISK | {errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOENT, errno.EACCES}
DISK_FAULTS |= {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


def end_after(error: Exception, folder: Path, clean_up: Callable[[], None]) -> NoReturn:
    """End this process after an error: one line for what the user can mend, else a traceback and one line.

    Args:
        error: what ended the script.
        folder: the run folder, named where a file that cannot be written is not.
        clean_up: is called once the cause is known.

    Exits with EXIT_MISTAKE where there is a line for the error, EXIT_STOPPED where a signal ended the compiler, else 1.
    """
    if line := shortage(error):
        error = UserError(line)
    message = printable(cause_of(error, folder))
    status = EXIT_STOPPED if isinstance(error, CompilerStopped) else EXIT_MISTAKE if message else 1
    if not message:
        traceback.print_exception(error)
        message = printable(worker_error(error) or f"{type(error).__name__}: {first_line(error)}")
    clean_up()
    # Every process finds a mistake in the command line, before they meet: one a node prints it.
    joined = status == 1 or dist.is_initialized() or isinstance(error, Fault)
    code = EXIT_MISTAKE if isinstance(error, UserError) and not isinstance(error, Fault) else None
    code = EXIT_STOPPED if status == EXIT_STOPPED else code
    report_failure(message, code, to_stderr=joined or os.environ.get("LOCAL_RANK", "0") == "0")
    tell_others(message)
    # Not by way of the interpreter's end: threads of a collective that will never finish would hold it up.
    sys.stdout.flush()
    os._exit(status)


def cause_of(error: Exception, folder: Path) -> str:
    """The one line for an error that the user can mend; '' for any other."""
    if isinstance(error, UserError):
        return error.one_line()
    if isinstance(error, FloatingPointError) and not worker_error(error):
        return str(error)
    if isinstance(error, OSError) and (found := re.search(r"\[Errno (\d+)\] (.*?)(?:: '(.*)')?$", worker_error(error))):
        error = OSError(int(found[1]), found[2], found[3])
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        if error.filename is None:
            return f"a file that the system does not name: {error.strerror}; {space_everywhere(folder)}"
        full = error.errno in FULL_DISK
        return unwritable(error.filename, error).one_line() if full else f"{error.filename}: {error.strerror}"
    return lost_loader_worker(error) or remove_unfinished_binary(error) or failure_of_another(error)


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
            Path(f"{path}.partial").write_text(json.dumps(report), encoding="utf-8")
            os.replace(f"{path}.partial", path)


def exit_stopped() -> NoReturn:
    """End this process with EXIT_STOPPED."""
    leave_report("stopped by a signal, and saved", EXIT_STOPPED)
    sys.exit(EXIT_STOPPED)


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
                time.sleep(STORE_POLL_SECONDS)

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

    if isinstance(error, RuntimeError) and is_communication_failure(error) and dist.is_initialized():
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(STORE_SECONDS)
    return answer[0] if answer else ""


def is_communication_failure(error: RuntimeError) -> bool:
    """Failures of gloo and NCCL; gloo raises plain RuntimeErrors."""
    words = ("gloo", "nccl", "timed out", "timeout", "connection", "closed by peer", "broken pipe")
    text = str(error).lower()
    if text.startswith("cuda error") or worker_error(error):  # "the launch timed out"; a traceback names connection.py
        return False
    return isinstance(error, dist.DistError) or any(word in text for word in words)


def unwritable(path: str | Path, error: Exception, needed_bytes: int | None = None) -> UserError:
    """The line for a file that cannot be written: path, cause, space needed (where known) and free."""
    needs = "" if needed_bytes is None else f"it needs about {needed_bytes / 2**20:.0f} MiB, "
    return UserError(f"{path}: cannot be written ({first_line(error)}); {needs}{space(Path(path).parent)}")


def is_compiler_failure(error: Exception) -> bool:
    """Whether the compiler has failed, or one of the processes that it starts was killed."""
    from torch._dynamo.exc import BackendCompilerFailed  # imported lazily: slow
    from torch._inductor.exc import CppCompileError

    return isinstance(error, BackendCompilerFailed | CppCompileError | BrokenExecutor)


def remove_unfinished_binary(error: Exception) -> str:
    """Where the compiler's cache holds a file that cannot be loaded, remove it, and return a line; else ''.

    A process that is killed while it compiles for a CPU leaves such a file, at times an empty one, and torch would fail
    at it again each time.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # imported lazily: slow

    found = re.search(rf"ImportError: ({re.escape(cache_dir())}/\S+\.so): (.*)", f"{type(error).__name__}: {error}")
    if found is None:
        return ""
    Path(found[1]).unlink(missing_ok=True)
    return f"{found[1]}: left by a compiler that was stopped ({found[2]}); it is removed now: start the command again"
