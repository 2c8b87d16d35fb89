"""Inspect a data set before a long run: every file is read, hashed and decoded as training would decode it.

    python -m data.check --data-path DIR [--dataset imagenet_21k] [--zip] [--workers N] [--strict]
                         [--report FILE] [--manifest FILE] [--json FILE]

Exit status: 0 nothing that would harm training or evaluation, 1 something would (with --strict: anything found at all),
2 wrong use. The report lists errors first, then warnings, then what is merely unusual; `--report` and `--json` hold
every line of it. The manifest has one line an image, sorted by path: path, size in bytes, SHA-256, class index, with
tabs between. The fingerprint printed at the end is a hash of the manifest: same fingerprint, same data.
"""

import argparse
import codecs
import contextlib
import difflib
import errno
import gc
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import stat
import statistics
import sys
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import NamedTuple, NoReturn

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from configs import UserError

from .datasets import decode_image
from .sources import SPLIT_NAMES, fingerprint, open_source

ERROR, WARNING, NOTE = "error", "warning", "note"
LEVEL_TITLES = {
    ERROR: "ERRORS: these harm training or evaluation",
    WARNING: "WARNINGS",
    NOTE: "UNUSUAL, for information",
}

# kind -> (level, what it means), in the order of the report
KINDS = {
    "split": (ERROR, "split missing or misnamed"),
    "no-classes": (ERROR, "split without classes"),
    "class": (ERROR, "class in one split only"),
    "empty-class": (ERROR, "class without images"),
    "map-line": (ERROR, "line of a map file that is wrong"),
    "unread-image": (ERROR, "image that training does not read"),
    "broken-link": (ERROR, "symbolic link to nothing"),
    "link-loop": (ERROR, "symbolic link that leads back"),
    "unreadable": (ERROR, "file or folder that cannot be read"),
    "special-file": (ERROR, "pipe, socket or device"),
    "zero-byte": (ERROR, "empty file"),
    "text": (ERROR, "text instead of an image"),
    "header-only": (ERROR, "header without pixels"),
    "truncated": (ERROR, "image that ends too early"),
    "corrupt": (ERROR, "file that does not decode"),
    "bomb": (ERROR, "file that decodes to too much"),
    "crash": (ERROR, "file that ends or blocks the process that decodes it"),
    "train-and-val": (ERROR, "file that is in both train and val"),
    "duplicate": (WARNING, "file that occurs twice in a split"),
    "hidden": (WARNING, "hidden file or folder"),
    "not-image": (WARNING, "file that is no image; training does not read it"),
    "extra": (WARNING, "folder or zip file that belongs to no split"),
    "unlisted": (WARNING, "file in the zip that the map does not name"),
    "large": (WARNING, "image of very many pixels"),
    "cmyk": (NOTE, "CMYK"),
    "deep": (NOTE, "more than 8 bits a channel"),
    "palette": (NOTE, "palette"),
    "alpha": (NOTE, "alpha channel or transparent colour, which training drops"),
    "exif-orientation": (NOTE, "EXIF orientation, which training ignores"),
    "other-format": (NOTE, "format other than the suffix says"),
}
LINES_PER_KIND = 10  # on the console

MAX_FILE_BYTES = 512 * 2**20  # larger files are named, not read
WORKER_MEMORY_BYTES = 4 * 2**30  # that a process may take for decoding; Pillow's own limit on pixels comes first
SECONDS_PER_FILE = 120  # then the process that reads it is ended, and replaced
ATTEMPTS = 2  # a file is blamed only if a second process dies of it too: the first may have been killed from outside
FILES_PER_MESSAGE = 16
RESIZED_SHORT_SIDE = 256  # pixels; what validation resizes to

ORIENTATION_TAG = 0x0112
PNG_BIT_DEPTH_AT = 24  # byte offset
MAGIC_NUMBERS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")


class Problem(NamedTuple):
    kind: str  # key of KINDS
    path: str  # below the data path
    reason: str


class File(NamedTuple):
    """One file to inspect. `label` is None for one that training passes over: all there is to ask is what it is."""

    path: str  # below the data path, '/' between; members of train.zip as train.zip/<member>
    split: str  # 'train' or 'val'
    label: int | None


