"""The images of a classification run: opened, checked against each other, and made into datasets."""

from pathlib import Path

from yacs.config import CfgNode

from configs import SPLIT_NAMES
from data import ImageDataset, Source, class_folders
from data.fast.decoding import decode_to_tensor
from data.sources import check_same_classes, open_source

from .transforms import fast_train_transform, fast_views_transform, train_transform, views_transform


def open_split(config: CfgNode, split: str, rank: int, world_size: int) -> Source:
    """The images of 'train' or 'val' as configured; UserError where something is missing."""
    data = config.DATA
    block = data.BATCH_SIZE if split == "val" else 1  # samples that `data.loaders` deals to a process at a time
    return open_source(data.DATA_PATH, data.DATASET, split, data.ZIP_MODE, data.CACHE_MODE, rank, world_size, block)


def check_val_classes(config: CfgNode, train: Source | None, val: Source) -> None:
    """Raise UserError where the classes of training and validation differ.

    Without an open training set (`test.py`), the names of its class folders are enough, where there are any.
    """
    if train is None:
        folder = Path(config.DATA.DATA_PATH) / SPLIT_NAMES[config.DATA.DATASET]["train"]
        if config.DATA.ZIP_MODE or not folder.is_dir():
            return
        check_same_classes(class_folders(folder), val.classes, config.DATA.DATA_PATH)
    else:
        check_same_classes(train.classes, val.classes, config.DATA.DATA_PATH)


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
