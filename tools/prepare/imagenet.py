"""ImageNet as it comes: the archives of image-net.org, and Kaggle's folders."""

import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from configs import UserError
from configs.errors import one_line
from data.files import class_folders, files_below, is_companion, is_image_name, loose_files
from data.raw import CLS_LOC, TRAIN_TAR, VAL_TAR, find_cls_loc

from .labels import MISSING, Labels, find_labels
from .writing import LabelledImage, Split


# --------------------------------------------------------------------------------------------- image-net.org's archives
def read_tars(root: Path, named: Path | None) -> list[Split]:
    """The splits whose archives lie in `root`; `named` is where the labels are, where they are elsewhere.

    Raises UserError where archives or labels are missing.
    """
    train, val = root / TRAIN_TAR, root / VAL_TAR
    if not train.is_file() and not val.is_file():
        raise UserError(f"{root}: holds neither {TRAIN_TAR} nor {VAL_TAR}")
    labels = find_labels([root], named)
    if labels is None and val.is_file():
        raise UserError(f"{root}: nothing tells the classes of {VAL_TAR}; put there {MISSING}")
    splits = []
    classes = _classes(labels) if labels else _classes_of_tar(train)
    if val.is_file():
        splits.append(Split("val", classes, lambda: _val_images(val, labels), labels.val_counts, labels.origin.name))
    if train.is_file():
        counts, said_by = (labels.train_counts, labels.origin.name) if labels else (None, "")
        splits.append(Split("train", classes, lambda: _train_images(train), counts, said_by))
    return splits


def _classes(labels: Labels) -> list[str]:
    return sorted(labels.train_counts or set(labels.class_of.values()))


def _classes_of_tar(path: Path) -> list[str]:
    with _opened(path) as archive:
        return sorted(PurePosixPath(member.name).stem for member in _files(archive))


def _train_images(path: Path) -> Iterator[LabelledImage]:
    """The archive holds one archive a class, n01440764.tar and so on."""
    with _opened(path) as archive:
        for member in _files(archive):
            wnid = PurePosixPath(member.name).stem
            with _opened(path, archive.extractfile(member), member.name) as of_class:
                for image in _files(of_class):
                    yield LabelledImage(f"{wnid}/{PurePosixPath(image.name).name}", _reader(path, of_class, image))


def _val_images(path: Path, labels: Labels) -> Iterator[LabelledImage]:
    with _opened(path) as archive:
        for member in _files(archive):
            name = PurePosixPath(member.name)
            if name.stem not in labels.class_of:
                raise UserError(f"{path}: {member.name} is not an image of {labels.origin}")
            yield LabelledImage(f"{labels.class_of[name.stem]}/{name.name}", _reader(path, archive, member))


def _files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    yield from (member for member in archive if member.isfile() and not is_companion(member.name.removeprefix("./")))
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes any nonsense for the end
        raise tarfile.ReadError("no end of the archive")


def _reader(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        with _damage_named(path, member.name):
            return archive.extractfile(member).read()

    return read


@contextmanager
def _opened(path: Path, file: BinaryIO | None = None, inner: str = "") -> Iterator[tarfile.TarFile]:
    with _damage_named(path, inner), tarfile.open(path, "r:", file) as archive:
        yield archive


@contextmanager
def _damage_named(path: Path, inner: str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError) as error:
        where = f"{path}, {inner}" if inner else str(path)
        raise UserError(f"{where}: damaged or cut off: {one_line(error)}; copy or download it again") from None


# ----------------------------------------------------------------------------------------------------- Kaggle's folders
def read_kaggle(root: Path, named: Path | None) -> list[Split]:
    """The splits of Kaggle's ILSVRC/Data/CLS-LOC, which `root` is or holds; `named` as for `read_tars`."""
    folder = find_cls_loc(root)
    if folder is None:
        raise UserError(f"{root}: holds no {CLS_LOC} with train/ or val/")
    train, val = folder / "train", folder / "val"
    labels = find_labels([root, folder, *folder.resolve().parents[:3]], named)
    splits, classes = [], class_folders(train) if train.is_dir() else []
    if val.is_dir():
        if labels is None:
            raise UserError(f"{val}: nothing tells the classes of its images; give {MISSING}, with --labels FILE")
        splits.append(
            Split(
                "val",
                classes or _classes(labels),
                partial(_flat_images, val, labels),
                labels.val_counts,
                labels.origin.name,
            )
        )
    if train.is_dir():
        counts = (labels and labels.train_counts) or _listed(folder)
        folders = {name: train / name for name in classes}
        said_by = "train_cls.txt" if labels is None or labels.train_counts is None else labels.origin.name
        splits.append(Split("train", classes, partial(_images_of_folders, folders), counts, said_by, folders))
    return splits


def _flat_images(folder: Path, labels: Labels) -> Iterator[LabelledImage]:
    paths = [Path(path) for path in loose_files(folder) if is_image_name(path)]
    if not paths and class_folders(folder):
        raise UserError(f"{folder}: holds class folders already; give --data-path {folder.parent} to train.py")
    for path in paths:
        if path.stem not in labels.class_of:
            raise UserError(f"{path}: is not an image of {labels.origin}")
        yield LabelledImage(f"{labels.class_of[path.stem]}/{path.name}", path.read_bytes, path)


def _images_of_folders(folders: dict[str, Path]) -> Iterator[LabelledImage]:
    for name, folder in folders.items():
        for path in filter(is_image_name, files_below(folder)):
            relative = Path(path).relative_to(folder).as_posix()
            yield LabelledImage(f"{name}/{relative}", Path(path).read_bytes, Path(path))


def _listed(folder: Path) -> Counter[str] | None:
    """Images of each class by ILSVRC/ImageSets/CLS-LOC/train_cls.txt, whose lines are `<class>/<image> <number>`."""
    path = folder.parents[1] / "ImageSets" / "CLS-LOC" / "train_cls.txt"
    if not path.is_file():
        return None
    return Counter(line.partition("/")[0] for line in path.read_text().splitlines() if line.strip())
