"""Where labelled images come from: class folders or zip files. A source lists its samples and hands out their bytes."""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from configs import SPLIT_NAMES, UserError

UNLABELLED = -1  # the class index of an image whose class is not known
MAX_MEMBER_BYTES = 512 * 2**20  # what a member of a zip file may unpack to


class Source(Protocol):
    """What a dataset reads from."""

    classes: list[str]  # name of every class, by class index
    samples: list[tuple[str, int]]  # (path, class index) of every image

    def read(self, index: int) -> bytes:
        """The encoded image."""
        ...


class FolderSource:
    """`<root>/<class>/**/*.JPEG`; classes are numbered in the order of their names, as torchvision's ImageFolder does.

    Hidden folders are no classes: an editor's leftover must not shift every label after it.
    Raises UserError where the folder is missing or empty, or a class has no image.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.classes = class_folders(self.root)
        if not self.classes:
            raise UserError(f"{self.root}: holds no class folders; expected {self.root}/<class>/<image>")
        class_to_index = {name: i for i, name in enumerate(self.classes)}
        self.samples = make_dataset(str(self.root), class_to_index, IMG_EXTENSIONS, allow_empty=True)
        empty = sorted(set(self.classes) - {self.classes[label] for _, label in self.samples})
        if empty:
            raise UserError(f"{self.root}: no images ({', '.join(IMG_EXTENSIONS)}) in class {_list(empty)}")

    def read(self, index: int) -> bytes:
        return Path(self.samples[index][0]).read_bytes()


class ZipSource:
    """`<split>.zip` beside `<split>_map.txt`, whose lines are: path inside the zip, tab, class index.

    Nothing is unpacked to disk: members are read by their names, into memory.

    Args:
        root: folder that holds both files.
        split: their name, such as 'train'.
        cache_mode: what to keep in memory: 'no', 'full', or 'part' (the images of this process's share,
            `samples[rank::world_size]`). Encoded bytes are kept, in one array that forked loader workers share.
        rank, world_size: this process among all.

    Raises UserError where a file is missing or the two do not agree, naming the line.
    """

    def __init__(
        self, root: str | Path, split: str, cache_mode: str = "no", rank: int = 0, world_size: int = 1
    ) -> None:
        self.path = Path(root) / f"{split}.zip"
        self._archive: zipfile.ZipFile | None = None
        self._archive_pid = -1
        map_path = Path(root) / f"{split}_map.txt"
        for path in (self.path, map_path):
            if not path.is_file():
                raise UserError(f"{path}: no such file; --zip reads {self.path.name} and {map_path.name}")
        members = self._members()
        self.samples = self._read_map(map_path, members)
        labels = {label for _, label in self.samples}
        num_classes = max(labels) + 1
        if len(labels) < num_classes:
            first = next(index for index in range(num_classes) if index not in labels)
            raise UserError(
                f"{map_path}: no image of class index {first}; {num_classes - len(labels)} of the {num_classes} class "
                "indices up to the highest have none"
            )
        self.classes = [str(label) for label in sorted(labels)]

        cached = {"no": range(0), "full": range(len(self.samples)), "part": range(rank, len(self.samples), world_size)}
        self._cache_offsets: dict[int, tuple[int, int]] = {}
        self._cache = np.empty(0, np.uint8)
        self._fill_cache(cached[cache_mode], members)

    def _members(self) -> dict[str, int]:
        """Uncompressed size of every member."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                return {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: not a readable zip file: {error}") from None

    def _read_map(self, map_path: Path, members: dict[str, int]) -> list[tuple[str, int]]:
        samples = []
        try:
            lines = map_path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{map_path}: cannot be read: {error}") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name, tab, label = line.rpartition("\t")
            if not tab or not label.strip().isdecimal():
                raise UserError(f"{map_path}:{number}: {line!r} is not 'path inside the zip, tab, class index'")
            name = name.removeprefix("./").lstrip("/")
            if name not in members:
                raise UserError(f"{map_path}:{number}: {name} is not in {self.path}")
            if members[name] > MAX_MEMBER_BYTES:
                raise UserError(f"{map_path}:{number}: {name}: {members[name]:,} bytes are too many for an image")
            samples.append((name, int(label)))
        if not samples:
            raise UserError(f"{map_path}: names no images")
        return samples

    def _fill_cache(self, indices: Sequence[int], members: dict[str, int]) -> None:
        self._cache = np.empty(sum(members[self.samples[i][0]] for i in indices), np.uint8)
        position = 0
        for index in indices:
            try:
                encoded = self._read_from_archive(index)
            except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
                continue  # damaged: stays out of the cache, and reading the sample raises this again
            self._cache[position : position + len(encoded)] = np.frombuffer(encoded, np.uint8)
            self._cache_offsets[index] = (position, position + len(encoded))
            position += len(encoded)

    def _read_from_archive(self, index: int) -> bytes:
        # A file handle that crosses a fork shares its position with the parent, so each process opens its own.
        if self._archive is None or self._archive_pid != os.getpid():
            self._archive, self._archive_pid = zipfile.ZipFile(self.path), os.getpid()
        return self._archive.read(self.samples[index][0])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_archive": None}

    def read(self, index: int) -> bytes:
        span = self._cache_offsets.get(index)
        return self._read_from_archive(index) if span is None else self._cache[slice(*span)].tobytes()


