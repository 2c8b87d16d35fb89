"""A validation set for data sets without one: a fixed share of the training images, chosen by their content."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs import SPLIT_NAMES, UserError

from .sources import UNLABELLED, FileSource, Source, ZipSource, count_images, list_names
from .splits import open_source


def has_validation(data_path: str, dataset: str, zip_mode: bool) -> bool:
    """Whether the data set below `data_path` has a validation folder, or zip file."""
    path = Path(data_path) / f"{SPLIT_NAMES[dataset]['val']}{'.zip' * zip_mode}"
    return path.is_file() if zip_mode else path.is_dir()


def open_parts(
    data_path: str,
    dataset: str,
    share: float,
    zip_mode: bool,
    cache_mode: str = "no",
    rank: int = 0,
    world_size: int = 1,
    block: int = 1,
) -> dict[str, Source]:
    """The training images in two parts, 'train' and 'val'. Every image of a folder is read once.

    Class folders may also lie in `data_path` itself. `block` is that of the validation part; the other arguments are
    those of `open_source`. UserError as there.
    """
    return split_by_content(
        open_source(data_path, dataset, "train", zip_mode, "no", 0, 1, train_may_be_root=True),
        share,
        cache_mode,
        rank,
        world_size,
        block,
    )


def split_by_content(
    source: FileSource | ZipSource,
    share: float,
    cache_mode: str = "no",
    rank: int = 0,
    world_size: int = 1,
    block: int = 1,
    setting: str = "DATA.VAL_SHARE",
) -> dict[str, Source]:
    """A source in two parts, 'train' and 'val', as `held_out` chooses.

    Raises UserError, which begins with the name of the `setting`, where a class is left without training images, or no
    image can be held out.
    """
    labels = source.samples.labels
    several = bool((labels == UNLABELLED).all())  # images of several classes: split as if they were of one
    chosen = held_out(np.zeros_like(labels) if several else labels, source.contents(), share)
    parts = {"train": source.part(~chosen), "val": source.part(chosen)}
    empty = [name for name, count in zip(source.classes, count_images(parts["train"])) if not count]
    if empty and not several:
        raise UserError(
            f"{setting} = {share}: leaves no training image of class {list_names(empty)}, whose images "
            "other classes have too; python -m tools.check names them"
        )
    if not chosen.any():
        raise UserError(f"{setting} = {share}: no class has two images that differ; nothing can be held out")
    for name, part in parts.items():
        if isinstance(part, ZipSource):
            part.fill_cache(cache_mode, rank, world_size, block if name == "val" else 1)
    return parts


def held_out(labels: np.ndarray, contents: Sequence[tuple[int, int]], share: float) -> np.ndarray:
    """Which images are held out for validation, (N,) bool.

    Of each class, that share of its different images, rounded, at least one and not all. Which ones, a hash of their
    content decides: names, order and machine do not, and copies of an image stay together, whatever their classes.

    Args:
        labels: (N,) class index of every image.
        contents: (N, 2) size of every file, bytes, and its CRC-32.
        share: of the images, 0 to below 1.
    """
    different, content = np.unique(np.asarray(contents), axis=0, return_inverse=True)
    hashes = [hashlib.sha256(f"{size} {crc}".encode()).hexdigest() for size, crc in different.tolist()]
    place = np.argsort(np.argsort(hashes))  # of each content, in the order of the hashes
    classes, places = np.unique(np.stack([labels, place[content.ravel()]]), axis=1)
    counts = np.bincount(classes)
    wanted = np.where(counts > 1, (share * counts + 0.5).astype(np.int64).clip(1, np.maximum(counts - 1, 1)), 0)
    number_in_class = np.arange(len(classes)) - (np.cumsum(counts) - counts)[classes]
    return np.isin(place[content.ravel()], places[number_in_class < wanted[classes]])
