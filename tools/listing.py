"""What there is to inspect in a data set, and what is wrong with it by its names alone. For `tools.check`."""

import difflib
import os
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from configs import SPLIT_NAMES, UserError
from configs.errors import one_line
from data.sources import fingerprint, is_folder, open_source


class Problem(NamedTuple):
    kind: str  # key of KINDS
    path: str  # below the data path
    reason: str


class File(NamedTuple):
    """One file to inspect. `label` is None for one that training passes over: all there is to ask is what it is."""

    path: str  # below the data path, '/' between; members of train.zip as train.zip/<member>
    split: str  # 'train' or 'val'
    label: int | None


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


def list_folders(root: Path, dataset: str) -> Listing:
    """The files of `<root>/<split>/<class>/`, by the rules of FolderSource; unlike there, a link loop has an end."""
    listing = Listing()
    names = SPLIT_NAMES[dataset]
    entries = _scan(root, "", listing)
    _note_hidden(entries, "", "", listing)
    folders = [entry.name for entry in entries if is_folder(entry) and not entry.name.startswith(".")]
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
        if is_folder(entry):
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
            reason = f"leads to {target(folder)}, which is listed already; training would read it again and again"
            listing.problems.append(Problem("link-loop", path, reason))
            continue
        seen.add(identity)
        entries = _scan(folder, path, listing)
        _note_hidden(entries, f"{path}/", ", which training reads all the same if the suffix is an image's", listing)
        for entry in entries:
            below = f"{path}/{entry.name}"
            if is_folder(entry):
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
            listing.problems.append(Problem("corrupt", f"{name}.zip", f"not a readable zip file: {one_line(error)}"))
            continue
        listing.archives[f"{name}.zip"] = archive
        try:
            lines = (root / f"{name}_map.txt").read_text("utf-8-sig", errors="surrogateescape").split("\n")
        except OSError as error:
            reason = f"{one_line(error)}; one line per image: path inside the zip, tab, class index"
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
            what = "folder" if is_folder(entry) else "file"
            listing.problems.append(Problem("hidden", prefix + entry.name, f"hidden {what}{consequence}"))


def _scan(folder: Path, path: str, listing: Listing) -> list[os.DirEntry]:
    """The entries of a folder by name; where it cannot be read, none and a problem."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        listing.problems.append(Problem("unreadable", path or ".", one_line(error)))
        return []


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def target(link: Path) -> str:
    return str(link.readlink() if link.is_symlink() else link)