class Inspection(NamedTuple):
    """What was found in one file: `digest` is b'' where it was not read, `mode` '' where it was not decoded."""

    size: int  # bytes, -1 where unknown
    digest: bytes  # SHA-256
    mode: str  # Pillow's, such as 'RGB'
    findings: tuple[tuple[str, str], ...]  # (kind, reason)


@dataclass
class Split:
    name: str  # of its folder or zip file on disk
    classes: list[str]
    fingerprint: str  # of paths and classes alone: what training notes in its checkpoints
    class_sizes: list[int]
    num_bytes: int = 0


@dataclass
class Listing:
    """What there is to inspect, and what is wrong with it already by its names."""

    files: list[File] = field(default_factory=list)
    splits: dict[str, Split] = field(default_factory=dict)
    archives: dict[str, zipfile.ZipFile] = field(default_factory=dict)  # by name below the data path
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Report:
    """The result of a check; `problems` are in the order of the report."""

    data_path: str
    dataset: str
    zipped: bool
    splits: dict[str, Split]
    modes: dict[str, int]  # number of images of each of Pillow's modes
    problems: list[Problem]
    manifest: str
    fingerprint: str

    def count(self, level: str) -> int:
        return sum(KINDS[problem.kind][0] == level for problem in self.problems)

    def exit_code(self, strict: bool) -> int:
        return int(bool(self.problems if strict else self.count(ERROR)))


# -------------------------------------------------------------------------------------------------------------- listing


def list_folders(root: Path, dataset: str) -> Listing:
    """The files of `<root>/<split>/<class>/`, by the rules of FolderSource; unlike there, a link loop has an end."""
    listing = Listing()
    names = SPLIT_NAMES[dataset]
    entries = _scan(root, "", listing)
    _note_hidden(entries, "", "", listing)
    folders = [entry.name for entry in entries if _is_folder(entry) and not entry.name.startswith(".")]
    _name_missing(listing, names, folders, lambda split: _why_missing(root, dataset, split))
    for split, name in names.items():
        if name in folders:
            _list_split(root, split, name, listing)
    _compare_classes(listing)
    return listing


def _list_split(root: Path, split: str, name: str, listing: Listing) -> None:
    classes, loose = [], 0
    entries = _scan(root / name, name, listing)
    _note_hidden(entries, f"{name}/", ", which training does not read", listing)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            classes.append(entry.name)
        else:
            listing.files.append(File(f"{name}/{entry.name}", split, None))
            loose += entry.name.lower().endswith(IMG_EXTENSIONS)
    if not classes:
        flat = f"; {loose} images lie directly in it: sort them into class folders" if loose else ""
        listing.problems.append(Problem("no-classes", name, f"expected {name}/<class>/<image>{flat}"))
    above = {_identity(root), _identity(root / name)}
    samples: list[tuple[str, int]] = []
    sizes = []
    for label, folder in enumerate(tqdm(classes, desc=f"listing {name}", unit="class", disable=None, leave=False)):
        images, others = _list_class(root / name / folder, f"{name}/{folder}", set(above), listing)
        if not images:
            reason = f"no file with the suffix of an image ({', '.join(IMG_EXTENSIONS)})"
            listing.problems.append(Problem("empty-class", f"{name}/{folder}", reason))
        listing.files += [File(path, split, label) for path in images]
        listing.files += [File(path, split, None) for path in others]
        samples += [(path.removeprefix(f"{name}/"), label) for path in images]
        sizes.append(len(images))
    listing.splits[split] = Split(name, classes, _fingerprint(samples), sizes)


def _list_class(folder: Path, path: str, seen: set[tuple[int, int]], listing: Listing) -> tuple[list[str], list[str]]:
    """Paths of the images below a class folder, in the order of FolderSource, and of all other visible files."""
    images, others = [], []
    pending = [(folder, path)]
    while pending:
        folder, path = pending.pop()
        # A folder that was seen in this class would be listed without end, or at least count its images twice.
        identity = _identity(folder)
        if identity in seen:
            reason = f"leads to {_target(folder)}, which is listed already; training would read it again and again"
            listing.problems.append(Problem("link-loop", path, reason))
            continue
        seen.add(identity)
        entries = _scan(folder, path, listing)
        _note_hidden(entries, f"{path}/", ", which training reads all the same if the suffix is an image's", listing)
        for entry in entries:
            below = f"{path}/{entry.name}"
            if _is_folder(entry):
                # Links last, so that of two ways to a folder it is the link that is reported.
                pending.insert(0 if entry.is_symlink() else len(pending), (folder / entry.name, below))
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                images.append(below)
            elif not entry.name.startswith("."):
                others.append(below)
    return sorted(images, key=os.path.split), others


