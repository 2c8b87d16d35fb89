"""Which files are images and which folders are classes: one answer for folders, zip files, --images, check and pack."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import features

from configs import UserError

# Formats by content, whatever the name, and the suffixes of files that are read. Pillow would also try formats that
# start other programs (EPS).
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    **({"AVIF": (".avif",)} if "avif" in features.modules and features.check("avif") else {}),
}
IMAGE_FORMATS = tuple(_SUFFIXES)
IMAGE_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)

# What systems and programs leave beside a user's files, in lower case; hidden names need no list.
_COMPANIONS = {
    *("__macosx", "icon\r", "temporary items", "network trash folder"),  # macOS
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
    *("$recycle.bin", "recycler", "system volume information"),
    *("@eadir", "#recycle", "@recycle", "@tmp", "#snapshot", "@recently-snapshot"),  # file servers
    *("lost+found", "__pycache__"),
}
_COMPANION_ENDS = (":zone.identifier", "@synoeastream", "@synoresource")  # after the whole name of a file
_MAX_KINDS = 8  # of left-out files in one line


def is_companion(path: str) -> bool:
    """Whether a relative path, with '/', is hidden, or left by a system beside the user's files, or in such a folder.

    It is never an image and never a class.
    """
    return any(_is_companion_name(name) for name in path.split("/"))


def _is_companion_name(name: str) -> bool:
    if name.startswith("."):  # macOS: ._photo.jpg beside photo.jpg, .DS_Store
        return name not in (".", "..")
    lowered = name.lower()
    return lowered in _COMPANIONS or lowered.endswith(_COMPANION_ENDS)


def is_image_name(name: str) -> bool:
    """Whether a file of this name, which is no companion, is read: by its suffix."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def class_folders(root: Path) -> list[str]:
    """Names of the class folders below `root`, sorted; UserError where it is no readable folder."""
    return sorted(_entries(str(root))[0])


def loose_files(root: Path) -> list[str]:
    """Paths of the files in no class folder, sorted, without companions."""
    return [f"{root}{os.sep}{name}" for name in sorted(_entries(str(root))[1])]


def files_below(folder: Path, root: Path | None = None) -> list[str]:
    """Paths of all files anywhere below `folder`, without companions, in the order of torchvision's ImageFolder.

    Links are followed. UserError where a folder cannot be read, or a link leads back to one above, up to `root`.
    """

    def walk(folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
        real = os.path.realpath(folder)
        if real in above:
            raise UserError(f"{folder}: a link that leads back to {real}; remove it")
        folders, files = _entries(folder)
        yield folder, sorted(files)
        for below in folders:
            yield from walk(f"{folder}{os.sep}{below}", (*above, real))

    above = () if root is None else (os.path.realpath(root),)
    return [f"{below}{os.sep}{file}" for below, files in sorted(walk(str(folder), above)) for file in files]


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of all else in a folder, without companions."""
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not is_companion(entry.name):
                    (folders if _is_folder(entry) else files).append(entry.name)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    return folders, files


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether the entry is a folder or a link to one; False for a link to itself, where `is_dir` raises."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def count_suffixes(paths: Iterable[str]) -> Counter[str]:
    """How many files have each suffix, in lower case; '' for none, and for what is no word after the last dot."""
    suffixes = (Path(path).suffix.lower() for path in paths)
    return Counter(suffix if suffix[1:].isalnum() else "" for suffix in suffixes)


def describe_left_out(counts: Counter[str]) -> str:
    """The counts of `count_suffixes` as words: '3 .heic, 1 .txt, 1 without a suffix'."""
    kinds = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    parts = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in kinds[:_MAX_KINDS]]
    rest = sum(count for _, count in kinds[_MAX_KINDS:])
    return ", ".join(parts + [f"{rest:,} others"] * (rest > 0))