class PictureSource:
    """Unlabelled files as a source."""

    classes: list[str] = []  # noqa: RUF012 - never changed

    def __init__(self, paths: Sequence[Path]) -> None:
        self.samples = [(str(path), UNLABELLED) for path in paths]

    def read(self, index: int) -> bytes:
        return Path(self.samples[index][0]).read_bytes()


def class_folders(root: Path) -> list[str]:
    """Names of the class folders below `root`, sorted; UserError where it is no readable folder."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if is_folder(entry) and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{root}: {error.strerror}") from None


def is_folder(entry: os.DirEntry) -> bool:
    """Whether the entry is a folder or a link to one; False for a link to itself, where `is_dir` raises."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def fingerprint(source: Source) -> str:
    """SHA-256 over the name and class index of every image, in order: tells whether a data set is still the same.

    Where it lies, and whether in folders or in a zip file with the same folders inside, makes no difference.
    """
    digest = hashlib.sha256()
    for path, label in source.samples:
        name = "/".join(path.replace(os.sep, "/").rsplit("/", 2)[-2:])
        digest.update(f"{label}\t{name}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def open_source(
    data_path: str, dataset: str, split: str, zip_mode: bool, cache_mode: str, rank: int, world_size: int
) -> Source:
    """Open `split` ('train' or 'val') of the data set below `data_path`; UserError where it is not there."""
    if not data_path:
        raise UserError("DATA.DATA_PATH is empty: give the folder of the data set with --data-path")
    root, name = Path(data_path), SPLIT_NAMES[dataset][split]
    if not root.is_dir():
        raise UserError(f"--data-path {data_path}: no such folder; give the one that holds {name}{'.zip' * zip_mode}")
    if zip_mode:
        return ZipSource(root, name, cache_mode, rank, world_size)
    if not (root / name).is_dir():
        raise UserError(f"--data-path {data_path}: has no folder {name}/{_hint(root, name)}")
    return FolderSource(root / name)


def check_same_classes(train: Sequence[str], val: Sequence[str], data_path: str) -> None:
    """Raise UserError where training and validation do not have the same classes: their indices would not agree."""
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if only_train or only_val:
        parts = [f"only in train: {_list(only_train)}"] if only_train else []
        parts += [f"only in val: {_list(only_val)}"] if only_val else []
        raise UserError(f"{data_path}: train and val differ in their classes; {'; '.join(parts)}")


def _hint(root: Path, name: str) -> str:
    """What the user may have meant."""
    if (root / f"{name}.zip").is_file():
        return f", but {name}.zip: add --zip"
    nested = root / "ILSVRC" / "Data" / "CLS-LOC"
    if (nested / name).is_dir():
        return f"; it is in {nested}"
    found = class_folders(root)
    return f"; found {_list(found)}" if found else ""


def _list(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
