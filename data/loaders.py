"""Loaders for training and evaluation.

torch's DataLoader rather than timm's: timm's pads the last evaluation shard with images that it then counts twice, and
its training order cannot be continued in the middle of an epoch.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from yacs.config import CfgNode

from configs import SPLIT_NAMES, UserError
from data.fast.decoding import decode_to_tensor
from data.fast.transforms import FastEvalTransform

from .datasets import AugmentedDataset, ImageDataset, decode_image
from .samplers import TrainingOrder
from .sources import Source, check_same_classes, class_folders, open_source


def open_split(config: CfgNode, split: str, rank: int, world_size: int) -> Source:
    """The images of 'train' or 'val' as configured; UserError where something is missing."""
    data = config.DATA
    return open_source(data.DATA_PATH, data.DATASET, split, data.ZIP_MODE, data.CACHE_MODE, rank, world_size)


class TrainingData:
    """Training batches of this process, from any position on.

    Args:
        config: the run's configuration.
        source: the training images.
        rank, world_size: this process among all.
        pin_memory: give batches in page-locked memory.
        notify: is called with one line for every image that cannot be read.
        worker_init_fn: runs in every loader worker.
        samples_log: file that gets a line for every batch: epoch, update, image indices; None: no such log.

    Raises UserError where the training set cannot fill one update.
    """

    def __init__(
        self,
        config: CfgNode,
        source: Source,
        rank: int,
        world_size: int,
        pin_memory: bool,
        notify: Callable[[str], None],
        worker_init_fn: Callable[[int], None] | None = None,
        samples_log: Path | None = None,
    ) -> None:
        from tasks.classification.transforms import fast_train_transform, train_transform

        if config.DATA.FAST_LOADING == "no":
            self.images = ImageDataset(source, train_transform(config))
        else:
            transform = fast_train_transform(config)
            self.images = ImageDataset(source, transform, transform.decode_crop)
        self.config = config
        self.order = TrainingOrder(
            num_samples=len(self.images),
            global_batch=config.DATA.BATCH_SIZE * world_size * config.TRAIN.ACCUMULATION_STEPS,
            rank=rank,
            world_size=world_size,
            seed=config.SEED,
            sharded=config.DATA.ZIP_MODE and config.DATA.CACHE_MODE == "part",
        )
        dataset = AugmentedDataset(self.images, config.SEED)
        self.loader = _loader(config, dataset, pin_memory, worker_init_fn, self.order)
        self.accumulation = config.TRAIN.ACCUMULATION_STEPS
        self.max_unreadable = config.DATA.MAX_UNREADABLE
        self.notify = notify
        self.samples_log = samples_log
        self.unreadable: set[int] = set()

    @property
    def updates_per_epoch(self) -> int:
        return self.order.updates_per_epoch

    def batches(self, epoch: int, update: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and class indices (B), batch after batch, from this update of this epoch to its end.

        `finish` makes the network's input of the images, which are (B, 3, H, W), or with DATA.FAST_LOADING uint8 and
        (B, H, W, 3).

        An unreadable image is named and replaced by its next readable neighbour; UserError after too many of them.
        """
        self.order.set_position(epoch, update)
        expected = iter(self.order)
        for number, (images, labels, indices) in enumerate(self.loader):
            used = indices.tolist()
            for wanted, index in zip(itertools.islice(expected, len(used)), used):
                if wanted.index != index:
                    self._report_unreadable(wanted.index, index)
            if self.samples_log is not None:
                self._log_samples(f"{epoch} {update + number // self.accumulation} {' '.join(map(str, used))}\n")
            yield images, labels

    def finish(self, images: Tensor) -> Tensor:
        """A batch on its device -> the network's input, float32 (B, 3, H, W).

        With DATA.FAST_LOADING, batches come as uint8, and are normalised and randomly erased here.
        """
        if images.dtype != torch.uint8:
            return images
        return self.images.transform.normalize_batch(images)

    def _log_samples(self, line: str) -> None:
        try:
            with self.samples_log.open("a") as log:
                log.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.samples_log)) from None  # write() does not name it

    def _report_unreadable(self, index: int, substitute: int) -> None:
        if index in self.unreadable:
            return
        self.unreadable.add(index)
        try:
            self.images.load(index, decode_image)  # which draws nothing, as a crop would
            problem = f"{self.images.source.samples[index][0]}: could not be read a moment ago"
        except UserError as error:
            problem = error.one_line()
        self.notify(f"{problem}; {self.images.source.samples[substitute][0]} is seen in its place")
        if len(self.unreadable) > self.max_unreadable:
            raise UserError(
                f"{len(self.unreadable)} unreadable training images, the last: {problem}; more than "
                f"DATA.MAX_UNREADABLE = {self.max_unreadable}, see python -m tools.check"
            )


def build_eval_loader(
    config: CfgNode,
    source: Source,
    rank: int,
    world_size: int,
    pin_memory: bool,
    worker_init_fn: Callable[[int], None] | None = None,
) -> DataLoader:
    """Batches of this process's share, every `world_size`-th image: shares differ by one, no image is in two.

    With DATA.FAST_LOADING 'all' images are uint8 (B, H, W, 3): `normalize` them on their device.
    """
    from tasks.classification.transforms import eval_transform

    if config.DATA.FAST_LOADING == "all":
        views = FastEvalTransform(eval_transform(config).transforms)
        dataset = ImageDataset(source, lambda image: views(image)[0], decode_to_tensor)
    else:
        dataset = ImageDataset(source, eval_transform(config))
    return _loader(config, Subset(dataset, range(rank, len(dataset), world_size)), pin_memory, worker_init_fn)


def build_prediction_loader(
    config: CfgNode, source: Source, rank: int, world_size: int, device: torch.device
) -> tuple[DataLoader, list[range]]:
    """Every `world_size`-th batch: images (B, views, 3, H, W) and class indices; and the images of all the batches.

    With DATA.FAST_LOADING 'all' images are uint8 (B, views, H, W, 3): `normalize` them on their device.

    Which images make up a batch does not depend on the number of processes, and so the bits of a prediction do not.
    """
    from tasks.classification.transforms import fast_views_transform, views_transform

    if config.DATA.FAST_LOADING == "all":
        dataset = ImageDataset(source, fast_views_transform(config), decode_to_tensor)
    else:
        dataset = ImageDataset(source, views_transform(config))
    size = config.DATA.BATCH_SIZE
    batches = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
    loader = DataLoader(
        dataset,
        batch_sampler=batches[rank::world_size],
        num_workers=usable_workers(config),
        pin_memory=device.type == "cuda" and config.DATA.PIN_MEMORY,
    )
    return loader, batches


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


def available_cores() -> int:
    """CPU cores that this process may use: a scheduler or container may allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_workers(config: CfgNode) -> int:
    """DATA.NUM_WORKERS, but no more than this process's share of the CPU cores. The result does not depend on it."""
    return min(config.DATA.NUM_WORKERS, max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _loader(
    config: CfgNode,
    dataset: Dataset,
    pin_memory: bool,
    worker_init_fn: Callable[[int], None] | None,
    sampler: TrainingOrder | None = None,
) -> DataLoader:
    workers = usable_workers(config)
    return DataLoader(
        dataset,
        batch_size=config.DATA.BATCH_SIZE,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory and config.DATA.PIN_MEMORY,
        drop_last=False,  # training ends at a whole update anyway, evaluation must not drop an image
        persistent_workers=workers > 0,
        worker_init_fn=worker_init_fn,
    )
