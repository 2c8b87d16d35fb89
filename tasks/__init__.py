"""What is trained. Each task is a folder; a new task is a folder and a line in TASKS.

Its module holds `KEYS` (the configuration keys of its own), `build(session)`, which returns a `utils.task.Task`, and
`evaluate(session)`, which does what test.py asks for.
"""

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType

import torch

from configs import UserError
from configs.keys import Key
from utils.freezing import freeze
from utils.session import Session
from utils.task import Task

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


def evaluate(session: Session) -> None:
    """Evaluate or measure, as the command line asks for."""
    _module(session.config.TASK).evaluate(session)


def _module(task: str) -> ModuleType:
    if task not in TASKS:
        raise UserError(f"TASK = {task!r}: must be one of {', '.join(map(repr, TASKS))}")
    return import_module(TASKS[task])
