"""Labelled images written as class folders or as a zip file of them: continued after a kill, and whole or not there."""

import contextlib
import fcntl
import os
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol
from zipfile import BadZipFile, ZipFile, ZipInfo

from tqdm import tqdm

from configs import UserError
from configs.errors import one_line
from data.files import class_folders, files_below
from data.sources import list_names
from utils.files import write_file


class LabelledImage(NamedTuple):
    """An image of a source."""

    name: str  # '<class>/<file>', '/' below the class as well
    read: Callable[[], bytes]
    path: Path | None = None  # where it is a file of its own, which a link can lead to


@dataclass(frozen=True)
class Split:
    """What a source has for training or validation."""

    name: str  # 'train' or 'val'
    classes: Sequence[str]  # of the whole data set, sorted
    images: Callable[[], Iterator[LabelledImage]]
    counts: Mapping[str, int] | None  # images of each class, where the source says so
    said_by: str = ""  # what says so
    folders: Mapping[str, Path] = field(default_factory=dict)  # of classes, each with all images of its class


class Target(Protocol):
    """Where a split is written."""

    final: Path  # is there once all is written

    def classes(self) -> set[str]: ...  # of what is there in the final place
    def open(self, links: bool) -> None: ...
    def has(self, name: str) -> bool: ...
    def write(self, name: str, content: bytes) -> None: ...
    def names(self) -> list[str]: ...
    def finish(self, classes: Sequence[str]) -> None: ...


