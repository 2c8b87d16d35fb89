"""The names under which people know the classes of a checkpoint: from a file, from the data, or none."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo
from yacs.config import CfgNode

from configs import SPLIT_NAMES, UserError, with_values
from configs.errors import one_line
from data import class_folders

from .images import open_split

IMAGENET = "imagenet"  # what DATA.CLASS_NAMES takes for ImageNet's 1000


def class_names(
    checkpoint: dict[str, Any], config: CfgNode, notify: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Names of the classes, by index: those of DATA.CLASS_NAMES, else the checkpoint's, else those of --data-path.

    Classes named by WordNet ids get the words that belong to them. Where nothing says the names they are not guessed: a
    name is then the index as text, and `notify` is called with one line.
    Raises UserError where the names of DATA.CLASS_NAMES, or the classes of --data-path, are not as many as the classes.
    """
    count = config.MODEL.GMA.NUM_CLASSES
    names = _chosen_names(config, count) if config.DATA.CLASS_NAMES else known_names(checkpoint.get("classes"))
    if len(names) != count:
        names = _names_of_data(config, count)
    if not names:
        which = f"; {IMAGENET} gives ImageNet's" if count == 1000 else ""
        notify(f"names of the {count} classes are not known, numbers are shown; give a file with --class-names{which}")
    return in_words(names or [str(i) for i in range(count)])


def known_names(names: Any) -> list[str]:
    """The names of classes; none where they are the indices as text, which stand for names that were not known."""
    names = list(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else []
    return [] if names == [str(i) for i in range(len(names))] else names


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


def _chosen_names(config: CfgNode, count: int) -> list[str]:
    chosen = config.DATA.CLASS_NAMES
    try:
        path = Path(chosen)
        names = ImageNetInfo().label_names() if chosen == IMAGENET else path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names {chosen}: cannot be read: {one_line(error)}") from None
    if len(names) != count:
        raise UserError(f"--class-names {chosen}: has {len(names)} names, the weights have {count} classes")
    return names


def _names_of_data(config: CfgNode, count: int) -> list[str]:
    root, names = Path(config.DATA.DATA_PATH), []
    folders = [root / SPLIT_NAMES[config.DATA.DATASET][split] for split in ("val", "train")]
    if not config.DATA.DATA_PATH:
        return []
    if not root.is_dir():
        raise UserError(f"--data-path {root}: no such folder")
    if config.DATA.ZIP_MODE:
        names = open_split(with_values(config, {"DATA.CACHE_MODE": "no"}), "val", rank=0, world_size=1).classes
    elif found := [folder for folder in folders if folder.is_dir()]:
        names = class_folders(found[0])
    if names and len(names) != count:
        raise UserError(f"--data-path {root}: has {len(names)} classes, the weights have {count}: leave it out")
    return known_names(names)
