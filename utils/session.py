"""How both scripts begin and end: command line, processes, run folder, logger; errors in one line."""

import contextlib
import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import Logger
from pathlib import Path

import torch
from yacs.config import CfgNode

from configs import UserError, read_command
from configs.keys import Key
from configs.load import KeysOf, to_dict
from configs.text import escape_output
from data import end_loader_workers

from .failures import end_after, unwritable
from .files import atomic_write
from .origin import CONFIG_NAME, check_named_files, config_of, configured_folder, remarks, results_folder
from .processes import (
    Processes,
    close_processes,
    die_with_launcher,
    init_processes,
    rendezvous_errors,
    run_on_main_and_broadcast,
)
from .run_lock import LOCK_NAME, lock_run_folder
from .run_log import create_logger, log_provenance
from .supervision import RunSupervisor

NETWORKS = Path(__file__).resolve().parents[1] / "models"


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

        run_on_main_and_broadcast(make_and_lock, processes)
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
    config: CfgNode
    keys: Mapping[str, Key]  # the cards of its keys
    processes: Processes
    folder: Path
    logger: Logger
    supervisor: RunSupervisor
    trains: bool  # rather than evaluates or measures


def start_session(
    description: str, keys_of: KeysOf, run_folder: RunFolder | None = None, may_train: bool = False
) -> Session:
    """Read and check the command line and configuration, join the other processes, open run folder and log.

    The run folder is <OUTPUT>/<MODEL.NAME>/<TAG>; an evaluation of a run's weights writes to the folder of that run.
    `keys_of` gives the keys of a task (`tasks.keys_of`).
    """
    notices: list[str] = []
    args, config, keys = read_command(None, keys_of, notices.append, description, config_of=config_of)
    measures = config.THROUGHPUT_MODE or args.flops
    trains = may_train and not (config.EVAL_MODE or measures or args.images)
    if trains and not args.cfg:
        raise UserError("--cfg is missing: training needs the YAML file of the variant, --cfg configs/<variant>.yaml")
    for flag, target, serves in (("--json", args.json, not trains), ("--out", args.out, args.images)):
        if target and not serves:
            raise UserError(f"{flag} {target}: nothing is written there; leave it out")
    die_with_launcher()
    with rendezvous_errors(config.DIST_TIMEOUT_SECONDS):
        processes = init_processes(config.DIST_TIMEOUT_SECONDS)

    def find_folder() -> Path | None:
        check_named_files(config, keys)
        return None if trains else results_folder(config)

    # By the main process: nodes need not share a disk, and only one of them needs the checkpoint to continue from.
    folder = run_on_main_and_broadcast(find_folder, processes)
    if trains:
        folder = configured_folder(config)  # each process may have an OUTPUT of its own
    # Before anything is logged: it may be another run's.
    (run_folder or RunFolder()).open(folder, processes, trains, notices.append)
    logger = create_logger(folder, processes, "log" if trains else "log_eval", to_stderr=args.json == "-")
    log_provenance(logger, processes)
    for notice in notices:
        logger.info(notice)
    _find_model_file(config)
    for remark in [] if trains else remarks(config, keys, measures, args.cfg):
        logger.warning(remark)
    _choose_kernels(config)
    supervisor = RunSupervisor(processes, config.DIST_TIMEOUT_SECONDS, logger.warning)
    return Session(args, config, keys, processes, folder, logger, supervisor, trains)


def run_script(main: Callable[[RunFolder], None]) -> None:
    """Run a script's `main`; a mistake that the user can mend ends in one line and status 2, without a traceback.

    Any other error ends in its traceback, one line and status 1 (`end_after`).
    """
    escape_output()
    run_folder = RunFolder()
    try:
        main(run_folder)
    except Exception as error:
        # torch's handler of SIGCHLD raises in whatever runs when a loader worker dies, this block included.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        end_after(error, run_folder.path, run_folder.remove_if_empty)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        end_loader_workers()
    close_processes()


def _find_model_file(config: CfgNode) -> Path:
    """The network's source that MODEL_FILE names; UserError where there is none."""
    source = NETWORKS / config.MODEL_FILE
    if not source.is_file():
        names = ", ".join(sorted(path.name for path in source.parent.glob("*.py") if path.name != "__init__.py"))
        raise UserError(f"--model-file {config.MODEL_FILE}: no such file in models/; there are {names}")
    return source


def describe_run(config: CfgNode, folder: Path) -> None:
    """Write the resolved configuration to the run folder, which --cfg takes as well, and the network's source."""
    source = _find_model_file(config)
    for name, content in (
        (CONFIG_NAME, f"{json.dumps(to_dict(config), indent=2)}\n".encode()),
        (source.name, source.read_bytes()),
    ):
        try:
            with atomic_write(folder / name) as partial:  # an older one is not lost to a full disk
                partial.write_bytes(content)
        except OSError as error:
            raise unwritable(folder / name, error, len(content)) from None


def _choose_kernels(config: CfgNode) -> None:
    """On GPUs: the fastest kernels, or with DETERMINISTIC those that give the same bits every time."""
    torch.backends.cudnn.benchmark = not config.DETERMINISTIC
    if config.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
