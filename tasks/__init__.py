"""What is trained: the data, network, loss, validation and evaluation of each task."""

from collections.abc import Mapping
from importlib import import_module

from configs import UserError
from configs.keys import Key

# value of the key TASK -> its package. A new task is a line here.
TASKS = {"classification": "tasks.classification"}


def keys_of(task: str) -> Mapping[str, Key]:
    """The configuration keys that a task has beside the shared ones; UserError where there is no such task.

    A key of the same name as a shared one replaces it: a task may have another default.
    """
    if task not in TASKS:
        raise UserError(f"TASK = {task!r}: must be one of {', '.join(map(repr, TASKS))}")
    return import_module(f"{TASKS[task]}.keys").KEYS
