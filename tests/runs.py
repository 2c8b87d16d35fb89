"""Start train.py and test.py, in this process or as the launched processes that a user would start."""

import dataclasses
import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

import tasks
import train
from data.workers import STOP_SIGNALS
from utils.checkpoint import BEST_NAME, load_file
from utils.task import Task

ROOT = Path(__file__).resolve().parents[1]
PROCESS_TIMEOUT_SECONDS = 180

# A network and a recipe small enough to train in a second, with all that is random in the released one.
TINY = (
    *("MODEL.NAME", "tiny", "DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "0"),
    *("MODEL.GMA.NUM_STAGES", "2", "MODEL.GMA.EMBEDDING_DIMS", "[20, 20]", "MODEL.GMA.SERIAL_DEPTHS", "[1, 1]"),
    *("MODEL.GMA.MLP_RATIOS", "[2, 2]"),
    *("MODEL.GMA.DROP_PATH_RATE", "0.2", "TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "1", "LOG_SAMPLES", "True"),
    *("AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "AUG.REPROB", "0.25", "AUG.HFLIP", "0.5"),
    *("AUG.MIXUP", "0.8", "AUG.CUTMIX", "1.0", "PRINT_FREQ", "1", "SAVE_KEEP", "0"),
)
# Everything random switched off: what is left is a function of the images of an update.
PLAIN = (
    *("AUG.AUTO_AUGMENT", "none", "AUG.REPROB", "0.0", "AUG.HFLIP", "0.0", "AUG.MIXUP", "0.0", "AUG.CUTMIX", "0.0"),
    *("MODEL.GMA.DROP_PATH_RATE", "0.0"),
)


def arguments(data: Path, output: Path, *opts: str, flags: Sequence[str] = ()) -> list[str]:
    """The command line of a tiny run; `opts` are KEY VALUE pairs after those of TINY."""
    cfg = ROOT / "configs" / "groupmixformer_digits.yaml"
    paths = ["--cfg", str(cfg), "--data-path", str(data), "--output", str(output), "--tag", "run"]
    return [*paths, *flags, "--opts", *TINY, *opts]


def train_here(monkeypatch: pytest.MonkeyPatch, args: Sequence[str], stop_at: int | None = None) -> int:
    """Run train.py's main in this process; returns its exit status.

    With `stop_at`, SIGUSR1 arrives during the update after which so many are done.
    """
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *args])
        patch.setattr(sys, "exit", _raise_exit)
        without_curves(patch.setattr)
        if stop_at is not None:
            in_update(
                patch.setattr, lambda number, _: os.kill(os.getpid(), signal.SIGUSR1) if number == stop_at - 1 else None
            )
        try:
            train.main()
        except SystemExit as ending:
            return int(ending.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0


def _raise_exit(code: int = 0) -> None:
    raise SystemExit(code)


def without_curves(replace: Callable[[Any, str, Any], None]) -> None:
    """Let train.py draw no curves, which takes longer than all else that a tiny run does. Launched runs draw them."""
    replace(train, "RunCurves", MagicMock())


def in_update(replace: Callable[[Any, str, Any], None], action: Callable[[int, nn.Module], Callable | None]) -> None:
    """Call `action(number, network)` before the forward pass of each update, by its number in the run.

    The one place where tests reach into a training step. `replace` is `setattr`, or a monkeypatch's that undoes it.
    A function that `action` returns is applied to the loss of that update.
    """
    from utils import engine

    train_step = engine.train_step

    def replaced(session: Any, state: Any, task: Task, *rest: Any) -> Any:
        loss, change = task.loss, action(state.num_updates, state.network)
        if change is not None:
            task = dataclasses.replace(task, loss=lambda *args: _changed(change, *loss(*args)))
        return train_step(session, state, task, *rest)

    replace(engine, "train_step", replaced)


def _changed(change: Callable, total: torch.Tensor, parts: dict[str, torch.Tensor]) -> tuple:
    return change(total), parts


def kill_at_call(module: Any, name: str, number: int) -> Callable[[], None]:
    """What prepares a fork to be killed when this function of a module is called for the `number`-th time."""

    def prepare() -> None:
        function, calls = getattr(module, name), itertools.count(1)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        setattr(module, name, counted)

    return prepare


def change_task(patch: pytest.MonkeyPatch, change: Callable[[Task], dict[str, Any]]) -> None:
    """Let train.py get a task with other values, {name of the field: value}: the public seam of a run."""
    build = tasks.build

    def changed(session: Any) -> Task:
        task = build(session)
        return dataclasses.replace(task, **change(task))

    patch.setattr(tasks, "build", changed)


def launch(
    script: str,
    args: Sequence[str],
    processes: int = 1,
    env: dict[str, str] | None = None,
    timeout: float = PROCESS_TIMEOUT_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run a script as users do, under torchrun where there are several processes; output is text."""
    return subprocess.run(
        command(script, args, processes),
        cwd=ROOT,
        env=environment() | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def command(script: str, args: Sequence[str], processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), script, *args]


def environment() -> dict[str, str]:
    """One thread per process: the thread count changes bits."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_folder(output: Path) -> Path:
    return output / "tiny" / "run"


def digest(path: Path, leave_out: Sequence[str] = ()) -> str:
    """SHA-256 over the raw bytes of everything in a checkpoint, by name."""
    sha = hashlib.sha256()
    state = load_file(path)
    state.pop("config")  # holds paths and settings that are free to differ
    for name in leave_out:
        state.pop(name)
    _feed(sha.update, "", state)
    return sha.hexdigest()


def _feed(update: Callable[[bytes], None], name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            _feed(update, f"{name}.{key}", value[key])
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _feed(update, f"{name}[{number}]", item)
    elif isinstance(value, torch.Tensor):
        update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        update(f"{name} {value!r}".encode())


def final_state(output, epochs):
    folder = run_folder(output)
    return digest(folder / f"ckpt_epoch_{epochs - 1}.pth"), digest(folder / BEST_NAME)


def learning_rates(output):
    """{"[epoch/epochs][update/updates]": the learning rate that was logged}."""
    log = (run_folder(output) / "log_rank0.txt").read_text()
    return dict(re.findall(r"Train: (\[\d+/\d+\]\[\d+/\d+\]).* lr (\S+)", log))


def samples_by_update(output, processes):
    """{(epoch, update): the images that any process saw}."""
    seen = {}
    for rank in range(processes):
        for line in (run_folder(output) / f"samples_rank{rank}.txt").read_text().splitlines():
            epoch, update, *indices = map(int, line.split())
            seen.setdefault((epoch, update), []).extend(indices)
    return {key: sorted(indices) for key, indices in seen.items()}
