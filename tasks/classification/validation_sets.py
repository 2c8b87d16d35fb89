"""ImageNet's other validation sets, for networks of the 1000 classes of ImageNet-1k; chosen by TEST.VAL_SET.

| set | images | labels | counted among |
|---|---|---|---|
| real | ImageNet's validation set, file names as they come | Beyer et al. 2020: none, one or several | 1000 classes |
| v2 | Recht et al. 2019, folders named by class number (0, 1, ... 999) | the folder's | 1000 classes |
| a | Hendrycks et al. 2021, "natural adversarial examples", 200 folders named by wnid | the folder's | these 200 |
| r | Hendrycks et al. 2021, renditions, 200 folders named by wnid | the folder's | these 200 |

Class numbers, wnids, the 200 classes of -A and -R, and ReaL's labels are timm's tables.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from configs import SPLIT_NAMES, UserError
from data.sources import FolderSource, SampleList, Source

NUM_CLASSES = 1000
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+", re.IGNORECASE)


@dataclass(frozen=True)
class ValidationSet:
    """A validation set, and how a network of 1000 outputs is judged on it."""

    source: Source  # images; class indices count `source.classes`
    outputs: list[int] | None  # the network's outputs that are those classes; None: all, in order
    label_sets: list[list[int]] | None  # of every image, the class indices that count as right; None: its label


class NamedFolders(FolderSource):
    """Class folders whose indices come from a table of folder names, not from their order.

    Raises UserError, beside `FolderSource`, where a folder is not in the table, or two folders are the same class.
    """

    def __init__(self, root: Path, classes: Sequence[str], index_of: dict[str, int], what: str) -> None:
        super().__init__(root)
        labels: list[int] = []
        for name in self.classes:
            if name not in index_of:
                raise UserError(f"{root / name}: not a class folder of {what}")
            if index_of[name] in labels:
                raise UserError(f"{root / name}: another folder is class {index_of[name]} as well")
            labels.append(index_of[name])
        self.samples = SampleList((path, labels[number]) for path, number in self.samples)
        self.classes = list(classes)


def open_validation_set(config: CfgNode) -> ValidationSet:
    """Open the validation set that TEST.VAL_SET names, at DATA.DATA_PATH: its class folders, or a folder val/ of them.

    A part of the class folders is enough; the log then says how many there are. Raises UserError where the layout is
    another.
    """
    if config.DATA.ZIP_MODE:
        raise UserError(f"TEST.VAL_SET = {config.TEST.VAL_SET!r}: is read from folders; leave --zip out")
    root = _class_root(config)
    wnids = table("imagenet_synsets.txt")
    if config.TEST.VAL_SET in ("a", "r"):
        what = f"ImageNet-{config.TEST.VAL_SET.upper()}"
        classes = table(f"imagenet_{config.TEST.VAL_SET}_synsets.txt")
        source = NamedFolders(root, classes, {name: i for i, name in enumerate(classes)}, f"{what}'s 200 (wnids)")
        return ValidationSet(source, [wnids.index(name) for name in classes], None)
    numbered = {wnid: i for i, wnid in enumerate(wnids)}
    if config.TEST.VAL_SET == "v2":
        # As text, 10 sorts before 2: an ImageFolder gives nearly every image of this data set a wrong label.
        numbered |= {f"{i:0{width}d}": i for i in range(NUM_CLASSES) for width in (1, 3, 4)}
        return ValidationSet(
            NamedFolders(root, wnids, numbered, "ImageNet-V2 (class numbers 0 to 999, or wnids)"), None, None
        )
    source = NamedFolders(root, wnids, numbered, "ImageNet-1k (wnids)")
    return ValidationSet(source, None, real_labels([path for path, _ in source.samples]))


def real_labels(paths: Sequence[str]) -> list[list[int]]:
    """ReaL's class indices for ImageNet validation images, which their names number from 1; empty where it has none.

    `paths` are .../ILSVRC2012_val_00000001.JPEG and so on; UserError for other names.
    """
    labels = json.loads(_info("imagenet_real_labels.json"))
    found = []
    for path in paths:
        match = _VAL_NAME.fullmatch(Path(path).name)
        if match is None or not 1 <= int(match[1]) <= len(labels):
            raise UserError(
                f"{path}: ReaL knows images by ImageNet's own names, ILSVRC2012_val_00000001.JPEG to _00050000"
            )
        found.append(labels[int(match[1]) - 1])
    return found


def real_accuracy(top: np.ndarray, label_sets: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(M,) bool each, top-1 and top-5 right, of the M images that have ReaL labels; the others do not count."""
    rows = [i for i, labels in enumerate(label_sets) if labels]
    first, any_of_five = (
        np.array([not set(top[i, :k].tolist()).isdisjoint(label_sets[i]) for i in rows], dtype=bool) for k in (1, 5)
    )
    return first, any_of_five


def table(name: str) -> list[str]:
    """The lines of one of timm's tables of ImageNet classes."""
    return _info(name).split()


def _info(name: str) -> str:
    return (resources.files("timm.data") / "_info" / name).read_text(encoding="utf-8")


def _class_root(config: CfgNode) -> Path:
    if not config.DATA.DATA_PATH:
        raise UserError("DATA.DATA_PATH is empty: give the folder of the data set with --data-path")
    root = Path(config.DATA.DATA_PATH)
    if not root.is_dir():
        raise UserError(f"--data-path {root}: no such folder")
    val = root / SPLIT_NAMES[config.DATA.DATASET]["val"]
    return val if val.is_dir() else root
