"""Random state as a function of what is being computed, so that nothing has to be replayed to continue a run."""

import random

import numpy as np
import torch

# First part of every key: streams that share the other parts must differ all the same.
AUGMENTATION, TRAINING_STEP, ORDER = range(3)


def derive_seed(*key: int) -> int:
    """A 64-bit seed that depends on every one of the non-negative integers of `key`."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def seed_everything(*key: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, which timm's transforms, mixup and drop path draw from."""
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.cuda.is_initialized():
        torch.manual_seed(seed)
    else:  # the same for the CPU, at a hundredth of the time: once an image and once an update, it is to cost nothing
        torch.default_generator.manual_seed(seed)
