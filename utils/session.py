"""How both scripts begin and end: command line, processes, run folder, logger; errors in one line."""

import errno
import json
import os
import shutil
import signal
import sys
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

from .distributed import Processes, close_processes, init_processes
from .faults import Watch, die_with_launcher, lost_loader_worker
from .logging import create_logger, log_provenance

# What disks do to a program that is in order.
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOENT, errno.EACCES}


@dataclass(frozen=True)
class Session:
    """What a script has before it does anything of its own."""

    args: Namespace
    config: CfgNode
    processes: Processes
    folder: Path
    logger: Logger
    watch: Watch

    @property
    def trains(self) -> bool:
        """Whether `train.py` is to train, rather than to evaluate or to measure."""
        return not (self.config.EVAL_MODE or self.config.THROUGHPUT_MODE or self.args.flops or self.args.images)


def start_session(description: str) -> Session:
    """Read and check the command line and configuration, join the other processes, open run folder and log."""
    args = parse_args(description=description)
    notices: list[str] = []
    config = get_config(args, notices.append)
    die_with_launcher()
    processes = init_processes(config.DIST_TIMEOUT_SECONDS)
    folder = _run_folder(config)
    logger = create_logger(folder, processes, to_stderr=args.json == "-")
    log_provenance(logger, processes)
    for notice in notices:
        logger.info(notice)
    _find_model_file(config)
    _choose_kernels(config)
    return Session(args, config, processes, folder, logger, Watch(processes, config.DIST_TIMEOUT_SECONDS))


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; a mistake that the user can mend ends in one line and status 2, without a traceback."""
    script = Path(sys.argv[0]).name
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        main()
    except Exception as error:
        # torch's handler of SIGCHLD raises in whatever runs when a loader worker dies, this block included.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message = error.one_line() if isinstance(error, UserError) else lost_loader_worker(error)
        if isinstance(error, FloatingPointError):
            message = str(error)
        elif isinstance(error, OSError) and error.errno in DISK_FAULTS:
            message = f"{error.filename or 'a file of the run folder'}: {error.strerror}"
        if not message:
            raise
        # Mistakes in the command line are found before processes meet, by every one of them: one says so.
        if torch.distributed.is_initialized() or rank == "0":
            who = "error" if world_size == "1" else f"error on process {rank} of {world_size}"
            print(f"{script}: {who}: {message}", file=sys.stderr, flush=True)
        # Not by way of the interpreter's end: threads of a collective that will never finish would hold it up.
        sys.stdout.flush()
        os._exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    close_processes()


def _run_folder(config: CfgNode) -> Path:
    """<OUTPUT>/<MODEL.NAME>/<TAG>, made where it is not there; UserError where it cannot be."""
    folder = Path(config.OUTPUT or "output") / config.MODEL.NAME / config.TAG
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output: {folder}: cannot be written to")
    return folder


def _find_model_file(config: CfgNode) -> Path:
    """The network's source that MODEL_FILE names; UserError where there is none."""
    source = Path(models.__file__).parent / config.MODEL_FILE
    if not source.is_file():
        names = ", ".join(sorted(path.name for path in source.parent.glob("*.py") if path.name != "__init__.py"))
        raise UserError(f"--model-file {config.MODEL_FILE}: no such file in models/; there are {names}")
    return source


def describe_run(config: CfgNode, folder: Path) -> None:
    """Write the resolved configuration to the run folder, which --cfg takes as well, and the network's source."""
    (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
    shutil.copyfile(_find_model_file(config), folder / config.MODEL_FILE)


def _choose_kernels(config: CfgNode) -> None:
    """On GPUs: the fastest kernels, or with DETERMINISTIC those that give the same bits every time."""
    torch.backends.cudnn.benchmark = not config.DETERMINISTIC
    if config.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
