"""Which image is seen when: the order of training samples and the position in it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from configs import UserError

from .randomness import ORDER, derive_seed


class SampleKey(NamedTuple):
    """A training sample: the image and the epoch in which it is seen, which decides its augmentation."""

    epoch: int
    index: int


class TrainingOrder(Sampler[SampleKey]):
    """The samples of one process in one epoch, in the order of a permutation that (seed, epoch) decide.

    Update u of an epoch sees samples [u * global_batch, (u + 1) * global_batch) of the permutation, dealt out to the
    processes one by one. So the images of an update do not depend on the number of processes, and continuing at
    update u needs no replay. What is left after the last whole update is not seen in that epoch.

    Args:
        num_samples: images in the data set.
        global_batch: images of one update, over all processes and accumulated batches.
        rank, world_size: this process among all.
        seed: the run's.
        sharded: keep every process within its own share, `range(rank, num_samples, world_size)`, which is what it has
            in memory with cache mode 'part'. The order then depends on the number of processes.

    Raises UserError where not even one update can be filled.
    """

    def __init__(
        self, num_samples: int, global_batch: int, rank: int, world_size: int, seed: int, sharded: bool = False
    ) -> None:
        self.updates_per_epoch = num_samples // global_batch
        if self.updates_per_epoch == 0:
            raise UserError(
                f"the training set has {num_samples} images, fewer than one global batch of {global_batch} "
                "(batch size * processes * accumulation steps): lower --batch-size"
            )
        self.num_samples, self.global_batch = num_samples, global_batch
        self.rank, self.world_size = rank, world_size
        self.seed, self.sharded = seed, sharded
        self.set_position(epoch=0, update=0)

    def set_position(self, epoch: int, update: int = 0) -> None:
        """Let the next iteration begin at this update of this epoch."""
        self.epoch, self.update = epoch, update

    def __len__(self) -> int:
        return (self.updates_per_epoch - self.update) * self.global_batch // self.world_size

    def __iter__(self) -> Iterator[SampleKey]:
        epoch, per_update = self.epoch, self.global_batch // self.world_size
        mine = self._permutation()[self.update * per_update : self.updates_per_epoch * per_update]
        return (SampleKey(epoch, int(index)) for index in mine)

    def indices_of(self, update: int) -> list[int]:
        """The images of this process in that update of the current epoch, for messages."""
        per_update = self.global_batch // self.world_size
        return self._permutation()[update * per_update : (update + 1) * per_update].tolist()

    def _permutation(self) -> np.ndarray:
        """This process's part of the epoch's order."""
        rng = np.random.default_rng(derive_seed(ORDER, self.seed, self.epoch))
        if self.sharded:
            shares = [rng.permutation(np.arange(r, self.num_samples, self.world_size)) for r in range(self.world_size)]
            return shares[self.rank]
        return rng.permutation(self.num_samples)[self.rank :: self.world_size]
