"""Files that are there whole or not at all, and numbers as JSON."""

import contextlib
import csv
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from configs import UserError
from configs.errors import one_line

STDOUT = "-"  # what --json takes for standard output


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary name to write to: it replaces `path` at the end of the block, or is removed where that fails.

    A pipe or a device, such as /dev/null, is written to as it is: it must not be replaced by a file.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file whole or not at all."""
    with (
        atomic_write(path) as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_file(content: bytes, path: Path) -> None:
    """Write bytes to a new file whole or not at all, making its folder; UserError where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def write_json(target: str, content: Any) -> None:
    """Write JSON to a file, or to standard output for '-'. Numbers that are not finite become null.

    Raises UserError where the file cannot be written.
    """
    text = json.dumps(finite_numbers(content), indent=2, allow_nan=False) + "\n"
    if target == STDOUT:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        with atomic_write(Path(target)) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from None


def check_json_target(target: str | None) -> None:
    """Raise UserError where --json could not be written: found out now rather than after an hour."""
    if target not in (None, STDOUT):
        check_target(Path(target), "--json")


def check_target(path: Path, flag: str) -> None:
    """Raise UserError where a file that a flag names could not be written; leaves nothing behind."""
    try:
        special = path.exists() and not path.is_file()  # a pipe or a device, which may wait for a reader when opened
        if path.is_dir() or (special and not os.access(path, os.W_OK)):
            raise OSError("a folder, or not to be written to")
        if not special:
            _try(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: cannot be written: {one_line(error)}") from None


def _try(path: Path) -> None:
    """Make and remove an empty file, whose name is as long as that of `atomic_write`'s at least."""
    probe = path.with_name(f".{path.name}.checking")
    probe.touch()
    probe.unlink()


def check_folder(folder: Path, name: str = "x") -> None:
    """Raise UserError where a file could not be written to a folder that need not exist yet; leaves nothing behind."""
    missing: list[Path] = []
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        _try(folder / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {one_line(error)}; name another folder") from None
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def finite_numbers(value: Any) -> Any:
    """The same nested value, with null for numbers that are not finite, which JSON has no name for."""
    if isinstance(value, dict):
        return {key: finite_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
