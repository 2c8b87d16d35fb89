"""The images of a classification run: opened, checked against each other, and made into datasets."""

from collections.abc import Callable, Sequence
from pathlib import Path

from yacs.config import CfgNode

from configs import SPLIT_NAMES, UserError, with_values
from data import ClassBalance, ImageDataset, Source, class_folders
from data.fast.decoding import decode_to_tensor
from data.holdout import has_validation, open_parts, split_by_content
from data.label_files import LabelFileSource
from data.splits import open_source, with_classes, without_images

from .transforms import fast_train_transform, fast_views_transform, train_transform, views_transform


def open_split(config: CfgNode, split: str, rank: int, world_size: int) -> Source:
    """The images of 'train' or 'val' as configured; UserError where something is missing."""
    data = config.DATA
    block = data.BATCH_SIZE if split == "val" else 1  # samples that `data.loaders` deals to a process at a time
    if holds_out(config):
        return _open_parts(config, rank, world_size)[split]
    file = {"train": data.TRAIN_LABELS, "val": data.VAL_LABELS}[split]
    if split == "val" and data.TRAIN_LABELS and not file:
        raise UserError(f"DATA.TRAIN_LABELS = {data.TRAIN_LABELS!r}: needs DATA.VAL_LABELS too, or DATA.VAL_SHARE 0.1")
    if file or data.MULTI_LABEL:
        return _open_label_file(config, file)
    return open_source(data.DATA_PATH, data.DATASET, split, data.ZIP_MODE, data.CACHE_MODE, rank, world_size, block)


def holds_out(config: CfgNode) -> bool:
    """Whether a share of the training images validates: where DATA.VAL_SHARE says so and there are no others."""
    data = config.DATA
    by_folders = (
        not data.MULTI_LABEL and not data.TRAIN_LABELS and has_validation(data.DATA_PATH, data.DATASET, data.ZIP_MODE)
    )
    return data.VAL_SHARE > 0 and not data.VAL_LABELS and not by_folders


def _open_label_file(config: CfgNode, file: str) -> LabelFileSource:
    if not file:
        raise UserError(
            "DATA.MULTI_LABEL: needs files with the classes of the images, DATA.TRAIN_LABELS and VAL_LABELS"
        )
    if not config.DATA.DATA_PATH:
        raise UserError(f"DATA.DATA_PATH is empty: give the folder that the paths in {file} lie below with --data-path")
    return LabelFileSource(config.DATA.DATA_PATH, file, several=config.DATA.MULTI_LABEL)


def _open_parts(config: CfgNode, rank: int, world_size: int) -> dict[str, Source]:
    data = config.DATA
    if data.TRAIN_LABELS or data.MULTI_LABEL:
        return split_by_content(_open_label_file(config, data.TRAIN_LABELS), data.VAL_SHARE)
    how = (data.ZIP_MODE, data.CACHE_MODE, rank, world_size, data.BATCH_SIZE)
    return open_parts(data.DATA_PATH, data.DATASET, data.VAL_SHARE, *how)


def open_train_and_val(
    config: CfgNode, rank: int, world_size: int, notify: Callable[[str], None]
) -> tuple[Source, Source]:
    """The training and the validation images; `notify` and UserError are as in `open_validation`."""
    if holds_out(config):
        train, val = _open_parts(config, rank, world_size).values()
        if few := without_images(val):
            notify(f"{config.DATA.DATA_PATH}: {few}")
        return train, val
    if config.DATA.VAL_SHARE:
        notify(f"DATA.VAL_SHARE = {config.DATA.VAL_SHARE}: is not used, the data have a validation set")
    train = open_split(config, "train", rank, world_size)
    return train, open_validation(config, train.classes, rank, world_size, notify)


def open_validation(
    config: CfgNode, classes: Sequence[str], rank: int, world_size: int, notify: Callable[[str], None]
) -> Source:
    """The validation images, with the indices that `classes`, those of the training images, have.

    `notify` is called with one line where classes have no validation images. UserError where an image is of a class
    that is not among them.
    """
    source = with_classes(open_split(config, "val", rank, world_size), classes, config.DATA.DATA_PATH)
    if renamed := [pair for pair in zip(classes, source.classes) if pair[0] != pair[1]]:
        notify(
            f"{config.DATA.DATA_PATH}: {len(renamed)} classes have other names in val than in train, the first "
            f"{renamed[0][1]!r} for {renamed[0][0]!r}: their indices are taken"
        )
    if few := without_images(source):
        notify(f"{config.DATA.DATA_PATH}: {few}")
    return source


def open_for_evaluation(config: CfgNode, trained_on: Sequence[str], notify: Callable[[str], None]) -> Source:
    """The validation images for weights whose outputs are `trained_on`, the names of a checkpoint's classes.

    Indices are those of `trained_on` where the images are of these classes, else those of the training folders, where
    there are any, else those of the validation folders themselves. `trained_on` may be empty, or numbers where names
    are not known. `notify` and UserError are as in `open_validation`.
    """
    config = with_values(config, {"DATA.CACHE_MODE": "no"})  # a single pass gains nothing from a cache
    source = open_split(config, "val", rank=0, world_size=1)
    classes = list(trained_on)
    if not set(source.classes) <= set(classes) and not (config.DATA.ZIP_MODE and classes):
        folder = Path(config.DATA.DATA_PATH) / SPLIT_NAMES[config.DATA.DATASET]["train"]
        if config.DATA.TRAIN_LABELS:
            classes = open_split(config, "train", rank=0, world_size=1).classes
        elif folder.is_dir() and not config.DATA.ZIP_MODE:
            classes = class_folders(folder)
        else:
            classes = source.classes
    source = with_classes(source, classes, config.DATA.DATA_PATH)
    if few := without_images(source):
        notify(f"{config.DATA.DATA_PATH}: {few}")
    return source


def class_balance(config: CfgNode, source: Source) -> ClassBalance | None:
    """How DATA.CLASS_BALANCE draws the training images; None where it is off."""
    strength = config.DATA.CLASS_BALANCE
    return ClassBalance(source.samples.labels, strength) if strength else None


def train_dataset(config: CfgNode, source: Source) -> ImageDataset:
    """Augmented images and class indices: float32 (3, size, size), or with DATA.FAST_LOADING uint8 (size, size, 3)."""
    if config.DATA.FAST_LOADING == "no":
        return ImageDataset(source, train_transform(config))
    transform = fast_train_transform(config)
    return ImageDataset(source, transform, transform.decode_crop)


def eval_dataset(config: CfgNode, source: Source) -> ImageDataset:
    """The views that TEST.TTA crops from each image, and its class index.

    Views are float32 (views, 3, size, size), or with DATA.FAST_LOADING 'all' uint8 (views, size, size, 3).
    """
    if config.DATA.FAST_LOADING == "all":
        return ImageDataset(source, fast_views_transform(config), decode_to_tensor)
    return ImageDataset(source, views_transform(config))