def list_zips(root: Path, dataset: str) -> Listing:
    """The members of `<root>/<split>.zip` that `<split>_map.txt` names, by the same rules as ZipSource."""
    listing = Listing()
    names = SPLIT_NAMES[dataset]
    entries = _scan(root, "", listing)
    _note_hidden(entries, "", "", listing)
    present = {entry.name for entry in entries}
    zipped = [name.removesuffix(".zip") for name in sorted(present) if name.endswith(".zip") and name[0] != "."]

    def why_missing(split: str) -> str:
        folder = f"; there is a folder {names[split]}: leave out --zip" if names[split] in present else ""
        return f"no such file; --zip reads {names[split]}.zip and {names[split]}_map.txt{folder}"

    _name_missing(listing, names, zipped, why_missing, suffix=".zip")
    for split, name in names.items():
        if name not in zipped:
            continue
        try:
            archive = zipfile.ZipFile(root / f"{name}.zip")
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            listing.problems.append(Problem("corrupt", f"{name}.zip", f"not a readable zip file: {_one_line(error)}"))
            continue
        listing.archives[f"{name}.zip"] = archive
        try:
            lines = (root / f"{name}_map.txt").read_text("utf-8-sig", errors="surrogateescape").split("\n")
        except OSError as error:
            reason = f"{_one_line(error)}; one line an image: path inside the zip, tab, class index"
            listing.problems.append(Problem("split", f"{name}_map.txt", reason))
            continue
        _read_map(lines, split, name, archive, listing)
    _compare_classes(listing)
    return listing


def _read_map(lines: list[str], split: str, name: str, archive: zipfile.ZipFile, listing: Listing) -> None:
    members = {info.filename for info in archive.infolist() if not info.is_dir()}
    samples: list[tuple[str, int]] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        member, tab, label = line.rpartition("\t")
        member = member.removeprefix("./").lstrip("/")
        reason = ""
        if not tab or not label.strip().isdecimal():
            reason = f"{line!r} is not 'path inside the zip, tab, class index'"
        elif member not in members:
            reason = f"{member} is not in {name}.zip"
        else:
            samples.append((member, int(label)))
            if member in first_line:
                reason = f"{member} was named in line {first_line[member]} already, and counts twice"
            first_line.setdefault(member, number)
        if reason:
            listing.problems.append(Problem("map-line", f"{name}_map.txt:{number}", reason))
    if not samples:
        listing.problems.append(Problem("no-classes", f"{name}_map.txt", "names no image of the zip file"))
    sizes = Counter(label for _, label in samples)
    for previous, label in pairwise([-1, *sorted(sizes)]):
        if label > previous + 1:  # by ranges: one label may be wrong by millions
            gap = f"{previous + 1}" + (f" to {label - 1}" if label > previous + 2 else "")
            listing.problems.append(Problem("empty-class", f"{name}_map.txt", f"no image of class index {gap}"))
    listing.problems += [
        Problem("unlisted", f"{name}.zip/{member}", "training does not read it")
        for member in sorted(members - set(first_line))
    ]
    listing.files += [File(f"{name}.zip/{member}", split, label) for member, label in samples]
    classes = [str(label) for label in sorted(sizes)]
    listing.splits[split] = Split(name, classes, _fingerprint(samples), [sizes[label] for label in sorted(sizes)])


def _name_missing(listing: Listing, names: dict[str, str], found: list[str], why_missing, suffix: str = "") -> None:
    """Report the splits that are not in `found`, under the name they may have instead, and whatever else is there."""
    others = [name for name in found if name not in names.values()]
    for split, name in names.items():
        if name in found:
            continue
        similar = [other for other in others if split in other.lower() or difflib.get_close_matches(name, [other])]
        reason = why_missing(split)
        if similar:
            reason += f"; misnamed? rename {similar[0]}{suffix} to {name}{suffix}"
            others.remove(similar[0])
        listing.problems.append(Problem("split", name + suffix, reason))
    expected = " and ".join(name + suffix for name in names.values())
    listing.problems += [Problem("extra", other + suffix, f"only {expected} are read") for other in others]


