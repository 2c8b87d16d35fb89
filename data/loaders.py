"""Loaders for training and evaluation.

torch's DataLoader rather than timm's: timm's pads the last evaluation shard with images that it then counts twice, and
its training order cannot be continued in the middle of an epoch.
"""

import os
from pathlib import Path

from torch.utils.data import DataLoader, Subset
from yacs.config import CfgNode

from .datasets import AugmentedDataset, ImageDataset
from .samplers import TrainingOrder
from .sources import SPLIT_NAMES, Source, check_same_classes, class_folders, open_source
from .transforms import eval_transform, train_transform


def open_split(config: CfgNode, split: str, rank: int, world_size: int) -> Source:
    """The images of 'train' or 'val' as configured; UserError where something is missing."""
    data = config.DATA
    return open_source(data.DATA_PATH, data.DATASET, split, data.ZIP_MODE, data.CACHE_MODE, rank, world_size)


def build_train_loader(
    config: CfgNode, source: Source, rank: int, world_size: int, pin_memory: bool
) -> tuple[DataLoader, TrainingOrder]:
    """Augmented batches of DATA.BATCH_SIZE images for this process, and the order that they come in.

    `order.set_position(epoch, update)` decides where the next iteration over the loader begins.
    """
    dataset = AugmentedDataset(ImageDataset(source, train_transform(config)), config.SEED)
    order = TrainingOrder(
        num_samples=len(dataset),
        global_batch=config.DATA.BATCH_SIZE * world_size * config.TRAIN.ACCUMULATION_STEPS,
        rank=rank,
        world_size=world_size,
        seed=config.SEED,
        sharded=config.DATA.ZIP_MODE and config.DATA.CACHE_MODE == "part",
    )
    return _loader(config, dataset, pin_memory, sampler=order), order


def build_eval_loader(config: CfgNode, source: Source, rank: int, world_size: int, pin_memory: bool) -> DataLoader:
    """Batches of this process's share, every `world_size`-th image: shares differ by one, no image is in two."""
    dataset = ImageDataset(source, eval_transform(config))
    return _loader(config, Subset(dataset, range(rank, len(dataset), world_size)), pin_memory)


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


def usable_workers(config: CfgNode) -> int:
    """DATA.NUM_WORKERS, but no more than this process's share of the CPU cores. The result does not depend on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(config.DATA.NUM_WORKERS, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _loader(config: CfgNode, dataset, pin_memory: bool, sampler: TrainingOrder | None = None) -> DataLoader:
    workers = usable_workers(config)
    return DataLoader(
        dataset,
        batch_size=config.DATA.BATCH_SIZE,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory and config.DATA.PIN_MEMORY,
        drop_last=False,  # training ends at a whole update anyway, evaluation must not drop an image
        persistent_workers=workers > 0,
    )
