"""Processes of train.py and test.py, and the means to watch them.

`Ranks` and `run_ranks` fork this process, which has imported everything: a start costs 30 ms instead of 4 s. `Launched`
and `runs.launch` are for the tests of torchrun and of an interpreter's own start and end (mark `launch`).
"""

import contextlib
import io
import json
import multiprocessing
import os
import re
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import runs
from torch.distributed import TCPStore
from tqdm import tqdm

import test as test_script
import train
from data.workers import STOP_SIGNALS, set_parent_death_signal
from utils.session import run_script

SECONDS = 180  # how long a test waits for output, and for an end
FAULT_TRAIN = str(Path(__file__).parent / "fault_train.py")
_FORK = multiprocessing.get_context("fork")


def do_nothing() -> None:
    pass


# ------------------------------------------------------------------------------------------------------------- forks
class Forked:
    """Functions, each in a fork of this process. All forks are gone when the block ends.

    Args:
        functions: what the forks run; a SystemExit gives the exit status.
        split: keep standard error apart, as `errors`; otherwise it is part of `text`.
    """

    def __init__(self, *functions: Callable[[], None], split: bool = False) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        pipes = [os.pipe() for _ in range(1 + split)]
        self._received = {reading: b"" for reading, _ in pipes}
        self._open = list(self._received)
        self._position = 0  # where `until` goes on
        streams = pipes[0][1], pipes[-1][1]
        self.processes = [_FORK.Process(target=_be_child, args=(function, *streams)) for function in functions]
        for process in self.processes:
            process.start()
        for _, writing in pipes:
            os.close(writing)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.stop_reading()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    @property
    def text(self) -> str:
        return next(iter(self._received.values())).decode(errors="replace")

    @property
    def errors(self) -> str:
        return list(self._received.values())[-1].decode(errors="replace")

    def kill(self, number: int = signal.SIGKILL, rank: int = 0) -> None:
        os.kill(self.pids[rank], number)

    def read(self, seconds: float = SECONDS) -> bool:
        """Some more output; False where there is none within this time, or no more at all."""
        ready = select.select(self._open, [], [], seconds)[0] if self._open else []
        for reading in ready:
            piece = os.read(reading, 65536)
            self._received[reading] += piece
            if not piece:
                self._open.remove(reading)
                os.close(reading)
        return bool(ready)

    def stop_reading(self) -> None:
        while self._open:
            os.close(self._open.pop())

    def until(self, pattern: str) -> re.Match[str]:
        """Read on until a line matches; AssertionError where the output ends first."""
        while True:
            for line in re.compile(r".*\n").finditer(self.text, self._position):
                self._position = line.end()
                if match := re.search(pattern, line[0].rstrip("\n")):
                    return match
            assert self.read(), f"no line matches {pattern!r} in:\n{self.text}"

    def finish(self) -> list[int]:
        """Read to the end; returns the exit status of each fork, -n where signal n ended it."""
        while self.read():
            pass
        assert not self._open, f"silent for {SECONDS} s, after:\n{self.text}{self.errors}"
        for process in self.processes:
            process.join(SECONDS)
        return [process.exitcode for process in self.processes]


def _be_child(function: Callable[[], None], stdout: int, stderr: int) -> None:
    set_parent_death_signal(signal.SIGKILL)
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared by all forks, and a killed one may have held it
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.closerange(min(stdout, stderr), max(stdout, stderr) + 1)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(stream, "w", closefd=False), write_through=True) for stream in (1, 2)
    )
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    function()


def in_fork(function: Callable[[], None]) -> tuple[int, str]:
    """Run a function in a fork to its end; returns its exit status and output."""
    with Forked(function) as child:
        (status,) = child.finish()
        return status, child.text


