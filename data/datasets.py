"""Labelled images as torch datasets."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from configs import UserError

from .randomness import AUGMENTATION, seed_everything
from .samplers import SampleKey
from .sources import Source


def decode_image(encoded: bytes) -> Image.Image:
    """Decode to RGB as torchvision's default loader does; 16-bit grey keeps its upper 8 bits instead of clipping."""
    with Image.open(io.BytesIO(encoded)) as image:
        if image.mode.startswith("I"):
            values = np.asarray(image).astype(np.int64)
            image = Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8))
        return image.convert("RGB")


class ImageDataset(Dataset):
    """Images of a source, decoded and transformed: `dataset[index]` -> (transformed image, class index).

    A file that cannot be read raises UserError with its path; it is never replaced by another image.
    """

    def __init__(self, source: Source, transform: Callable[[Image.Image], Any]) -> None:
        self.source = source
        self.classes = source.classes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.source.samples[index]
        try:
            image = decode_image(self.source.read(index))
        except (OSError, ValueError, SyntaxError, KeyError, RuntimeError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: cannot be read as an image: {' '.join(str(error).split())}") from None
        return self.transform(image), label


class AugmentedDataset(Dataset):
    """The training view of a dataset: `dataset[SampleKey(epoch, index)]`, augmented by (seed, epoch, index) alone.

    So the same sample of the same epoch looks the same whichever process, worker or restarted run loads it.
    """

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        self.dataset = dataset
        self.classes = dataset.classes
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> tuple[Any, int]:
        seed_everything(AUGMENTATION, self.seed, *key)
        return self.dataset[key.index]
