"""One prediction per image, and the file that holds them.

N images, K classes of the data, k = min(5, K). The file has a line for every image and the columns

    path, label, label_name, probability, nll, top1, top1_name, p1, top2, p2, ..., top5, p5

path is relative to the folder of the split, label and topX are class indices, probability is that of the label, nll its
negative logarithm. Where there is no label, label is -1 and what follows from it is empty.
"""

import csv
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs import UserError
from data.sources import UNLABELLED
from utils.files import write_rows


@dataclass(frozen=True)
class Predictions:
    """What a network says of every image, in the order of the data set."""

    paths: list[str]  # N, relative to the folder of the split, with '/'
    labels: np.ndarray  # (N,) int64 class indices, -1 where unknown
    probabilities: np.ndarray  # (N,) float32, of the label; NaN where it is unknown
    nll: np.ndarray  # (N,) float32, -log of that, nats
    top: np.ndarray  # (N, k) int64 class indices, the most probable first
    top_probabilities: np.ndarray  # (N, k) float32
    classes: list[str]  # K names, by class index
    # (N, K) float32, natural-log scale; None where not kept (MAX_LOGITS_BYTES) or read from a file
    logits: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labelled(self) -> np.ndarray:
        """(N,) bool: images whose label is known."""
        return self.labels != UNLABELLED

    def correct(self, k: int = 1) -> np.ndarray:
        """(N,) bool: whether the label is among the k most probable classes (all of them where there are fewer)."""
        return (self.top[:, :k] == self.labels[:, None]).any(axis=1)

    def save(self, path: str | Path) -> None:
        """Write the file."""
        write_rows(Path(path), column_names(self.top.shape[1]), self._rows())

    @classmethod
    def load(cls, path: str | Path) -> "Predictions":
        """Read such a file. Class names that it does not hold are the class indices as text; logits are None.

        Raises UserError where it is missing, damaged, or has other columns.
        """
        path = Path(path)
        try:
            columns = _read_csv(path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        names, k = list(columns), sum(name.startswith("top") and name[3:].isdigit() for name in columns)
        if names != column_names(k) or k == 0:
            raise UserError(f"{path}: not a predictions file: its columns are {', '.join(names)}")
        try:
            labels = np.array(columns["label"], dtype=np.int64)
            probabilities, nll = (
                np.array([math.nan if v == "" else v for v in columns[name]], dtype=np.float32)
                for name in ("probability", "nll")
            )
            top = np.stack([np.array(columns[f"top{i}"], dtype=np.int64) for i in range(1, k + 1)], axis=1)
            shares = np.stack([np.array(columns[f"p{i}"], dtype=np.float32) for i in range(1, k + 1)], axis=1)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not a predictions file: {error}") from None
        classes = [str(index) for index in range(max(labels.max(initial=-1), top.max(initial=-1)) + 1)]
        for index, name in [*zip(labels, columns["label_name"]), *zip(top[:, 0], columns["top1_name"])]:
            if index >= 0:
                classes[index] = name
        paths = [os.fsdecode(path.encode(errors="surrogateescape")) for path in columns["path"]]  # as `open` takes them
        return cls(paths, labels, probabilities, nll, top, shares, classes)

    def _rows(self) -> Iterator[list[Any]]:
        """The lines of the file. float32 in its shortest form that reads back as the same number."""
        columns = (self.paths, self.labels.tolist(), self.probabilities, self.nll, self.top.tolist())
        for path, label, probability, nll, top, shares in zip(*columns, self.top_probabilities):
            known = label != UNLABELLED
            row = [path, label, self.classes[label] if known else "", probability if known else ""]
            row += [nll if known else "", top[0], self.classes[top[0]], shares[0]]
            for index, share in zip(top[1:], shares[1:]):
                row += [index, share]
            yield row


def column_names(k: int) -> list[str]:
    """The columns of a predictions file with k predictions per image."""
    names = ["path", "label", "label_name", "probability", "nll", "top1", "top1_name", "p1"]
    return names + [name for i in range(2, k + 1) for name in (f"top{i}", f"p{i}")]


def _read_csv(path: Path) -> dict[str, Sequence[Any]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    header = rows[0] if rows else []
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise UserError(f"{path}:{number}: {len(row)} fields, the header has {len(header)}")
    columns = zip(*rows[1:]) if len(rows) > 1 else ([] for _ in header)
    return dict(zip(header, columns))