# ------------------------------------------------------------------------------------------------------------- ranks
def script(
    name: str, args: Sequence[str], prepare: Callable[[], None] = do_nothing, env: dict[str, str] | None = None
) -> Callable[[], None]:
    """What a fork runs to be this script with these arguments; `prepare` may change its modules before."""

    def run() -> None:
        os.chdir(runs.ROOT)
        os.environ.update(env or {})
        sys.argv = [name, *args]
        runs.without_curves(setattr)
        prepare()
        if name == "train.py":
            run_script(train.main)
        elif name == "test.py":
            run_script(test_script.main)
        else:
            runpy.run_path(name, run_name="__main__")

    return run


def train_in_fork(args: Sequence[str], prepare: Callable[[], None] = do_nothing) -> tuple[int, str]:
    """Run train.py in a fork to its end; returns its exit status and output."""
    return in_fork(script("train.py", args, prepare))


class Ranks(Forked):
    """A script on so many ranks, with the environment and the store that torchrun would give them.

    Nobody looks after them: a rank that fails leaves the others to themselves. Each writes the error file that torchrun
    would read to `reports`/report<rank>.
    """

    def __init__(
        self,
        name: str,
        args: Sequence[str],
        processes: int = 1,
        env: dict[str, str] | None = None,
        split: bool = False,
        reports: Path | None = None,
    ) -> None:
        self._store = contextlib.ExitStack()
        joined = {}
        if processes > 1:
            store = self._store.enter_context(Forked(_serve_store))
            joined = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": store.until(r"port (\d+)")[1],
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
        environments = [
            {**joined, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if joined else {}), **(env or {})}
            | ({"TORCHELASTIC_ERROR_FILE": str(reports / f"report{rank}")} if reports else {})
            for rank in range(processes)
        ]
        super().__init__(*(script(name, args, env=rank) for rank in environments), split=split)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._store.close()


def _serve_store() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print(f"port {store.port}")
    signal.pause()


@dataclass(frozen=True)
class Ended:
    codes: list[int]  # by rank
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        """0 where every rank ended well."""
        return next(filter(None, self.codes), 0)


def run_ranks(
    name: str,
    args: Sequence[str],
    processes: int = 1,
    env: dict[str, str] | None = None,
    reports: Path | None = None,
) -> Ended:
    """Run a script on so many ranks to its end."""
    with Ranks(name, args, processes, env, split=True, reports=reports) as ranks:
        codes = ranks.finish()
        return Ended(codes, ranks.text, ranks.errors)


# ------------------------------------------------------------------------------------------------- started as users do
class Launched:
    """A launched script whose output is read line by line; all its processes are gone when the block ends."""

    def __init__(self, script, args, processes=1, env=None, command=None):
        self.process = subprocess.Popen(
            command or runs.command(script, args, processes),
            cwd=runs.ROOT,
            env=runs.environment() | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.stdout.close()
        self.process.wait()

    def until(self, pattern):
        """Read on until a line matches; fails where the output ends first."""
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no line matches {pattern!r} in:\n{''.join(self.lines)}")

    def finish(self):
        """Read to the end of the output, which comes when the last process that could write it has ended."""
        self.lines += self.process.stdout.readlines()
        return self.process.wait(timeout=runs.PROCESS_TIMEOUT_SECONDS), "".join(self.lines)


# ------------------------------------------------------------------------------------------------- watched by their id
def pid_of(output, rank):
    log = (runs.run_folder(output) / f"log_rank{rank}.txt").read_text()
    return int(re.findall(rf"process {rank} of .* pid (\d+) on", log)[-1])


def workers_of(pid):
    """The loader workers of a process, whichever of its threads forked them."""
    lists = [children.read_text().split() for children in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for children in lists for child in children]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_end(pids, seconds=30):
    """Whether these processes are gone, or go within this time: a process closes its output a moment before it ends."""
    for pid in pids:
        try:
            handle = os.pidfd_open(int(pid))
        except ProcessLookupError:
            continue
        ended = select.select([handle], [], [], seconds)[0]
        os.close(handle)
        if not ended:
            return False
    return True


def report_in(file):
    """What a process that failed left for its launcher."""
    return json.loads(file.read_text())["message"]
