"""Images that a file names, with their classes: CSV, or Parquet where pyarrow is installed.

The file has a column `path`, below the data path, and a column `class`; others are passed over. Class names are sorted,
as numbers where all of them are. With several classes an image, CSV has `|` between their names, and Parquet `|` or a
list; an empty field is an image of no class.
"""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs import UserError
from configs.errors import one_line

from .sources import UNLABELLED, FileSource, SampleList

BETWEEN_CLASSES = "|"


class LabelSetList(SampleList):
    """A list of (path, class indices), the latter a tuple, in blocks of memory. Its `labels` are all UNLABELLED."""

    def __init__(self, samples: Iterable[tuple[str, Sequence[int]]]) -> None:
        samples = list(samples)
        super().__init__((path, UNLABELLED) for path, _ in samples)
        self._classes = np.array([label for _, labels in samples for label in labels], dtype=np.int64)
        self._class_ends = np.cumsum([0, *(len(labels) for _, labels in samples)], dtype=np.int64)

    def _label(self, index: int) -> tuple[int, ...]:
        return tuple(self._classes[self._class_ends[index] : self._class_ends[index + 1]].tolist())

    def counts(self, num_classes: int) -> list[int]:
        return np.bincount(self._classes, minlength=num_classes).tolist()

    def renumbered(self, numbers: Sequence[int]) -> "LabelSetList":
        return LabelSetList((path, sorted(numbers[label] for label in labels)) for path, labels in self)


class LabelFileSource(FileSource):
    """The images of a label file.

    Args:
        root: the folder that the paths are below.
        file: the label file.
        several: images have several classes, or none: labels are tuples of class indices.

    Raises UserError, which names the line, where the file cannot be read, lacks a column or has it twice, names an
    image twice or one that is not there, or gives an image no class; and where all images are of one class.
    """

    left_out = ""

    def __init__(self, root: str | Path, file: str | Path, several: bool = False) -> None:
        self.root, self.file = Path(root), Path(file)
        samples: dict[str, tuple[str, ...]] = {}
        named: set[str] = set()
        for where, path, value in _rows(self.file):
            plain = os.path.normpath(path or "/")  # 'a.png' of './a.png': one image has several spellings
            if plain in named:
                raise UserError(f"{where}: {path} is named a second time; put its classes into one line")
            named.add(plain)
            samples[path] = self._classes_in(value, where, several)
            if Path(plain).is_absolute() or os.pardir in Path(plain).parts[:1]:
                raise UserError(f"{where}: the path {path!r} does not lie below {self.root}; make it relative")
            if not os.path.isfile(f"{self.root}{os.sep}{path}"):  # noqa: PTH113 - a million times
                raise UserError(f"{where}: {path}: no such file below {self.root}")
        names = {name for classes in samples.values() for name in classes}
        if not samples or len(names) < 2 - several:
            raise UserError(f"{self.file}: has {len(samples)} images of {len(names)} classes; a classifier needs two")
        self.classes = sorted(sorted(names), key=int if all(map(_is_number, names)) else None)  # '01' beside '1' too
        index_of = {name: index for index, name in enumerate(self.classes)}
        labelled = ((f"{self.root}{os.sep}{path}", sorted(map(index_of.get, c))) for path, c in samples.items())
        self.samples = LabelSetList(labelled) if several else SampleList((path, label) for path, (label,) in labelled)

    @staticmethod
    def _classes_in(value: Any, where: str, several: bool) -> tuple[str, ...]:
        if several and not isinstance(value, list):
            value = str("" if value is None else value).split(BETWEEN_CLASSES)
        found = [str(name).strip() for name in (value if isinstance(value, list) else [value]) if name is not None]
        found = [name for name in dict.fromkeys(found) if name]
        if not several and len(found) != 1:
            raise UserError(f"{where}: has {len(found)} classes instead of one; for several set DATA.MULTI_LABEL True")
        return tuple(found)


def _is_number(name: str) -> bool:
    return name.isdecimal() and len(name) < 100


def _rows(file: Path) -> Iterator[tuple[str, str, Any]]:
    """Place, path and class of every row."""
    parquet = file.suffix.lower() in (".parquet", ".pq")
    try:
        yield from (_rows_of_parquet if parquet else _rows_of_csv)(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from None


def _rows_of_csv(file: Path) -> Iterator[tuple[str, str, Any]]:
    with file.open(newline="", encoding="utf-8-sig") as opened:
        rows = csv.DictReader(opened, restkey=None, strict=True)
        _check_columns(file, rows.fieldnames or [])
        for row in rows:
            where = f"{file}:{rows.line_num}"
            if row["class"] is None or None in row:
                raise UserError(f"{where}: has other fields than the header; put names with a comma in quotes")
            yield where, row["path"], row["class"]


def _rows_of_parquet(file: Path) -> Iterator[tuple[str, str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet  # imported lazily: optional
    except ImportError:
        raise UserError(f"{file}: Parquet needs pyarrow; pip install pyarrow, or write CSV") from None
    try:
        _check_columns(file, parquet.read_schema(file).names)
        table = parquet.read_table(file, columns=["path", "class"])
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from None
    for number, (path, value) in enumerate(zip(table["path"].to_pylist(), table["class"].to_pylist()), start=1):
        yield f"{file}, row {number}", str(path or ""), value


def _check_columns(file: Path, names: Sequence[str]) -> None:
    for name in ("path", "class"):
        if names.count(name) > 1:
            raise UserError(f"{file}: has {names.count(name)} columns {name}; keep one of them")
    if missing := [name for name in ("path", "class") if name not in names]:
        raise UserError(f"{file}: has no column {' and none '.join(missing)}; its columns are {', '.join(names)}")
