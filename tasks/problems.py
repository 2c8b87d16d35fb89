"""What a look at a data set finds (`python -m tools.check`)."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from yacs.config import CfgNode

from configs import UserError

ERROR, WARNING = "error", "warning"


class Problem(NamedTuple):
    """One finding. A task's `KINDS` gives the level and the meaning of each kind."""

    kind: str
    path: str  # below the data path
    reason: str


Split = TypeVar("Split")


def open_splits(config: CfgNode, open_split: Callable[[CfgNode, str], Split]) -> tuple[dict[str, Split], list[Problem]]:
    """The splits 'train' and 'val' that training can open, and why it cannot open the others.

    Raises UserError where --data-path is no folder.
    """
    if not Path(config.DATA.DATA_PATH).is_dir():
        raise UserError(f"--data-path {config.DATA.DATA_PATH}: no such folder")
    splits, problems = {}, []
    for name in ("train", "val"):
        try:
            splits[name] = open_split(config, name)
        except UserError as error:
            problems.append(Problem("split", name, error.one_line()))
    return splits, problems


class Copies:
    """Finds images whose bytes were there before."""

    def __init__(self) -> None:
        self.first: dict[bytes, tuple[str, str]] = {}  # digest of an image -> split and path where it is first

    def find(self, split: str, path: str, digest: bytes) -> list[Problem]:
        """What is wrong with an image, at most one problem: it is in the split twice, or in both."""
        if digest not in self.first:
            self.first[digest] = split, path
            return []
        first_split, first = self.first[digest]
        kind = "duplicate" if first_split == split else "train-and-val"
        return [Problem(kind, path, f"same content as {first}")]


def in_order(problems: Iterable[Problem], kinds: Iterable[str]) -> list[Problem]:
    """Sorted by their kinds, then by path and reason."""
    order = list(kinds)
    return sorted(problems, key=lambda problem: (order.index(problem.kind), problem.path, problem.reason))