def _why_missing(root: Path, dataset: str, split: str) -> str:
    try:
        open_source(str(root), dataset, split, zip_mode=False, cache_mode="no", rank=0, world_size=1)
    except UserError as error:
        return error.one_line().removeprefix(f"--data-path {root}: ")
    return "was not there a moment ago"


def _fingerprint(samples: list[tuple[str, int]]) -> str:
    """The fingerprint of a source with these samples, (path, class index) each."""
    # Names that are not valid UTF-8 are odd, and no reason to stop here.
    named = [(os.fsencode(path).decode(errors="replace"), label) for path, label in samples]
    return fingerprint(SimpleNamespace(samples=named))


def _compare_classes(listing: Listing) -> None:
    if len(listing.splits) < 2:
        return
    train, val = listing.splits["train"], listing.splits["val"]
    for here, there in ((train, val), (val, train)):
        for name in sorted(set(here.classes) - set(there.classes)):
            reason = f"not in {there.name}; class indices of the two splits do not agree"
            listing.problems.append(Problem("class", f"{here.name}/{name}", reason))


def _note_hidden(entries: list[os.DirEntry], prefix: str, consequence: str, listing: Listing) -> None:
    for entry in entries:
        if entry.name.startswith("."):
            what = "folder" if _is_folder(entry) else "file"
            listing.problems.append(Problem("hidden", prefix + entry.name, f"hidden {what}{consequence}"))