class FolderTarget:
    """`<out>/<split>/<class>/<file>`, written to `<out>/.<split>.partial` until all is there."""

    def __init__(self, out: Path, split: str) -> None:
        self.final, self.partial = out / split, out / f".{split}.partial"

    def classes(self) -> set[str]:
        return set(class_folders(self.final))

    def open(self, links: bool) -> None:
        """UserError where an earlier start copied and this one links, or the other way: one would write to the other's
        files, which for links are the source's."""
        self.partial.mkdir(parents=True, exist_ok=True)
        if (not links) in map(_is_linked, self.partial.iterdir()):
            kind = "copies" if links else "links"
            raise UserError(f"{self.partial}: holds {kind} of an earlier start; remove it, and start again")

    def has(self, name: str) -> bool:
        path = self.partial / name
        return path.exists() and path.stat().st_size > 0

    def write(self, name: str, content: bytes) -> None:
        write_file(content, self.partial / name)  # whole or not at all

    def link(self, name: str, source: Path) -> None:
        """A symbolic link to a file or a folder of the source."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of a source that has moved
        path.symlink_to(source.resolve())

    def names(self) -> list[str]:
        folders = class_folders(self.partial)
        paths = [path for name in folders for path in files_below(self.partial / name, self.partial)]
        return [Path(path).relative_to(self.partial).as_posix() for path in paths]

    def finish(self, classes: Sequence[str]) -> None:
        os.replace(self.partial, self.final)


def _is_linked(folder: Path) -> bool | None:
    """Whether a class is there by links: to its folder, or to its files; None where nothing of it is there yet."""
    if folder.is_symlink():
        return True
    below = (Path(above, name) for above, _, names in os.walk(folder) for name in names)
    first = next(below, None)
    return None if first is None else first.is_symlink()


class ZipTarget:
    """`<out>/<split>.zip` and `<split>_map.txt`, for --zip. After a kill, the zip file goes on behind its last member.

    A killed zip file has no directory yet. Its members have headers of their own, which tell what is whole.
    """

    def __init__(self, out: Path, split: str) -> None:
        self.final, self.map = out / f"{split}.zip", out / f"{split}_map.txt"
        self.partial = out / f".{split}.zip.partial"

    def classes(self) -> set[str]:
        try:
            with ZipFile(self.final) as archive:
                return {name.partition("/")[0] for name in archive.namelist()}
        except (OSError, BadZipFile) as error:
            raise UserError(f"{self.final}: not a readable zip file: {one_line(error)}; remove it") from None

    def open(self, links: bool) -> None:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        if self.map.exists() and not self.partial.exists():
            raise UserError(f"{self.map}: is there already, without {self.final.name}; choose another --out")
        file = open(self.partial, "r+b" if self.partial.exists() else "w+b")  # noqa: SIM115 - closed by `finish`
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.partial}: another process is writing it; wait for its end") from None
        members = list(_whole_members(file))
        file.truncate(file.tell())
        self.file, self.archive = file, ZipFile(file, "w")  # begins where the file stands, and truncates nothing
        self.archive.filelist += members
        self.archive.NameToInfo |= {member.filename: member for member in members}

    def has(self, name: str) -> bool:
        return name in self.archive.NameToInfo

    def write(self, name: str, content: bytes) -> None:
        if "\n" in name or "\r" in name:
            raise UserError(f"{name!r}: has a line break in its name, which map files cannot hold; rename it")
        try:
            self.archive.writestr(ZipInfo(name), content)  # as it is: images are compressed already
        except UnicodeEncodeError:
            raise UserError(f"{name!r}: not a name in UTF-8, which map files need; rename it") from None
        except OSError as error:
            raise self._given_up(error) from None

    def _given_up(self, error: OSError) -> UserError:
        self.archive.fp = None  # else it writes its directory when it is thrown away, which fails again
        with contextlib.suppress(OSError):
            self.file.close()
        return UserError(f"{self.partial}: cannot be written: {one_line(error)}")

    def names(self) -> list[str]:
        return self.archive.namelist()

    def finish(self, classes: Sequence[str]) -> None:
        index_of = {name: index for index, name in enumerate(classes)}
        # In the order that class folders are read in: a run may go on with either.
        names = sorted(self.names(), key=lambda name: (name.split("/")[0], *name.rpartition("/")))
        lines = "".join(f"{name}\t{index_of[name.split('/')[0]]}\n" for name in names)
        try:
            self.archive.close()
            self.file.close()
        except OSError as error:
            raise self._given_up(error) from None
        write_file(lines.encode(), self.map)
        os.replace(self.partial, self.final)


_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def _whole_members(file: BinaryIO) -> Iterator[ZipInfo]:
    """The members of an unfinished zip file that are written whole. The file then stands behind the last of them."""
    size = file.seek(0, os.SEEK_END)
    found: list[tuple[ZipInfo, int]] = []
    end = 0
    while len(header := os.pread(file.fileno(), _LOCAL_HEADER.size, end)) == _LOCAL_HEADER.size:
        magic, _, flags, _, _, _, crc, packed, unpacked, name_size, extra_size = _LOCAL_HEADER.unpack(header)
        begin = end + _LOCAL_HEADER.size + name_size + extra_size
        # The sizes are filled in once the content is there.
        if magic != b"PK\3\4" or not packed or packed != unpacked or begin + packed > size:
            break
        member = ZipInfo(os.pread(file.fileno(), name_size, end + _LOCAL_HEADER.size).decode())
        member.header_offset, member.flag_bits, member.external_attr = end, flags, 0o600 << 16  # zipfile's own
        member.CRC, member.compress_size, member.file_size = crc, packed, unpacked
        found.append((member, begin))
        end = begin + packed
    if found:
        last, begin = found[-1]
        if zlib.crc32(os.pread(file.fileno(), last.file_size, begin)) != last.CRC:
            found.pop()
            end = last.header_offset
    file.seek(end)
    return (member for member, _ in found)


def write_split(split: Split, target: Target, links: bool = False, allow_missing: bool = False) -> str:
    """Write the images of a split that are not there yet; returns what was done, for the log.

    Args:
        split: what to write.
        target: where to.
        links: link to the source's files, or to its class folders, instead of copying.
        allow_missing: take what is there where the source has fewer images than it should have.

    Raises UserError where the source is damaged or its counts are wrong. What was written then stays, unfinished, and
    the next call goes on.
    """
    if target.final.exists():
        there = target.classes()
        if not there or there - set(split.classes):
            what = list_names(sorted(there - set(split.classes))) or "no class"
            raise UserError(f"{target.final}: is there already, and holds {what}; choose another --out")
        return f"{target.final}: is there already, left as it is"
    try:
        target.open(links)
    except OSError as error:
        raise UserError(f"{target.final}: cannot be written: {one_line(error)}") from None
    if links:
        for name, folder in split.folders.items():
            if not target.has(name):
                target.link(name, folder)
    names: set[str] = set()
    written = 0
    total = None if split.counts is None else sum(split.counts.values())
    with tqdm(desc=split.name, total=total, unit="image", disable=not sys.stderr.isatty()) as bar:
        for image in split.images():
            if image.name in names:
                raise UserError(f"{image.name}: is twice in the source")
            names.add(image.name)
            # A class that is a link to its folder has all its images. What is written there changes the source.
            by_folder = links and image.name.partition("/")[0] in split.folders
            if not by_folder and not target.has(image.name):
                if links:
                    target.link(image.name, image.path)
                else:
                    target.write(image.name, image.read())
                written += 1
            bar.update()
    note = _check_counts(split, names, allow_missing)
    if surplus := sorted(set(target.names()) - names):
        raise UserError(
            f"{target.partial}: holds {len(surplus)} files that are not of this source and these settings, such as "
            f"{surplus[0]}; remove it, and start again"
        )
    target.finish(split.classes)
    before = f", {len(names) - written:,} of them from before" if written < len(names) and not links else ""
    return f"{target.final}: {len(names):,} images of {len(_count(names))} classes{before}{note}"


def _count(names: set[str]) -> Counter[str]:
    return Counter(name.partition("/")[0] for name in names)


def _check_counts(split: Split, names: set[str], allow_missing: bool) -> str:
    """Compare what was found with what should be there; '' where it is the same, or what to add to the log."""
    found = _count(names)
    if unknown := sorted(found.keys() - set(split.classes)):
        raise UserError(f"{split.name}: {list_names(unknown)}: not among the data set's {len(split.classes)} classes")
    if not names:
        raise UserError(f"{split.name}: the source holds no images")
    if split.counts is None or found == Counter(split.counts):
        return ""
    wrong = [name for name in sorted(split.counts) if found[name] != split.counts[name]]
    first = wrong[0] if wrong else sorted(found.keys() - split.counts.keys())[0]
    what = (
        f"{split.name}: {len(names):,} images instead of {sum(split.counts.values()):,}, by {split.said_by}: "
        f"{found[first]} of {first} instead of {split.counts.get(first, 0)}"
    )
    what += f", and {len(wrong) - 1} other classes" * (len(wrong) > 1)
    if allow_missing:
        return f"; {what}"
    raise UserError(f"{what}; get the source again, or take what is there with --allow-missing")
