"""The splits of a data set: opened, and their classes brought together."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from configs import SPLIT_NAMES, UserError

from .files import class_folders, is_image_name, loose_files
from .raw import find_shards, how_to_prepare, is_flat
from .sources import UNLABELLED, FolderSource, Source, ZipSource, count_images, list_names


def open_source(
    data_path: str,
    dataset: str,
    split: str,
    zip_mode: bool,
    cache_mode: str,
    rank: int,
    world_size: int,
    block: int = 1,
    train_may_be_root: bool = False,
) -> Source:
    """Open `split` ('train' or 'val') of the data set below `data_path`.

    With `train_may_be_root`, `data_path` itself may hold the classes, where it has no folder of that split.

    Raises UserError where it is not there, where all its images are of one class, and in training where a class has
    none.
    """
    if not data_path:
        raise UserError("DATA.DATA_PATH is empty: give the folder of the data set with --data-path")
    root, names = Path(data_path), SPLIT_NAMES[dataset]
    name, gaps = names[split], split == "val"
    if not root.is_dir():
        raise UserError(f"--data-path {data_path}: no such folder; give the one that holds {name}{'.zip' * zip_mode}")
    folder = root / name
    if not zip_mode and not folder.is_dir():
        if not train_may_be_root:
            raise UserError(f"--data-path {data_path}: has no folder {name}/{_hint(root, names, split)}")
        folder = root
    if not zip_mode and not class_folders(folder) and find_shards(root):
        raise UserError(f"--data-path {data_path}: {how_to_prepare(root, name, split)}")
    if not zip_mode and is_flat(folder):
        what = how_to_prepare(root, name, split) or f"move the images of each class into a folder of its own in {name}/"
        raise UserError(f"{folder}: holds images and no class folders; {what}")
    if zip_mode:
        source = ZipSource(root, name, cache_mode, rank, world_size, block, gaps)
    else:
        source = FolderSource(folder, gaps)
    if len(labels := np.unique(source.samples.labels)) == 1:
        raise UserError(_one_class(source, int(labels[0]), list(names.values())))
    return source


def _one_class(source: Source, label: int, splits: list[str]) -> str:
    """What is wrong where all images have this class, and what may have been meant."""
    if isinstance(source, ZipSource):
        folders = sorted({path.rpartition("/")[0] for path, _ in source.samples})
        lie = f"they lie in the folders {list_names(folders)}; number the classes in its map" if any(folders) else ""
        return f"{source.path}: all images have class index {label}; a classifier needs two classes; {lie}".rstrip("; ")
    folder = source.root / source.classes[label]
    below = class_folders(folder)
    what = f"{source.root}: has images of one class, {folder.name}; a classifier needs two"
    if not below:
        return f"{what}; {folder} holds {len(source.samples)} images and no folders"
    if all((folder / split).is_dir() for split in splits):
        return f"{what}; below it lie {list_names(below)}: give --data-path {folder}"
    return f"{what}; {folder} holds the folders {list_names(below)}: if these are classes, move them one level up"


def one_level_too_many(source: Source) -> str:
    """Where every class holds its images in folders below it, and these have the same names: what may be meant.

    '' elsewhere.
    """
    if not isinstance(source, FolderSource):
        return ""
    below: set[tuple[str, ...]] = set()
    for name in class_folders(source.root):
        folder = source.root / name
        below.add(() if any(map(is_image_name, loose_files(folder))) else tuple(class_folders(folder)))
        if len(below) > 1 or len(max(below)) < 2:
            return ""
    names = list_names(below.pop())
    return f"{source.root}: each class holds no images but folders {names}: if these are the classes, move them one up"


def with_classes(source: Source, classes: Sequence[str], where: str = "") -> Source:
    """`source` with the class indices of `classes`, those that a network is trained on; itself where it has them.

    Classes are the same by their names; `source` may have some of them. Where the names of a zip file's classes are not
    known, or none is among `classes`, the indices of its map stay, and the names that it has.

    Raises UserError, which begins with `where`, for images of a class that is not among `classes`.
    """
    if list(source.classes) == list(classes):
        return source
    index_of = {name: index for index, name in enumerate(classes)}
    present = np.unique(source.samples.labels).tolist()
    mapped = copy.copy(source)
    mapped.classes = list(classes)
    if isinstance(source, ZipSource):
        shared = source.named and any(source.classes[label] in index_of for label in present)
        if not shared:
            if (highest := max(present)) >= len(classes):
                raise UserError(f"{where}: class index {highest} of val is none of the {len(classes)} classes of train")
            known = present if source.named else ()
            mapped.classes = [source.classes[i] if i in known else name for i, name in enumerate(classes)]
            return mapped
        has = [source.classes[label] for label in present]
    else:
        has = source.classes
    if unknown := [name for name in has if name not in index_of]:
        missing = [name for name in classes if name not in has]
        also = f"; only in train: {list_names(missing)}" if missing else ""
        raise UserError(f"{where}: train and val differ in their classes; only in val: {list_names(unknown)}{also}")
    mapped.samples = source.samples.renumbered([index_of.get(name, UNLABELLED) for name in source.classes])
    return mapped


def without_images(source: Source) -> str:
    """The classes that have no images, counted and the first named; '' where all have some."""
    empty = [name for name, count in zip(source.classes, count_images(source)) if not count]
    if not empty:
        return ""
    what = f"{len(empty)} of {len(source.classes)} classes have no validation images ({list_names(empty)})"
    return f"{what}: accuracies are of the other classes"


def _hint(root: Path, names: Mapping[str, str], split: str) -> str:
    """What the user may have meant."""
    name = names[split]
    if (root / f"{name}.zip").is_file():
        return f", but {name}.zip: add --zip"
    if prepare := how_to_prepare(root, name, split):
        return f"; it {prepare}"
    nested = root / "ILSVRC" / "Data" / "CLS-LOC"
    if (nested / name).is_dir():
        return f"; it is in {nested}"
    found = class_folders(root)
    for near in (root.resolve().parent, *(root / folder for folder in found)):
        if near != root and ((near / name).is_dir() or (near / f"{name}.zip").is_file()):
            return f"; give --data-path {near}, which has it"
    share = "; or set DATA.VAL_SHARE 0.1, a share of train/" * (split == "val" and (root / names["train"]).is_dir())
    return f"; found {list_names(found)}{share}" if found else ""
