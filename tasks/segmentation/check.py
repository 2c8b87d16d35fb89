"""Inspect a segmentation data set before a long run: every image and mask is read as training does it."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from yacs.config import CfgNode

from configs import UserError
from data import usable_workers
from data.workers import init_worker

from ..problems import ERROR, WARNING, Copies, Problem, in_order, open_splits
from .folders import IGNORED, MASK_SUFFIX, MaskedImages, files_below, open_masks

# kind -> (level, what it means), in the order of the report
KINDS = {
    "split": (ERROR, "split that training cannot open"),
    "sample": (ERROR, "image or mask that training cannot read"),
    "train-and-val": (ERROR, "image that is in both train and val"),
    "classes": (WARNING, "class that no mask of the split shows"),
    "duplicate": (WARNING, "image that is in a split twice"),
    "nothing-counts": (WARNING, "mask of ignored pixels alone"),
    "unused-mask": (WARNING, "mask without an image"),
}


class _Inspections(Dataset):
    """Of each sample: digest of the image's bytes, pixels of each class, and what is wrong with it, '' for nothing."""

    def __init__(self, images: MaskedImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[bytes, np.ndarray, str]:
        pixels = np.zeros(len(self.images.classes), np.int64)
        try:
            _, classes = self.images.load(index)
            digest = hashlib.sha256((self.images.root / self.images.samples[index][0]).read_bytes()).digest()
        except (UserError, OSError) as error:
            return b"", pixels, error.one_line() if isinstance(error, UserError) else str(error)
        pixels += np.bincount(classes[classes != IGNORED], minlength=len(pixels))
        return digest, pixels, ""


def check(config: CfgNode) -> list[Problem]:
    """What is wrong with the configured data, in the order of KINDS; nothing is raised but for a missing folder.

    Raises UserError where --data-path is no folder.
    """
    splits, problems = open_splits(config, open_masks)
    copies = Copies()
    for name, images in splits.items():
        problems += _check_split(config, name, images, copies)
    return in_order(problems, KINDS)


def _check_split(config: CfgNode, split: str, images: MaskedImages, copies: Copies) -> Iterator[Problem]:
    loader: Any = DataLoader(
        _Inspections(images),
        batch_size=None,
        collate_fn=lambda sample: sample,  # as it is, with its array
        num_workers=usable_workers(config),
        worker_init_fn=init_worker,
        multiprocessing_context="fork" if usable_workers(config) else None,
    )
    total = np.zeros(len(images.classes), np.int64)
    for (path, mask), (digest, pixels, problem) in zip(images.samples, loader):
        total += pixels
        if problem:
            yield Problem("sample", path, problem)
            continue
        if not pixels.any():
            yield Problem("nothing-counts", mask, "has no pixel of any class")
        yield from copies.find(split, path, digest)
    for name, count in zip(images.classes, total):
        if count == 0:
            yield Problem("classes", split, f"no pixel of {name!r}")
    used = {str(images.root / mask) for _, mask in images.samples}
    for name in files_below(images.masks):
        path = str(images.masks / name)
        if name.endswith(images.mask_suffix + MASK_SUFFIX) and path not in used:
            yield Problem("unused-mask", str((images.masks / name).relative_to(images.root)), "has no image")
