"""Parquet shards as Hugging Face's hub has them: a column of images, each with bytes and path, and one of labels."""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from configs import UserError
from configs.errors import existing_file, first_line, one_line
from data.files import IMAGE_FORMATS, is_companion, is_image_name
from data.raw import find_shards

from .writing import LabelledImage, Split

BATCH = 64  # images in memory
MAX_NAME = 200  # bytes; file systems take 255, of which writing needs some
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)(?:-\w+)?\.parquet")  # some end with a hash
_WNID = re.compile(r"n\d{8}")
_CLASS_IN_NAME = re.compile(r"_n\d{8}(?=\.\w+$)")  # the hub puts ImageNet's class behind the name of the image


class Columns(NamedTuple):
    """Which columns hold what."""

    image: str  # of {bytes, path}, or of bytes alone
    label: str
    names: list[str]  # of the classes, by label; none where the shards do not say
    has_path: bool


def read_shards(root: Path) -> list[Split]:
    """The splits of the shards below `root`; UserError where they cannot be read, or one is missing."""
    shards = find_shards(root)
    if not shards:
        raise UserError(f"{root}: holds no Parquet files of train and validation, such as train-00000-of-00257.parquet")
    for paths in shards.values():
        _check_complete(paths)
    columns = _columns(next(iter(shards.values()))[0])
    listed = {split: [_rows(path, columns) for path in paths] for split, paths in shards.items()}
    classes = _class_folders(columns, [row for of_split in listed.values() for rows in of_split for row in rows])
    splits = []
    for split in sorted(shards, key="val train".index):
        names = _names(listed[split], classes)
        counts = Counter(name.partition("/")[0] for of_shard in names for name in of_shard)
        images = partial(_images, shards[split], names, columns)
        splits.append(Split(split, sorted(classes.values()), images, counts, "the labels of the shards"))
    return splits


def _open(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        requirements = existing_file("requirements-extras.txt")
        install = f"-r {requirements}" if requirements else "pyarrow"
        raise UserError(f"{path}: pyarrow is needed to read it; pip install {install}") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except Exception as error:
        raise UserError(f"{path}: not a whole Parquet file: {first_line(error)}; download it again") from None


def _check_complete(paths: list[Path]) -> None:
    """The names of shards say how many there are."""
    found = [match for path in paths if (match := _SHARD.fullmatch(path.name))]
    for prefix, total in {(match[1], int(match[3])) for match in found}:
        there = {int(match[2]) for match in found if match[1] == prefix}
        if missing := [number for number in range(total) if number not in there]:
            raise UserError(
                f"{paths[0].parent}: {len(missing)} of {total} shards of {prefix} are missing, the first is number "
                f"{missing[0]}; download them"
            )


def _columns(path: Path) -> Columns:
    schema = _open(path).schema_arrow
    metadata = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(metadata)["info"]["features"] if metadata else {}
        kinds = {name: entry.get("_type") for name, entry in features.items() if isinstance(entry, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        features, kinds = {}, {}
    image = next((name for name, kind in kinds.items() if kind == "Image"), "image")
    label = next((name for name, kind in kinds.items() if kind == "ClassLabel"), "label")
    _check_columns(path, schema.names, image, label)
    fields = {field.name for field in schema.field(image).type} if schema.field(image).type.num_fields else set()
    names = features.get(label, {}).get("names") or []
    return Columns(image, label, [str(name) for name in names], "path" in fields)


def _check_columns(path: Path, there: list[str], *wanted: str) -> None:
    if lacking := [name for name in wanted if name not in there]:
        raise UserError(f"{path}: has no column {lacking[0]!r}, only {', '.join(there)}")


def _rows(path: Path, columns: Columns) -> list[tuple[str, int]]:
    """The path ('' for none) and label of each image, without reading the images."""
    wanted = [f"{columns.image}.path", columns.label] if columns.has_path else [columns.label]
    shard = _open(path)
    _check_columns(path, shard.schema_arrow.names, columns.image, columns.label)
    try:
        table = shard.read(wanted).to_pydict()
        labels = [-1 if label is None else int(label) for label in table[columns.label]]
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    if min(labels, default=0) < 0:
        raise UserError(f"{path}: has images without a label (-1 or none): not a split to train or validate on")
    entries = table[columns.image] if columns.has_path else [None] * len(labels)
    return [((entry or {}).get("path") or "", label) for entry, label in zip(entries, labels)]


def _class_folders(columns: Columns, rows: list[tuple[str, int]]) -> dict[int, str]:
    """A folder for each label: the WordNet id where all paths have one, else the class's name, else its number."""
    labels = sorted({label for _, label in rows} | set(range(len(columns.names))))
    wnids = {(label, match[0] if (match := _WNID.search(path)) else "") for path, label in rows}
    by_label = dict(wnids)
    if len(by_label) == len(wnids) == len(set(by_label.values())) and "" not in by_label.values():
        return by_label
    if len(columns.names) == len(labels):
        names = [name.replace("/", "_").replace("\\", "_").strip() for name in columns.names]
        differ = len({name.lower() for name in names}) == len(names)
        if differ and all(map(_is_file_name, names)):
            return dict(enumerate(names))
    digits = len(str(labels[-1] if labels else 0))
    return {label: f"{label:0{digits}d}" for label in labels}


def _is_file_name(name: str) -> bool:
    """Whether a file or folder may have this name, and is read then. '..' would lead out of the folder."""
    fits = 0 < len(os.fsencode(name)) <= MAX_NAME and min(name) >= " "
    return fits and name not in (".", "..") and not is_companion(name)


def _names(shards: list[list[tuple[str, int]]], classes: dict[int, str]) -> list[list[str]]:
    """'<class>/<file>' of every image; the file's name where none other of its class has it, else a number."""
    every = [row for rows in shards for row in rows]
    rows = [(classes[label], _CLASS_IN_NAME.sub("", PurePosixPath(path).name)) for path, label in every]
    times = Counter(rows)
    names = iter(
        f"{folder}/{file if _is_file_name(file) and times[folder, file] == 1 else f'{number:08d}'}"
        for number, (folder, file) in enumerate(rows)
    )
    return [[next(names) for _ in rows] for rows in shards]


def _images(paths: list[Path], names: list[list[str]], columns: Columns) -> Iterator[LabelledImage]:
    """The images, in order; what has no suffix of an image gets one by its content."""
    for path, of_shard in zip(paths, names):
        try:
            batches = _open(path).iter_batches(BATCH, columns=[columns.image])
            entries = (entry for batch in batches for entry in batch.column(0).to_pylist())
            for number, (name, entry) in enumerate(zip(of_shard, entries, strict=True)):
                content = entry["bytes"] if isinstance(entry, dict) else entry
                if not isinstance(content, bytes) or not content:
                    raise UserError(f"{path}: row {number} holds no image; download shards that hold the images' bytes")
                if not is_image_name(name):
                    name += _suffix(path, number, content)
                yield LabelledImage(name, partial(bytes, content))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path}: cannot be read: {first_line(error)}; download it again") from None


def _suffix(path: Path, number: int, content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            return f".{image.format.lower()}"
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise UserError(f"{path}: row {number} is no image that can be read: {one_line(error)}") from None
