"""What a machine gives too little of: one line that names it, and no second start of what cannot work."""

import ctypes
import errno
import multiprocessing.synchronize
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import runs
import torch
from image_data import png
from ranks import in_fork, report_in, script
from torch.utils.data import DataLoader

from configs import UserError
from configs.errors import Fault
from data.workers import end_loader_workers, init_worker, worker_error
from tools import check, pack
from utils.failures import cause_of, is_communication_failure
from utils.processes import Processes
from utils.shortages import shortage
from utils.supervision import PROVEN_UPDATES, RunSupervisor
from utils.thread_waits import ThreadWaits, thread_times

CLONE_NEWNS = 0x20000  # linux/sched.h


def few_files() -> int:
    """No file can be opened any more, as when the batch is sent: by the queue's thread, not the worker's own."""
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, lowest_free))
    return 0


def raise_error(error: Exception) -> None:
    raise error


FAULTS = {
    "files": few_files,
    "bus": lambda: os.kill(os.getpid(), signal.SIGBUS),
    "memory": lambda: bytearray(1 << 60),
    "io": lambda: raise_error(OSError(errno.EIO, "Input/output error", "/a/picture.png")),
    "key": lambda: {}["a name"],
    "connection": lambda: raise_error(ConnectionResetError("a server of images")),
}


class Faulty(torch.utils.data.Dataset):
    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        FAULTS[self.fault]()
        return torch.zeros(3)


def error_of(fault: str) -> Exception:
    """What the loader raises where its worker meets the fault."""
    with pytest.raises(Exception) as caught:
        list(DataLoader(Faulty(fault), num_workers=1, worker_init_fn=init_worker, collate_fn=lambda batch: batch[0]))
    workers, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
    end_loader_workers()  # as scripts do: the tests' process would wait without end for one that cannot open files
    for worker in workers:
        worker.join()
    signal.signal(signal.SIGCHLD, handler)
    return caught.value


@pytest.mark.parametrize(
    ("fault", "begin"),
    [
        ("files", "too many open files for the limit of "),
        ("bus", "/dev/shm, by which loader workers and processes hand over data, is full or cannot be used, "),
        ("memory", "out of memory, on a machine of "),
    ],
)
def test_what_is_short_in_a_loader_worker_is_named(fault, begin):
    error = error_of(fault)
    assert shortage(error).startswith(begin) and "\n" not in shortage(error)
    assert "DATA.NUM_WORKERS" in shortage(error)


def test_an_error_of_a_loader_worker_keeps_its_cause(tmp_path):
    assert worker_error(error_of("key")) == "KeyError: 'a name'"
    assert cause_of(error_of("io"), tmp_path) == "/a/picture.png: Input/output error"
    error = error_of("connection")
    assert worker_error(error) == "ConnectionResetError: a server of images"
    assert cause_of(error, tmp_path) == "", "no worker was lost"
    assert not is_communication_failure(RuntimeError(*error.args)), "its traceback names files of all kinds"


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP])
def test_a_path_that_the_system_refuses_is_one_line(tmp_path, number):
    assert cause_of(OSError(number, os.strerror(number), "w.pth"), tmp_path) == f"w.pth: {os.strerror(number)}"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's half-made iterator
