"""What a machine, a container or a shell gives a run too little of: named in one line, with its size and what to do."""

import contextlib
import os
import re
import resource
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from configs import UserError
from configs.errors import first_line
from data.workers import lost_loader_worker, worker_error

SHARED_MEMORY = Path("/dev/shm")
FEWER = "lower DATA.NUM_WORKERS or --batch-size"


@contextlib.contextmanager
def named_shortages(fewer: str) -> Iterator[None]:
    """Raise UserError, one line, for what is short; `fewer` says what to lower. Around a command's loader."""
    try:
        yield
    except Exception as error:
        if not (line := shortage(error, fewer)):
            raise
        with contextlib.redirect_stderr(None):  # torch's half-made iterator reports its own end
            traceback.clear_frames(error.__traceback__)
        raise UserError(line) from None


def shortage(error: BaseException, fewer: str = FEWER) -> str:
    """The line for an error that says what is short, whoever raised it; '' for any other error.

    The same command meets such a limit again, as long as nothing else took what there is.
    """
    if isinstance(error, UserError):
        return ""
    what = worker_error(error) or lost_loader_worker(error)
    said = what or f"{type(error).__name__}: {error}"  # NCCL names the file in its last line
    what = what or f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, torch.OutOfMemoryError):
        advice = "lower --batch-size (--accumulation-steps keeps the global batch), or add --use-checkpoint"
        return f"{first_line(error)}: {advice}"
    if re.search(r"Too many open files|received \d+ items of ancdata", said):
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"too many open files for the limit of {limit}: raise it (ulimit -n {most}), or {fewer}; {what}"
    if re.search(r"\(shm\)|</torch_\d|shared memory segment|signal: Bus error", said) or _makes_semaphore(error):
        return (
            f"{SHARED_MEMORY}, by which loader workers and processes hand over data, is full or cannot be used, "
            f"{space(SHARED_MEMORY, sized=True)}: enlarge it (docker run --shm-size=16g, or --ipc=host), "
            f"or {fewer}; {what}"
        )
    if re.search(r"^MemoryError\b|[Cc]an(no|')t allocate memory", said):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        return f"out of memory, on a machine of {total:.1f} GiB (a container may allow less): {fewer}; {what}"
    if re.search(r"can't start new thread|^BlockingIOError: (\[Errno 11\] )?Resource temporarily unavailable$", said):
        limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
        return f"no more processes or threads: raise the limit (ulimit -u is {limit}), or {fewer}; {what}"
    if "No usable temporary directory" in said:
        return f"{what}; set TMPDIR to a folder that can be written to"
    return ""


def _makes_semaphore(error: BaseException) -> bool:
    """Whether the error is that of a semaphore, which the system keeps as a file of SHARED_MEMORY without naming it."""
    named = getattr(error, "filename", None)
    if not isinstance(error, OSError) or (named and not str(named).endswith("synchronize.py")):
        return False
    return "multiprocessing/synchronize.py" in "".join(traceback.format_exception(error))


def space(folder: str | Path, sized: bool = False) -> str:
    """How much of a folder's file system is free, and how large that is (`sized`); why that is unknown, where it is."""
    try:
        usage, status = shutil.disk_usage(folder), os.statvfs(folder)
    except OSError as error:
        return f"it cannot be reached: {error.strerror}"
    files = "" if status.f_favail or not status.f_files else f", but none of its {status.f_files} files (inodes)"
    total = f" of {usage.total / 2**20:.0f} MiB" if sized else ""
    return f"{usage.free / 2**20:.0f} MiB{total} are free{files}"


def space_everywhere(folder: Path) -> str:
    """The same of each place that a run writes to, for an error that names none."""
    places = dict.fromkeys([folder, Path(tempfile.gettempdir()), SHARED_MEMORY])
    return ", ".join(f"{place}: {space(place)}" for place in places)
