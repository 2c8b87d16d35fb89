"""What is trained. Each task is a folder; a new task is a folder and a line in TASKS.

Its module holds `KEYS` (the configuration keys of its own), `build(session)`, which returns a `utils.task.Task`, and
`evaluate(session)`, which does what test.py asks for. With a `load(config, path, device)` too, `load_model` gives its
networks to other code.
"""

import os
from collections.abc import Mapping
from importlib import import_module
from os import PathLike
from types import ModuleType

import torch

from configs import UserError, read_command
from configs.keys import Key
from utils.freezing import freeze
from utils.origin import config_of
from utils.session import Session
from utils.task import Task

from .trained import TrainedModel

TASKS = {  # value of the key TASK -> module
    "classification": "tasks.classification",
    "detection": "tasks.detection",
    "segmentation": "tasks.segmentation",
}


def keys_of(task: str) -> Mapping[str, Key]:
    """The configuration keys of a task's own; UserError where there is no such task.

    A key of the same name as a shared one replaces it: a task may have another default.
    """
    return _module(task).KEYS


def build(session: Session) -> Task:
    """The data, network, loss and validation of the configured task; weights are drawn from SEED + rank.

    What TRAIN.FREEZE names of the network is frozen.
    """
    torch.manual_seed(session.config.SEED + session.processes.rank)
    task = _module(session.config.TASK).build(session)
    freeze(session.config, task.network)
    return task


def load_model(path: str | PathLike, weights: str = "best", device: str | torch.device = "cpu") -> TrainedModel:
    """The network of a checkpoint or of a folder of weights, of any task, with its classes, for use in other code.

    Args:
        path: a checkpoint of a run of this repository, or what `tools.convert --to hub` made of one.
        weights: 'raw', 'ema', or 'best', those that the checkpoint was kept for.
        device: where it computes, in float32.

    Raises UserError where the file cannot be read, or holds no configuration of its network.
    """
    if weights not in (choices := ("best", "raw", "ema")):  # the parser would end the process
        raise UserError(f"weights={weights!r}: must be one of {', '.join(choices)}")
    words = [f"--resume={os.fspath(path)}", f"--weights={weights}"]
    _, config, _ = read_command(words, keys_of, lambda line: None, config_of=config_of)
    task = _module(config.TASK)
    if not hasattr(task, "load"):
        raise UserError(f"{path}: TASK {config.TASK!r} has no `load`, which gives a network to other code")
    return task.load(config, os.fspath(path), torch.device(device))


def evaluate(session: Session) -> None:
    """Evaluate or measure, as the command line asks for."""
    _module(session.config.TASK).evaluate(session)


def _module(task: str) -> ModuleType:
    if task not in TASKS:
        raise UserError(f"TASK = {task!r}: must be one of {', '.join(map(repr, TASKS))}")
    return import_module(TASKS[task])