@pytest.mark.parametrize("run", [check.main, pack.main])
def test_a_command_names_what_is_short_for_its_loader(tmp_path, monkeypatch, capsys, run):
    for number, name in enumerate(("train/a/x.png", "train/b/x.png", "val/a/x.png", "val/b/x.png")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(png(number))
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", lambda *args: raise_error(full))
    out = ["--out", str(tmp_path / "packed")] if run is pack.main else []
    assert run(["--data-path", str(tmp_path), "--workers", "1", *out]) == 2
    line = capsys.readouterr().err
    assert "error: /dev/shm, by which loader workers" in line and "or lower --workers; OSError" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "begin"),
    [
        (RuntimeError("unable to write to file </torch_12_345_0>: No space left on device (28)"), "/dev/shm, "),
        (RuntimeError("NCCL error\nError while creating shared memory segment /dev/shm/nccl-1 (size 9)"), "/dev/shm, "),
        (RuntimeError("out of resource: shared memory, Required: 2, Hardware limit: 1"), ""),
        (RuntimeError("received 0 items of ancdata"), "too many open files"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes."),
            "out of memory",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no more processes or threads"),
        (RuntimeError("can't start new thread"), "no more processes or threads"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            "FileNotFoundError: No us",
        ),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), "CUDA out of memory.: lower --batch-size"),
        (OSError(errno.ENOSPC, "No space left on device", "/dev/shm/output/file"), ""),
        (UserError("/dev/shm/data: Cannot allocate memory"), ""),
        (RuntimeError("connection closed"), ""),
    ],
)
def test_errors_that_name_what_is_short(error, begin):
    assert shortage(error).startswith(begin) and bool(shortage(error)) == bool(begin)


def test_a_full_disk_whose_file_is_unknown_names_all_places(tmp_path):
    line = cause_of(OSError(errno.ENOSPC, "No space left on device"), tmp_path)
    assert line.startswith(f"a file that the system does not name: No space left on device; {tmp_path}: ")
    assert "/dev/shm: " in line and line.count(" MiB are free") == 3


def test_what_is_short_at_the_start_is_not_retried_and_later_is():
    supervisor = RunSupervisor(Processes(0, 0, 1, torch.device("cpu")), timeout_seconds=1)
    for updates, kind in ((PROVEN_UPDATES - 1, UserError), (PROVEN_UPDATES, Fault)):
        supervisor._updates = updates
        with pytest.raises(UserError) as caught, supervisor.explain_lost_ranks():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert type(caught.value) is kind


@pytest.mark.parametrize("size", ["8k", "64k"], ids=["semaphores", "batches"])
def test_small_shared_memory_ends_a_run_in_one_line_without_retries(data, tmp_path, size):
    def shrink() -> None:
        assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)

    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let the tests mount a file system")
    args = runs.arguments(data, tmp_path, "DATA.NUM_WORKERS", "1", "DATA.BATCH_SIZE", "16")
    env = {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "report")}
    code, output = in_fork(script("train.py", args, shrink, env))
    line = output.splitlines()[-1]
    assert code == 2 and "Traceback" not in output, output
    assert line.startswith(
        "train.py: error: /dev/shm, by which loader workers and processes hand over data, is full"
    ) and ("--shm-size" in line and "of 0 MiB are free" in line)
    assert report_in(tmp_path / "report")["errorCode"] == 2


# ---------------------------------------------------------------------------------------------------- threads and cores
def test_threads_that_wait_for_cores_are_told_once(monkeypatch):
    lines = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    times = iter([(0, 0, 0), (1, 10, 10), (4, 100, 300), (9, 0, 0)])
    clock = {}

    def read():
        clock["now"], *rest = next(times)
        return tuple(rest)

    monkeypatch.setattr("utils.thread_waits.thread_times", read)
    monkeypatch.setattr("utils.thread_waits.time.monotonic", lambda: 0)
    waits = ThreadWaits()
    monkeypatch.setattr("utils.thread_waits.MEASURED_SECONDS", 0)
    for _ in range(4):
        waits.after_update(lines.append)
    (line,) = lines
    assert "the 8 threads of this process wait 50 % of their time" in line and "OMP_NUM_THREADS" in line


def test_threads_that_find_a_core_are_not_told(monkeypatch):
    lines = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr("utils.thread_waits.MEASURED_SECONDS", 0)
    times = iter([(0, 0), (300, 99)])
    monkeypatch.setattr("utils.thread_waits.thread_times", lambda: next(times))
    waits = ThreadWaits()
    for _ in range(3):
        waits.after_update(lines.append)
    assert not lines


def test_times_of_threads(tmp_path):
    for number, text in enumerate(("10 20 3", "1 2 3", "")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "schedstat").write_text(text)
    assert thread_times(tmp_path) == (11, 22)
    assert thread_times(Path("/nowhere")) == (0, 0)
