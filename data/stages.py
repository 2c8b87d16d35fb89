"""Values that change in the course of a run: a value for all epochs, or a list of [first epoch, value]."""

from collections.abc import Callable
from typing import Any


def in_epoch(staged: Any, epoch: int) -> Any:
    """The value of an epoch."""
    return next(value for first, value in reversed(as_stages(staged)) if first <= epoch)


def as_stages(staged: Any) -> list[list[Any]]:
    """[first epoch, value] of every stage; the first one begins with epoch 0."""
    return staged if isinstance(staged, list) else [[0, staged]]


def map_stages(function: Callable[[Any], Any], staged: Any) -> Any:
    """What the function makes of each value."""
    if isinstance(staged, list):
        return [[first, function(value)] for first, value in staged]
    return function(staged)
