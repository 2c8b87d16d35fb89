"""Where labelled images come from: class folders or zip files. A source lists its samples and hands out their bytes."""

import copy
import hashlib
import os
import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from configs import UserError

from .files import (
    IMAGE_SUFFIXES,
    class_folders,
    count_suffixes,
    describe_left_out,
    files_below,
    is_companion,
    is_image_name,
    loose_files,
)

UNLABELLED = -1  # the class index of an image whose class is not known
MAX_CLASSES = 10**6  # a class index beyond is a mistake
_READERS = 16  # threads
MAX_MEMBER_BYTES = 512 * 2**20  # what a member of a zip file may unpack to


class SampleList(Sequence):
    """A list of (path, class index) in three blocks of memory.

    `labels` are the class indices, (N,) int64.

    A loader worker that reads a Python object writes to it, its count of references, and so gets a copy of its own of
    what it shares with its process: of 1.28 million tuples, hundreds of MB a worker.
    """

    def __init__(self, samples: Iterable[tuple[str, int]]) -> None:
        samples = list(samples)
        paths = [os.fsencode(path) for path, _ in samples]
        self._paths = b"".join(paths)
        self._ends = np.cumsum([0, *map(len, paths)], dtype=np.int64)
        self.labels = np.array([label for _, label in samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        self.labels[index]  # raises IndexError as a list does
        index %= len(self)
        return os.fsdecode(self._paths[self._ends[index] : self._ends[index + 1]]), self._label(index)

    def _label(self, index: int) -> Any:
        return int(self.labels[index])

    def counts(self, num_classes: int) -> list[int]:
        """The number of samples of every class."""
        return np.bincount(self.labels, minlength=num_classes).tolist()

    def renumbered(self, numbers: Sequence[int]) -> "SampleList":
        """The same samples, with numbers[i] for class index i."""
        return SampleList((path, numbers[label]) for path, label in self)

    def part(self, chosen: np.ndarray) -> "SampleList":
        """The samples that `chosen`, (N,) bool, names."""
        return type(self)(self[index] for index in np.flatnonzero(chosen))

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented


class Source(Protocol):
    """What a dataset reads from."""

    classes: list[str]  # name of every class, by class index
    samples: Sequence[tuple[str, int]]  # (path, class index) of every image
    left_out: str  # what lies there and is not read, counted in words; '' for nothing

    def read(self, index: int) -> bytes:
        """The encoded image."""
        ...


class FileSource:
    """Images that are files; `samples` and `classes` are the subclass's."""

    classes: list[str]
    samples: SampleList

    def read(self, index: int) -> bytes:
        return Path(self.samples[index][0]).read_bytes()

    def contents(self) -> np.ndarray:
        """(N, 2) int64: size in bytes, and CRC-32, of every encoded image; two zeros where it cannot be read."""

        def content(index: int) -> tuple[int, int]:
            try:
                encoded = self.read(index)
            except OSError:
                return 0, 0
            return len(encoded), zlib.crc32(encoded)

        with ThreadPoolExecutor(_READERS) as readers:  # a file server answers many at a time
            return np.array([*readers.map(content, range(len(self.samples)))], dtype=np.int64)

    def part(self, chosen: np.ndarray) -> "FileSource":
        """The source of the images that `chosen`, (N,) bool, names; the classes stay."""
        part = copy.copy(self)
        part.samples = self.samples.part(chosen)
        return part


class FolderSource(FileSource):
    """`<root>/<class>/**/*.JPEG`; classes are numbered in the order of their names, as torchvision's ImageFolder does.

    What is an image and what a class, `data.files` decides: a companion must not shift every label after it.

    Args:
        root: holds the class folders.
        gaps: let classes have no images, which is for validation.

    Raises UserError if the folder is missing or has no classes, if a class has no image, or if a folder cannot
    be read or a link leads back to it.
    """

    def __init__(self, root: str | Path, gaps: bool = False) -> None:
        self.root = Path(root)
        self.classes = class_folders(self.root)
        if not self.classes:
            raise UserError(f"{self.root}: holds no class folders; expected {self.root}/<class>/<image>")
        samples: list[tuple[str, int]] = []
        others = loose_files(self.root)
        for label, name in enumerate(self.classes):
            files = files_below(self.root / name, self.root)
            samples += ((path, label) for path in files if is_image_name(path))
            others += (path for path in files if not is_image_name(path))
        self.samples = SampleList(samples)
        self.left_out = describe_left_out(count_suffixes(others))
        counts = count_images(self)
        empty = [name for name, count in zip(self.classes, counts) if not count]
        if empty and not (gaps and any(counts)):
            raise UserError(f"{self.root}: no images ({', '.join(IMAGE_SUFFIXES)}) in class {list_names(empty)}")


class ZipSource:
    """`<split>.zip` beside `<split>_map.txt`, whose lines are: path inside the zip, tab, class index.

    Nothing is unpacked to disk: members are read by their names, into memory. A map names its images, whatever their
    suffixes; only lines that name companions (`data.files`) are passed over. Classes are called by the folders of their
    members, where each has one of its own; else by their indices.

    Args:
        root: folder that holds both files.
        split: their name, such as 'train'.
        cache_mode: what to keep in memory: 'no', 'full', or 'part' (the images of this process's share,
            every `world_size`-th `block` of samples). Encoded bytes are kept, in one array that forked loader workers
            share.
        rank, world_size: this process among all.
        block: samples that are dealt to a process at a time: 1 in training, a batch in validation.
        gaps: let class indices have no images, which is for validation.

    Raises UserError where a file is missing or the two do not agree, naming the line.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        cache_mode: str = "no",
        rank: int = 0,
        world_size: int = 1,
        block: int = 1,
        gaps: bool = False,
    ) -> None:
        self.path = Path(root) / f"{split}.zip"
        self._file: BinaryIO | None = None
        map_path = Path(root) / f"{split}_map.txt"
        for path in (self.path, map_path):
            if not path.is_file():
                raise UserError(f"{path}: no such file; --zip reads {self.path.name} and {map_path.name}")
        members = self._members()
        samples = self._read_map(map_path, members)
        self.samples = SampleList(samples)
        # What the archive says of every sample, so that no worker has to list it again: that took 0.5 GB in each.
        self._records = np.array([_record(members[name]) for name, _ in samples], dtype=np.int64)
        names = _folder_names(samples)
        del members, samples  # before the images of the cache take their memory
        labels = set(self.samples.labels.tolist())
        num_classes = max(labels) + 1
        if num_classes > MAX_CLASSES or (len(labels) < num_classes and not gaps):
            first = next(index for index in range(num_classes) if index not in labels)
            raise UserError(
                f"{map_path}: no image of class index {first}; {num_classes - len(labels)} of the {num_classes} class "
                f"indices up to the highest have none{self.left_out and '; left out: '}{self.left_out}"
            )
        self.named = bool(names)
        self.classes = [names.get(label, str(label)) for label in range(num_classes)]

        self.fill_cache(cache_mode, rank, world_size, block)

    def _members(self) -> dict[str, zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return {info.filename: info for info in archive.infolist() if not info.is_dir()}
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: not a readable zip file: {error}") from None

    def _read_map(self, map_path: Path, members: dict[str, zipfile.ZipInfo]) -> list[tuple[str, int]]:
        samples, companions = [], 0
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
            if is_companion(name):
                companions += 1
                continue
            if name not in members:
                raise UserError(f"{map_path}:{number}: {name} is not in {self.path}")
            size = max(members[name].file_size, members[name].compress_size)
            if size > MAX_MEMBER_BYTES:
                raise UserError(f"{map_path}:{number}: {name}: {size:,} bytes are too many for an image")
            samples.append((name, int(label)))
        self.left_out = f"{companions:,} lines that name hidden files or companions" if companions else ""
        if not samples:
            raise UserError(f"{map_path}: names no images{self.left_out and '; left out: '}{self.left_out}")
        return samples

    def contents(self) -> np.ndarray:
        """As that of FileSource; the archive says it."""
        return self._records[:, [_SIZE, _CRC]]

    def part(self, chosen: np.ndarray) -> "ZipSource":
        """As that of FileSource, with nothing in memory."""
        part = copy.copy(self)
        part.samples = self.samples.part(chosen)
        part._records = self._records[chosen]
        part.fill_cache("no", 0, 1)
        return part

    def fill_cache(self, cache_mode: str, rank: int, world_size: int, block: int = 1) -> None:
        """Read into memory what the arguments of the class say."""
        share = np.flatnonzero(np.arange(len(self.samples)) // block % world_size == rank)
        indices = {"no": range(0), "full": range(len(self.samples)), "part": share}[cache_mode]
        self._spans = np.full((len(self.samples), 2), -1, np.int64)  # begin and end in the cache
        self._cache = np.empty(self._records[indices, _SIZE].sum(), np.uint8)
        position = 0
        for index in indices:
            try:
                encoded = self._read_from_archive(index)
            except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
                continue  # damaged: stays out of the cache, and reading the sample raises this again
            self._cache[position : position + len(encoded)] = np.frombuffer(encoded, np.uint8)
            self._spans[index] = position, position + len(encoded)
            position += len(encoded)

    def _read_from_archive(self, index: int) -> bytes:
        """As zipfile reads a member, from what was noted of it; raises what zipfile does where it is damaged."""
        if self._file is None:
            self._file = self.path.open("rb")
        offset, packed_size, size, crc, method = map(int, self._records[index])
        if method == _UNUSUAL:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self.samples[index][0])
        # pread leaves the position alone, which processes share where the file was open before a fork.
        header = os.pread(self._file.fileno(), _LOCAL_HEADER.size, offset)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
            raise zipfile.BadZipFile("no file header where the archive has one")
        name_size, extra_size = _LOCAL_HEADER.unpack(header)[-2:]
        content = os.pread(self._file.fileno(), packed_size, offset + len(header) + name_size + extra_size)
        if method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, max(size, 1))
        if len(content) != size or zlib.crc32(content) != crc:
            raise zipfile.BadZipFile("bad CRC-32")
        return content

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def read(self, index: int) -> bytes:
        begin, end = self._spans[index]
        return self._read_from_archive(index) if begin < 0 else self._cache[begin:end].tobytes()


_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a zip member; the lengths of its name and extra field come last
_SIZE, _CRC = 2, 3  # columns of a record
_UNUSUAL = -1


def _record(info: zipfile.ZipInfo) -> tuple[int, int, int, int, int]:
    """Where a member's header is, packed size, size, CRC-32, and how it is packed: _UNUSUAL is zipfile's to read."""
    usual = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not info.flag_bits & 1  # encrypted
    method = info.compress_type if usual else _UNUSUAL
    return info.header_offset, info.compress_size, info.file_size, info.CRC, method


def _folder_names(samples: Iterable[tuple[str, int]]) -> dict[int, str]:
    """The folder of each class index, below what folders all samples share; {} where they are not one to one."""
    pairs = {(label, *name.split("/")[:-1]) for name, label in samples}
    shared = len([*takewhile(lambda names: len(set(names)) == 1, zip(*(folders for _, *folders in pairs)))])
    names = defaultdict(set)
    for label, *folders in pairs:
        names[label].add(folders[shared] if len(folders) > shared else "")
    found = {label: of_label.pop() for label, of_label in names.items() if len(of_label) == 1}
    one_to_one = len(set(found.values())) == len(names) and "" not in found.values()
    return found if one_to_one else {}


class PictureSource:
    """Unlabelled files as a source."""

    classes: list[str] = []  # noqa: RUF012 - never changed
    left_out = ""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.samples = [(str(path), UNLABELLED) for path in paths]

    def read(self, index: int) -> bytes:
        return Path(self.samples[index][0]).read_bytes()


def fingerprint(source: Source) -> str:
    """SHA-256 over the name and class index of every image, in order: tells whether a data set is still the same.

    Where it lies, and whether in folders or in a zip file with the same folders inside, makes no difference.
    """
    digest = hashlib.sha256()
    for path, label in source.samples:
        name = "/".join(path.replace(os.sep, "/").rsplit("/", 2)[-2:])
        digest.update(f"{label}\t{name}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def count_images(source: Source) -> list[int]:
    """The number of images of every class."""
    return source.samples.counts(len(source.classes))


def list_names(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
