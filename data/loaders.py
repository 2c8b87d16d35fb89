"""Loaders for training and evaluation, of any task's samples.

torch's DataLoader rather than timm's: timm's pads the last evaluation shard with images that it then counts twice, and
its training order cannot be continued in the middle of an epoch.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate
from yacs.config import CfgNode

from configs import UserError

from .datasets import AugmentedDataset, AugmentedSample
from .samplers import ClassBalance, TrainingOrder
from .stages import in_epoch, map_stages
from .workers import init_worker, usable_workers

Collate = Callable[[list[Any]], Any]  # from samples to a batch


class TrainingData:
    """Training batches of this process, from any position on.

    Args:
        config: the run's configuration.
        dataset: `dataset[index]` -> a sample, any nested tensors, randomly augmented. A sample that cannot be read
            raises UserError. For messages, if it has them: `dataset.name(index)`; `dataset.check(index)`, which raises
            that UserError without drawing random numbers; `dataset.remark(index)`, which is asked in the first epoch
            right after `dataset[index]`: one line on what is wrong with a sample that can be read, or ''. Several by
            epoch (`data.stages`) hold the same samples, seen in another way.
        rank, world_size: this process among all.
        pin_memory: give batches in page-locked memory.
        notify: is called with one line for every sample that cannot be read, and for the first remark and their count.
        collate: from a list of samples to a batch; torch's default_collate by default.
        samples_log: file that gets a line for every batch: epoch, update, sample indices; None: no such log.
        balance: the classes of the samples, where they are to be seen more evenly than there are.
        batch_size: samples of a batch; may be by epoch. None: DATA.BATCH_SIZE.

    Raises UserError where the training set cannot fill one update, or DATA.REPEATS does not divide one.
    """

    def __init__(
        self,
        config: CfgNode,
        dataset: Dataset | list,
        rank: int,
        world_size: int,
        pin_memory: bool,
        notify: Callable[[str], None],
        collate: Collate = default_collate,
        samples_log: Path | None = None,
        balance: ClassBalance | None = None,
        batch_size: int | list | None = None,
    ) -> None:
        self.dataset = in_epoch(dataset, 0)
        self.batch_size = batch_size or config.DATA.BATCH_SIZE
        batches = world_size * config.TRAIN.ACCUMULATION_STEPS
        self.order = TrainingOrder(
            num_samples=len(self.dataset),
            global_batch=map_stages(lambda images: images * batches, self.batch_size),
            rank=rank,
            world_size=world_size,
            seed=config.SEED,
            sharded=config.DATA.ZIP_MODE and config.DATA.CACHE_MODE == "part",
            repeats=config.DATA.REPEATS,
            balance=balance,
        )
        workers = usable_workers(config)
        self.loader = DataLoader(
            AugmentedDataset(dataset, config.SEED),
            batch_size=in_epoch(self.batch_size, 0),
            sampler=self.order,
            collate_fn=_WithIndices(collate),
            num_workers=workers,
            pin_memory=pin_memory and config.DATA.PIN_MEMORY,
            persistent_workers=workers > 0,
            worker_init_fn=init_worker,
        )
        self.accumulation = config.TRAIN.ACCUMULATION_STEPS
        self.max_unreadable = config.DATA.MAX_UNREADABLE
        self.notify = notify
        self.samples_log = samples_log
        self.unreadable: set[int] = set()

    @property
    def updates_per_epoch(self) -> int | list:
        """Updates of a whole epoch; by epoch where the batch size is."""
        return self.order.updates_per_epoch

    def batches(self, epoch: int, update: int) -> Iterator[Any]:
        """Batch after batch, from this update of this epoch to its end, on the CPU.

        An unreadable sample is named and replaced by its next readable neighbour; UserError after too many of them.
        """
        self.order.set_position(epoch, update)
        self.loader.batch_sampler.batch_size = in_epoch(self.batch_size, epoch)
        expected = iter(self.order)
        remarks = 0
        for number, (batch, used, remarked) in enumerate(self.loader):
            if remarked and not remarks:
                self.notify(remarked[0])
            remarks += len(remarked)
            if remarks > 1 and number + 1 == len(self.loader):  # here: nothing asks for a batch after the last one
                share = f" of process {self.order.rank}" if self.order.world_size > 1 else ""
                self.notify(f"{remarks} images{share} in this epoch are like the first that was named; see tools.check")
            for wanted, index in zip(itertools.islice(expected, len(used)), used):
                if wanted.index != index:
                    self._report_unreadable(wanted.index, index)
            if self.samples_log is not None:
                self._log_samples(f"{epoch} {update + number // self.accumulation} {' '.join(map(str, used))}\n")
            yield batch

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
        name = getattr(self.dataset, "name", "sample {}".format)
        try:
            getattr(self.dataset, "check", self.dataset.__getitem__)(index)
            problem = f"{name(index)}: could not be read a moment ago"
        except UserError as error:
            problem = error.one_line()
        self.notify(f"{problem}; {name(substitute)} is used instead")
        if len(self.unreadable) > self.max_unreadable:
            raise UserError(
                f"{len(self.unreadable)} unreadable training images, the last: {problem}; more than "
                f"DATA.MAX_UNREADABLE = {self.max_unreadable}, see python -m tools.check"
            )


class _WithIndices:
    """Collates AugmentedSamples to (batch, indices, remarks). A class, because loader workers may need to pickle it."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[AugmentedSample]) -> tuple[Any, list[int], list[str]]:
        remarks = [remark for *_, remark in samples if remark]
        return self.collate([sample for sample, *_ in samples]), [index for _, index, _ in samples], remarks


def build_eval_loader(
    config: CfgNode,
    dataset: Dataset,
    rank: int,
    world_size: int,
    pin_memory: bool,
    collate: Collate = default_collate,
    keep_workers: bool = False,
) -> tuple[DataLoader, list[range]]:
    """Every `world_size`-th batch of a dataset, and the indices of all the batches.

    Which samples make up a batch does not depend on the number of processes, and so the bits of a prediction do not.
    Each sample is in exactly one batch. `keep_workers` is for a loader that is run over several times.
    """
    size, workers = config.DATA.BATCH_SIZE, usable_workers(config)
    batches = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
    loader = DataLoader(
        dataset,
        batch_sampler=batches[rank::world_size],
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory and config.DATA.PIN_MEMORY,
        persistent_workers=keep_workers and workers > 0,
        worker_init_fn=init_worker,
    )
    return loader, batches
