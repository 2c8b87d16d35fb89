"""The names under which people know the classes of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo
from yacs.config import CfgNode

from configs import SPLIT_NAMES, UserError
from data.sources import class_folders


def class_names(checkpoint: dict[str, Any], config: CfgNode) -> list[str]:
    """Names of the classes, by index: the checkpoint's, else the folders of --data-path, else ImageNet's for 1000.

    Folders named by WordNet ids get the words that belong to them. Where nothing is known, a name is the index as
    text.
    Raises UserError where the folders of --data-path are not as many as the classes.
    """
    count = config.MODEL.GMA.NUM_CLASSES
    numbers = [str(i) for i in range(count)]
    names = checkpoint.get("classes")
    if not isinstance(names, list) or len(names) != count or names == numbers:
        names = _folder_names(config, count)
    if names is None:
        names = ImageNetInfo().label_names() if count == 1000 else numbers
    return in_words(names)


def in_words(names: Sequence[str], short: bool = False) -> list[str]:
    """Class names for people: WordNet ids get the words that they stand for, all or with `short` the first one.

    Numbers, the names of classes that no image has, may stand among the ids. Other names stay as they are, all of them.
    """
    is_id = [name.startswith("n") and name[1:].isdigit() for name in names]
    if not any(is_id) or not all(known or name.isdigit() for known, name in zip(is_id, names)):
        return list(names)
    words = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True) | ImageNetInfo().label_descriptions(
        as_dict=True
    )
    if short:
        words = {wnid: text.split(",")[0] for wnid, text in words.items()}
    return [f"{words[name]} ({name})" if name in words else name for name in names]


def _folder_names(config: CfgNode, count: int) -> list[str] | None:
    if not config.DATA.DATA_PATH or config.DATA.ZIP_MODE:
        return None
    for split in ("val", "train"):
        folder = Path(config.DATA.DATA_PATH) / SPLIT_NAMES[config.DATA.DATASET][split]
        if folder.is_dir():
            names = class_folders(folder)
            if len(names) != count:
                raise UserError(f"{folder}: has {len(names)} classes, the weights have {count}: leave --data-path out")
            return names
    return None
