"""Which image is seen when: the order of training samples and the position in it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from configs import UserError

from .randomness import ORDER, derive_seed
from .stages import as_stages, in_epoch, map_stages


class SampleKey(NamedTuple):
    """A training sample: the image, and the epoch and view in which it is seen, which decide its augmentation."""

    epoch: int
    index: int
    view: int = 0  # counted from 0 where an image is seen several times in an epoch


class ClassBalance(NamedTuple):
    """Classes that are seen more evenly than the data set holds them (Kang et al. 2020, eq. 1, with q = 1 - strength).

    A class of n images gets a part of every epoch in proportion to n ** (1 - strength).
    """

    labels: np.ndarray  # (N,) class index of every image
    strength: float  # from 0, the shares of the data set, to 1, equal shares

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` images in random order, and for each how often it came before: (count,) each.

        A class gets its part, rounded up or down; so does each of its images. (Systematic sampling.)
        """
        counts = np.bincount(self.labels)
        weights = np.where(counts > 0, np.maximum(counts, 1.0) ** (1 - self.strength), 0)
        times = count * (weights / weights.sum() / np.maximum(counts, 1))[self.labels]  # of each image, on average
        shuffled = rng.permutation(len(self.labels))
        by_class = shuffled[np.argsort(self.labels[shuffled], kind="stable")]
        # Whole numbers, 2**32 to an image: sums are exact, the same on every machine.
        ends = np.cumsum(np.rint(times[by_class] * 2**32).astype(np.int64)).clip(max=count << 32)
        ends[-1] = count << 32
        picks = np.diff((ends + rng.integers(2**32)) >> 32, prepend=0)
        copies = np.arange(count) - np.repeat(np.cumsum(picks) - picks, picks)
        mixed = rng.permutation(count)
        return np.repeat(by_class, picks)[mixed], copies[mixed]


class TrainingOrder(Sampler[SampleKey]):
    """The samples of one process in one epoch, in the order of a permutation that (seed, epoch) decide.

    Update u of an epoch sees samples [u * global_batch, (u + 1) * global_batch) of the permutation, dealt out to the
    processes one by one. So the images of an update do not depend on the number of processes, and continuing at
    update u needs no replay. What is left after the last whole update is not seen in that epoch.

    The number of updates in an epoch is always num_samples // global_batch, that epoch's. With `repeats` n, an epoch
    sees one of n images, n times each. Views of an image are neighbours in the order, and in the same update.

    Args:
        num_samples: images in the data set.
        global_batch: images of one update, over all processes and accumulated batches; may be by epoch (`data.stages`).
        rank, world_size: this process among all.
        seed: the run's.
        sharded: keep every process within its own share, `range(rank, num_samples, world_size)`, which is what it has
            in memory with cache mode 'part'. The order then depends on the number of processes.

    Raises UserError where not even one update can be filled.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch: int | list,
        rank: int,
        world_size: int,
        seed: int,
        sharded: bool = False,
        repeats: int = 1,
        balance: ClassBalance | None = None,
    ) -> None:
        for _, images in as_stages(global_batch):
            if num_samples < images:
                raise UserError(
                    f"the training set has {num_samples} images, fewer than one global batch of {images} "
                    "(batch size * processes * accumulation steps): lower --batch-size"
                )
            if images % repeats:
                raise UserError(
                    f"DATA.REPEATS = {repeats}: a global batch of {images} images is no multiple of it; "
                    "choose another --batch-size"
                )
        self.updates_per_epoch = map_stages(lambda images: num_samples // images, global_batch)  # by epoch as well
        self.num_samples, self.global_batch = num_samples, global_batch
        self.rank, self.world_size = rank, world_size
        self.seed, self.sharded = seed, sharded
        self.repeats, self.balance = repeats, balance
        self.set_position(epoch=0, update=0)

    def set_position(self, epoch: int, update: int = 0) -> None:
        """Let the next iteration begin at this update of this epoch."""
        self.epoch, self.update = epoch, update

    def images_per_update(self, epoch: int) -> int:
        """The global batch of an epoch."""
        return in_epoch(self.global_batch, epoch)

    def __len__(self) -> int:
        updates = in_epoch(self.updates_per_epoch, self.epoch) - self.update
        return updates * self.images_per_update(self.epoch) // self.world_size

    def __iter__(self) -> Iterator[SampleKey]:
        epoch, per_update = self.epoch, self.images_per_update(self.epoch) // self.world_size
        mine = slice(self.update * per_update, self.update * per_update + len(self))
        images, views = self._order()
        return (SampleKey(epoch, int(index), int(view)) for index, view in zip(images[mine], views[mine]))

    def indices_of(self, update: int) -> list[int]:
        """The images of this process in that update of the current epoch, for messages."""
        per_update = self.images_per_update(self.epoch) // self.world_size
        return self._order()[0][update * per_update : (update + 1) * per_update].tolist()

    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """This process's part of the epoch's order: images, and which view of each."""
        rng = np.random.default_rng(derive_seed(ORDER, self.seed, self.epoch))
        if self.sharded:
            shares = [rng.permutation(np.arange(r, self.num_samples, self.world_size)) for r in range(self.world_size)]
            return shares[self.rank], np.zeros_like(shares[self.rank])
        count = in_epoch(self.updates_per_epoch, self.epoch) * self.images_per_update(self.epoch) // self.repeats
        if self.balance is None:
            images, copies = rng.permutation(self.num_samples)[:count], np.zeros(count, dtype=np.int64)
        else:
            images, copies = self.balance.draw(rng, count)
        views = (self.repeats * copies[:, None] + np.arange(self.repeats)).ravel()
        mine = slice(self.rank, None, self.world_size)
        return np.repeat(images, self.repeats)[mine], views[mine]