def _scan(folder: Path, path: str, listing: Listing) -> list[os.DirEntry]:
    """The entries of a folder by name; where it cannot be read, none and a problem."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        listing.problems.append(Problem("unreadable", path or ".", _one_line(error)))
        return []


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether the entry is a folder or a link to one; False for a link to itself, where `is_dir` raises."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _target(link: Path) -> str:
    return str(link.readlink() if link.is_symlink() else link)


# -------------------------------------------------------------------------------------------------- inspecting one file


def inspect_file(root: Path, file: File, archives: dict[str, zipfile.ZipFile]) -> Inspection:
    """Read, hash and decode one file. Never raises: what goes wrong is a finding."""
    if file.label is None:
        return Inspection(-1, b"", "", (_inspect_stray(root / file.path, file.path.count("/") > 1),))
    container, _, member = file.path.partition("/")
    location, size = root / file.path, -1
    try:
        if container in archives:
            info = archives[container].getinfo(member)
            size = info.file_size  # zipfile reads no further, whatever the compressed data would go on to
        else:
            size = _regular_size(location)
        if size > MAX_FILE_BYTES:
            return Inspection(size, b"", "", (("bomb", f"{size:,} bytes, more than {MAX_FILE_BYTES:,}; not read"),))
        encoded = archives[container].read(info) if container in archives else location.read_bytes()
        digest = hashlib.sha256(encoded).digest()
    except OSError as error:
        return Inspection(size, b"", "", (_why_unreadable(location, error),))
    except MemoryError:
        return Inspection(size, b"", "", (("bomb", f"{size:,} bytes, more than there is memory for"),))
    except Exception as error:  # of zipfile and zlib: damaged, encrypted or oddly compressed members
        return Inspection(size, b"", "", (("corrupt", _one_line(error)),))
    mode, findings = inspect_image(encoded, file.path, file.split == "val")
    return Inspection(len(encoded), digest, mode, tuple(findings))


def _inspect_stray(location: Path, in_class: bool) -> tuple[str, str]:
    """The finding about a file that training passes over; worse if it is an image."""
    try:
        _regular_size(location)
        location.open("rb").close()
    except OSError as error:
        kind, reason = _why_unreadable(location, error)
        return "not-image" if kind == "special-file" else kind, reason
    try:
        with Image.open(location) as image:
            what = f"{image.format} of {image.width} x {image.height}"
    except Image.DecompressionBombError:
        what = "image of very many pixels"
    except Exception:  # Pillow's plugins raise nearly anything on files that are no images
        return "not-image", "unknown suffix" if in_class else "in no class folder"
    return "unread-image", f"{what}, but {'the suffix is not one of an image' if in_class else 'in no class folder'}"


def _regular_size(location: Path) -> int:
    """Bytes of a regular file; OSError where it is anything else, since reading it may never end."""
    status = location.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.ENOTSUP, "not a regular file: reading it may never end")
    return status.st_size


def _why_unreadable(location: Path, error: OSError) -> tuple[str, str]:
    if error.errno == errno.ELOOP:
        return "link-loop", f"leads to {_target(location)}: {_one_line(error)}"
    if location.is_symlink() and not location.exists():
        return "broken-link", f"leads to {_target(location)}, which is not there"
    return "special-file" if error.errno == errno.ENOTSUP else "unreadable", _one_line(error)


def inspect_image(encoded: bytes, path: str, is_val: bool) -> tuple[str, list[tuple[str, str]]]:
    """Decode one image as training does.

    Args:
        encoded: the whole file.
        path: its path; only the suffix matters.
        is_val: whether validation resizes it, which makes an elongated image enormous.

    Returns:
        Pillow's mode ('' where it does not decode) and the findings, (kind, reason) each.
    """
    if not encoded:
        return "", [("zero-byte", "0 bytes")]
    findings: list[tuple[str, str]] = []
    opened = False
    try:
        with Image.open(BytesIO(encoded)) as image:  # the header alone; raises before memory is taken for a bomb
            opened, mode = True, image.mode
            findings += _unusual(image, encoded, path, is_val)
        decode_image(encoded)
        return mode, findings
    except Image.DecompressionBombError as error:
        return "", [("bomb", _one_line(error))]
    except MemoryError:
        return "", [("bomb", f"needs more than {WORKER_MEMORY_BYTES:,} bytes of memory to decode")]
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        return "", [_why_undecodable(encoded, opened, error)]


def _unusual(image: Image.Image, encoded: bytes, path: str, is_val: bool) -> Iterator[tuple[str, str]]:
    """Findings by the header of an opened image."""
    mode, (width, height) = image.mode, image.size
    size = f"{width} x {height}"
    resized = max(width, height) * RESIZED_SHORT_SIDE**2 // min(width, height)
    if is_val and resized > 2 * Image.MAX_IMAGE_PIXELS:
        yield "bomb", f"{size}: with its short side resized to {RESIZED_SHORT_SIDE}, it has {resized:,} pixels"
    if width * height > Image.MAX_IMAGE_PIXELS:
        yield "large", f"{size}: {3 * width * height / 2**20:,.0f} MiB decoded, in every process that loads it"
    if mode == "CMYK":
        yield "cmyk", f"{image.format} {size}"
    if mode.startswith(("I", "F")) or (image.format == "PNG" and encoded[PNG_BIT_DEPTH_AT] == 16):
        yield "deep", f"{image.format} {mode} {size}"
    if mode in ("P", "PA"):
        yield "palette", f"{image.format} {size}"
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        yield "alpha", f"{image.format} {mode} {size}"
    with contextlib.suppress(Exception):  # EXIF data may be damaged in any way; training does not read it
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
        if orientation != 1:
            yield "exif-orientation", f"{orientation}: shown otherwise by viewers than training sees it"
    expected = Image.registered_extensions().get(PurePosixPath(path).suffix.lower())
    actual = "JPEG" if image.format == "MPO" else image.format  # what cameras write: a JPEG, and more after it
    if expected and expected != actual:
        yield "other-format", f"{actual}, not {expected}"


def _why_undecodable(encoded: bytes, opened: bool, error: Exception) -> tuple[str, str]:
    """The kind of defect of a file that Pillow could not decode, and the reason."""
    if not opened:
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder("utf-8")().decode(encoded[:4096])  # may end within a character
            if all(character.isprintable() or character.isspace() for character in text):
                return "text", f"begins {' '.join(text[:200].split())[:60]!r}"
        if encoded.startswith(MAGIC_NUMBERS):
            return "header-only", f"{len(encoded):,} bytes, which begin as an image does"
        return "corrupt", f"not the content of an image: begins {encoded[:8].hex(' ')}"
    start = encoded.rfind(b"\xff\xda")  # start of scan: behind its own header of 14 bytes come the pixels of a JPEG
    without_jpeg_data = encoded.startswith(b"\xff\xd8") and (start < 0 or len(encoded) < start + 16)
    without_png_data = encoded.startswith(b"\x89PNG") and b"IDAT" not in encoded[:-4]
    if without_jpeg_data or without_png_data:
        return "header-only", f"{len(encoded):,} bytes, and no pixels among them"
    reason = _one_line(error)
    is_short = any(word in reason.lower() for word in ("truncated", "unexpected end", "not enough", "incomplete"))
    return "truncated" if is_short else "corrupt", reason


def _one_line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


# -------------------------------------------------------------------------------------------------- inspecting them all


def inspect_all(root: Path, listing: Listing, workers: int) -> Iterator[tuple[int, Inspection]]:
    """Inspect every file of the listing in `workers` processes: yields (index of the file, result) in any order.

    A process that dies, or takes SECONDS_PER_FILE for one file, is replaced; nothing but that file is lost.
    """
    files, archives = listing.files, listing.archives
    queue, attempts = deque(range(len(files))), Counter[int]()
    active: dict[Connection, _Worker] = {}
    Image.init()  # once here, not in every process
    gc.freeze()  # else the collector of each process would copy the pages of the listing
    try:
        while queue or active:
            while queue and len(active) < workers:
                worker = _Worker(root, listing, list(active))
                active[worker.pipe] = worker
                worker.send(queue)
            for pipe in wait(list(active)):
                worker = active[pipe]
                result = worker.receive()
                if result is not None:
                    yield result
                    if worker.pending or worker.send(queue):
                        continue
                del active[pipe]
                reason = worker.close()
                if worker.pending:
                    culprit = worker.pending.popleft()
                    attempts[culprit] += 1
                    if attempts[culprit] < ATTEMPTS:
                        queue.append(culprit)
                    else:
                        yield culprit, Inspection(-1, b"", "", (("crash", reason),))
                queue.extendleft(reversed(worker.pending))
    finally:
        for worker in active.values():
            worker.close()
        gc.unfreeze()
        for archive in archives.values():
            archive.close()


class _Worker:
    """A process that inspects files, and what it has been given to do."""

    def __init__(self, root: Path, listing: Listing, other_pipes: list[Connection]) -> None:
        # Forked, so that the listing, which may be gigabytes, is shared and not copied.
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.pending: deque[int] = deque()
        # Each process closes what it inherits of the others' pipes: else the death of the parent would go unnoticed.
        arguments = (root, listing.files, listing.archives, theirs, [self.pipe, *other_pipes])
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def send(self, queue: deque[int]) -> bool:
        """Hand over the next files; False where there are none."""
        self.pending.extend(queue.popleft() for _ in range(min(FILES_PER_MESSAGE, len(queue))))
        with contextlib.suppress(OSError):  # it has died: that shows at the next receive
            self.pipe.send(list(self.pending))
        return bool(self.pending)

    def receive(self) -> tuple[int, Inspection] | None:
        """The next result; None where the process has died."""
        try:
            result = self.pipe.recv()
        except (EOFError, OSError):
            return None
        self.pending.popleft()
        return result

    def close(self) -> str:
        """End the process; returns how it ended."""
        self.pipe.close()
        self.process.kill()  # one that has died keeps its own exit status
        self.process.join()
        code = self.process.exitcode
        if code == -signal.SIGALRM:
            return f"took longer than {SECONDS_PER_FILE} s"
        if code < 0:
            return f"the process that read it died of signal {-code} ({signal.Signals(-code).name})"
        return f"the process that read it ended with status {code}"


def _work(
    root: Path,
    files: list[File],
    archives: dict[str, zipfile.ZipFile],
    pipe: Connection,
    inherited: list[Connection],
) -> None:
    """The life of a worker: receives lists of file indices, sends (index, Inspection) for each."""
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also in the midst of a decoder
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # libtiff and others write there about each damaged file
    _limit_memory()
    for name, archive in archives.items():
        archive.fp = (root / name).open("rb")  # a handle that crosses a fork shares its position with the parent
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        while True:
            for index in pipe.recv():
                signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_FILE)
                inspection = inspect_file(root, files[index], archives)
                signal.setitimer(signal.ITIMER_REAL, 0)
                pipe.send((index, inspection))


def _limit_memory() -> None:
    with contextlib.suppress(OSError, ValueError):  # where the system has no such limit, Pillow's on pixels remains
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + WORKER_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


# ------------------------------------------------------------------------------------------------------------ the check


def check_data_set(
    data_path: str, dataset: str = "imagenet", zipped: bool = False, workers: int | None = None
) -> Report:
    """Inspect the data set below `data_path`, in as many processes as there are cores unless `workers` says otherwise.

    The report does not depend on the number of processes. Raises UserError where the folder is not there.
    """
    root = Path(data_path)
    if not root.is_dir():
        raise UserError(f"--data-path {data_path}: no such folder")
    listing = (list_zips if zipped else list_folders)(root, dataset)
    files, problems = listing.files, listing.problems
    sizes = np.full(len(files), -1, np.int64)
    digests = np.zeros((len(files), 32), np.uint8)
    is_hashed, is_sound = np.zeros(len(files), bool), np.zeros(len(files), bool)
    modes: Counter[str] = Counter()
    with tqdm(total=len(files), desc="inspecting", unit="file", disable=None) as progress:
        for index, (size, digest, mode, findings) in inspect_all(root, listing, workers or _cores()):
            sizes[index] = size
            if digest:
                digests[index] = np.frombuffer(digest, np.uint8)
                is_hashed[index] = True
            if mode:
                is_sound[index] = True
                modes[mode] += 1
            problems += [Problem(kind, files[index].path, reason) for kind, reason in findings]
            progress.update()

    by_path = sorted((i for i, file in enumerate(files) if file.label is not None), key=lambda i: files[i])
    problems += _repeated(files, digests, np.array([i for i in by_path if is_sound[i]], np.int64))
    for i in by_path:
        listing.splits[files[i].split].num_bytes += max(0, int(sizes[i]))
    manifest = "".join(
        f"{_printable(files[i].path)}\t{sizes[i] if sizes[i] >= 0 else '-'}"
        f"\t{digests[i].tobytes().hex() if is_hashed[i] else '-'}\t{files[i].label}\n"
        for i in by_path
    )
    order = {kind: position for position, kind in enumerate(KINDS)}
    return Report(
        data_path=data_path,
        dataset=dataset,
        zipped=zipped,
        splits=listing.splits,
        modes=dict(sorted(modes.items())),
        problems=sorted(problems, key=lambda problem: (order[problem.kind], problem.path, problem.reason)),
        manifest=manifest,
        fingerprint=hashlib.sha256(manifest.encode()).hexdigest()[:16],
    )


def _repeated(files: list[File], digests: np.ndarray, candidates: np.ndarray) -> Iterator[Problem]:
    """Problems of files with the same content. `candidates` are the indices of the sound images, sorted by path."""
    if not len(candidates):
        return
    keys = digests[candidates].view(np.uint64)
    order = np.lexsort(keys.T)  # stable: equal ones stay sorted by path
    is_first = np.append(True, (keys[order][1:] != keys[order][:-1]).any(axis=1))
    starts = np.flatnonzero(is_first)
    lengths = np.diff(np.append(starts, len(order)))
    for start, length in zip(starts[lengths > 1], lengths[lengths > 1]):
        group = [files[i] for i in candidates[order[start : start + length]]]
        by_split: defaultdict[str, list[File]] = defaultdict(list)
        for file in group:
            by_split[file.split].append(file)
        train, val = by_split["train"], by_split["val"]
        pairs = [("train-and-val", file, train[0]) for file in val if train]
        pairs += [("duplicate", file, train[0]) for file in train[1:]]
        pairs += [("duplicate", file, val[0]) for file in val[1:] if not train]
        for kind, file, first in pairs:
            if file.path != first.path:  # a map may name a member twice
                label = "" if file.label == first.label else f", but class {file.label} instead of {first.label}"
                yield Problem(kind, file.path, f"same content as {first.path}{label}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------------------ reporting


def format_report(report: Report, strict: bool, lines_per_kind: int | None = None) -> str:
    """The report as text, each problem in one line; no more than `lines_per_kind` of a kind, where that is given."""
    lines = []
    for level, title in LEVEL_TITLES.items():
        found: dict[str, list[Problem]] = defaultdict(list)
        for problem in report.problems:
            if KINDS[problem.kind][0] == level:
                found[problem.kind].append(problem)
        if not found:
            continue
        lines += [title]
        for kind, problems in found.items():
            lines += [f"  {kind}: {KINDS[kind][1]} ({len(problems):,})"]
            shown = problems[:lines_per_kind]
            lines += [f"    {_printable(problem.path)}: {_printable(problem.reason)}" for problem in shown]
            if len(problems) > len(shown):
                lines += [f"    and {len(problems) - len(shown):,} more"]
        lines += [""]
    form = "zip files" if report.zipped else "folders"
    lines += [f"data set     {_printable(report.data_path)} ({report.dataset}, {form})"]
    for split, content in report.splits.items():
        lines += [f"{split:12} {_describe(content)}"]
    if report.modes:
        lines += [f"modes        {', '.join(f'{mode} {count:,}' for mode, count in report.modes.items())}"]
    lines += [f"fingerprint  {report.fingerprint} (of the manifest: paths, sizes, SHA-256, classes)"]
    counts = ", ".join(f"{report.count(level):,} {level}s" for level in LEVEL_TITLES)
    verdict = "do not train on it as it is" if report.exit_code(strict) else "ready"
    return "\n".join([*lines, f"result       {counts}: {verdict}", ""])


def _describe(split: Split) -> str:
    sizes = split.class_sizes or [0]
    return (
        f"{sum(sizes):,} images of {len(split.classes):,} classes, {split.num_bytes / 2**20:,.1f} MiB; "
        f"class size {min(sizes):,} / {statistics.median(sizes):,g} / {max(sizes):,} (minimum / median / maximum); "
        f"paths and classes {split.fingerprint[:16]}"
    )


def format_json(report: Report, strict: bool) -> str:
    """Everything that the report says, for programs."""
    content = {
        "data_path": report.data_path,
        "dataset": report.dataset,
        "zip": report.zipped,
        "exit_code": report.exit_code(strict),
        "fingerprint": report.fingerprint,
        "counts": {level: report.count(level) for level in LEVEL_TITLES},
        "splits": {
            split: {
                "name": content.name,
                "images": sum(content.class_sizes),
                "bytes": content.num_bytes,
                "classes": dict(zip(content.classes, content.class_sizes)),
                "class_size_min": min(content.class_sizes, default=0),
                "class_size_median": statistics.median(content.class_sizes or [0]),
                "class_size_max": max(content.class_sizes, default=0),
                "fingerprint": content.fingerprint,
            }
            for split, content in report.splits.items()
        },
        "modes": report.modes,
        "problems": [
            {"level": KINDS[kind][0], "kind": kind, "meaning": KINDS[kind][1], "path": path, "reason": reason}
            for kind, path, reason in report.problems
        ],
    }
    return json.dumps(content, indent=1) + "\n"


def _printable(text: str) -> str:
    """One line without control characters, so that a file's name can neither fake a line nor steer the terminal."""
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(c if c.isprintable() and c != "\\" else ascii(c)[1:-1] for c in text)


