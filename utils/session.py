"""How both scripts begin and end: command line, processes, run folder, logger; errors in one line."""

import contextlib
import errno
import json
import os
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from logging import Logger
from pathlib import Path

import torch
from yacs.config import CfgNode

import models
from configs import UserError, get_config, parse_args
from configs.defaults import to_dict
from configs.errors import first_line

from .compilation import remove_unfinished_binary
from .files import whole_file
from .processes import Processes, close_processes, decide_on_main, init_processes
from .run_lock import LOCK_NAME, lock_run_folder
from .run_log import create_logger, log_provenance
from .supervision import (
    EXIT_MISTAKE,
    EXIT_STOPPED,
    CompilerStopped,
    Fault,
    Watch,
    die_with_launcher,
    end_loader_workers,
    failure_of_another,
    leave_exit_code,
    lost_loader_worker,
    meeting,
    report_failure,
    tell_others,
    unwritable,
)

# What disks do to a program that is in order.
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOENT, errno.EACCES}
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


class RunFolder:
    """Where a script writes. `run_script` makes one, `start_session` opens it, and the script's end may remove it."""

    def __init__(self) -> None:
        self.path = Path()
        self._made: list[Path] = []  # of that path the folders that this process made, innermost first

    def open(self, path: Path, processes: Processes, lock: bool, notify: Callable[[str], None]) -> None:
        """Make the folder where it is not there, and lock it for writing; UserError where it cannot be.

        `notify` gets what is to be logged, once there is a log.

        The main process goes first, and locks: whoever finds the folder missing then is on another disk.
        """
        self.path = path

        def tell(line: str) -> None:
            print(line, file=sys.stderr, flush=True)  # it may be about waiting
            notify(line)

        def make_and_lock() -> None:
            self._make()
            if lock:
                lock_run_folder(path, tell)

        decide_on_main(make_and_lock, processes)
        if not processes.is_main:
            self._make()

    def _make(self) -> None:
        try:
            for path in (*reversed(self.path.parents), self.path):
                if not path.exists():
                    path.mkdir(exist_ok=True)
                    self._made.insert(0, path)
            self.path.mkdir(exist_ok=True)  # a file of that name, or a broken link
        except OSError as error:
            raise UserError(f"--output: {self.path}: {error.strerror}") from None
        if not os.access(self.path, os.W_OK):
            raise UserError(f"--output: {self.path}: cannot be written to")

    def remove_if_empty(self) -> None:
        """Remove the folder if this process made it and it holds nothing yet but logs, which name no result."""
        with contextlib.suppress(OSError, UserError):
            if self.path in self._made:
                # Nobody else has begun to write there.
                lock = lock_run_folder(self.path, lambda line: None, wait_seconds=0)
                contents = list(self.path.iterdir())
                if all(path.name == LOCK_NAME or path.match("log_*.txt") for path in contents):
                    for path in contents:
                        path.unlink()
                os.close(lock)
            for path in self._made:
                path.rmdir()


@dataclass(frozen=True)
class Session:
    """What a script has before it does anything of its own."""

    args: Namespace
    config: CfgNode  # train.py puts the number of classes of its data into it
    processes: Processes
    folder: Path
    logger: Logger
    watch: Watch
    trains: bool  # rather than evaluates or measures


def start_session(description: str, run_folder: RunFolder | None = None, may_train: bool = False) -> Session:
    """Read and check the command line and configuration, join the other processes, open run folder and log.

    The run folder is <OUTPUT>/<MODEL.NAME>/<TAG>.
    """
    args = parse_args(description=description)
    notices: list[str] = []
    config = get_config(args, notices.append)
    die_with_launcher()
    with meeting(config.DIST_TIMEOUT_SECONDS):
        processes = init_processes(config.DIST_TIMEOUT_SECONDS)
    trains = may_train and not (config.EVAL_MODE or config.THROUGHPUT_MODE or args.flops or args.images)
    folder = Path(config.OUTPUT or "output") / config.MODEL.NAME / config.TAG
    # Before anything is logged: it may be another run's.
    (run_folder or RunFolder()).open(folder, processes, trains, notices.append)
    logger = create_logger(folder, processes, "log" if trains else "log_eval", to_stderr=args.json == "-")
    log_provenance(logger, processes)
    for notice in notices:
        logger.info(notice)
    _find_model_file(config)
    _choose_kernels(config)
    watch = Watch(processes, config.DIST_TIMEOUT_SECONDS, logger.warning)
    return Session(args, config, processes, folder, logger, watch, trains)


def run_script(main: Callable[[RunFolder], None]) -> None:
    """Run a script's `main`; a mistake that the user can mend ends in one line and status 2, without a traceback.

    Any other error ends in its traceback, one line and status 1.
    """
    run_folder = RunFolder()
    try:
        main(run_folder)
    except Exception as error:
        # torch's handler of SIGCHLD raises in whatever runs when a loader worker dies, this block included.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message = error.one_line() if isinstance(error, UserError) else lost_loader_worker(error)
        if isinstance(error, FloatingPointError):
            message = str(error)
        elif isinstance(error, OSError) and error.errno in DISK_FAULTS:
            path = error.filename or run_folder.path / "a file"
            message = unwritable(path, error).one_line() if error.errno in FULL_DISK else f"{path}: {error.strerror}"
        elif isinstance(error, torch.OutOfMemoryError):
            message = f"{first_line(error)}: lower --batch-size (--accumulation-steps keeps the global batch), or add "
            message += "--use-checkpoint"
        message = message or remove_unfinished_binary(error) or failure_of_another(error)
        status = EXIT_MISTAKE if message else 1
        if isinstance(error, CompilerStopped):
            status = EXIT_STOPPED
            leave_exit_code(EXIT_STOPPED)
        if not message:
            traceback.print_exc()
            message = f"{type(error).__name__}: {first_line(error)}"
        run_folder.remove_if_empty()
        # Mistakes in the command line are found before processes meet, by every one of them: one a node says so.
        joined = status == 1 or torch.distributed.is_initialized() or isinstance(error, Fault)
        if joined or os.environ.get("LOCAL_RANK", "0") == "0":
            report_failure(message)
        if isinstance(error, UserError) and not isinstance(error, Fault):
            leave_exit_code(EXIT_MISTAKE)
        tell_others(message)
        # Not by way of the interpreter's end: threads of a collective that will never finish would hold it up.
        sys.stdout.flush()
        os._exit(status)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        end_loader_workers()
    close_processes()


def _find_model_file(config: CfgNode) -> Path:
    """The network's source that MODEL_FILE names; UserError where there is none."""
    source = Path(models.__file__).parent / config.MODEL_FILE
    if not source.is_file():
        names = ", ".join(sorted(path.name for path in source.parent.glob("*.py") if path.name != "__init__.py"))
        raise UserError(f"--model-file {config.MODEL_FILE}: no such file in models/; there are {names}")
    return source


def describe_run(config: CfgNode, folder: Path) -> None:
    """Write the resolved configuration to the run folder, which --cfg takes as well, and the network's source."""
    source = _find_model_file(config)
    for name, text in (
        ("config.json", json.dumps(to_dict(config), indent=2) + "\n"),
        (source.name, source.read_text()),
    ):
        try:
            with whole_file(folder / name) as partial:  # an older one is not lost to a full disk
                partial.write_text(text)
        except OSError as error:
            raise unwritable(folder / name, error, len(text)) from None


def _choose_kernels(config: CfgNode) -> None:
    """On GPUs: the fastest kernels, or with DETERMINISTIC those that give the same bits every time."""
    torch.backends.cudnn.benchmark = not config.DETERMINISTIC
    if config.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