# --------------------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Wrong use is one line, without the list of flags."""
        raise UserError(f"{message}; see --help")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m data.check", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data-path", required=True, metavar="DIR", help="folder that holds the splits")
    parser.add_argument("--dataset", choices=tuple(SPLIT_NAMES), default="imagenet", help="decides the splits' names")
    parser.add_argument("--zip", action="store_true", help="check train.zip and val.zip instead of folders")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings and unusual images too")
    parser.add_argument("--report", metavar="FILE", help="write the report here too, with every line")
    parser.add_argument("--manifest", metavar="FILE", help="write path, size, SHA-256 and class index of every image")
    parser.add_argument("--json", metavar="FILE", help="write the report for programs")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1")
    for name in (args.report, args.manifest, args.json):
        # Found out now rather than after an hour.
        if name is not None and (Path(name).is_dir() or not _is_writable(Path(name))):
            raise UserError(f"{name}: cannot be written: a folder, or in none that exists and may be written to")
    return args


def _is_writable(path: Path) -> bool:
    return os.access(path if path.exists() else path.absolute().parent, os.W_OK)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit status. `argv` are the arguments without the program's name."""
    try:
        args = _parse(argv)
        report = check_data_set(args.data_path, args.dataset, args.zip, args.workers)
        sys.stdout.write(format_report(report, args.strict, LINES_PER_KIND))
        if args.report is not None:
            _write(args.report, format_report(report, args.strict))
        if args.json is not None:
            _write(args.json, format_json(report, args.strict))
        if args.manifest is not None:
            _write(args.manifest, report.manifest)
    except UserError as error:
        print(f"data.check: error: {error.one_line()}", file=sys.stderr)
        return 2
    except OSError as error:  # a folder that vanished meanwhile
        print(f"data.check: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data.check: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return report.exit_code(args.strict)


def _write(name: str, text: str) -> None:
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{name}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
