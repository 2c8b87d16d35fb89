"""Labelled images as torch datasets."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from configs import UserError
from configs.errors import one_line

from .randomness import AUGMENTATION, seed_everything
from .samplers import SampleKey
from .sources import Source

# What Pillow, zipfile and the file system raise on damaged, missing and hostile files.
_DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    KeyError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)
# What class folders hold, by content whatever the name. Pillow would also try formats that start other programs (EPS).
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
MAX_SUBSTITUTES = 16  # neighbours tried in place of an unreadable image


def decode_image(encoded: bytes) -> Image.Image:
    """Decode to RGB as torchvision's default loader does; 16-bit grey keeps its upper 8 bits instead of clipping."""
    with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
        if image.mode.startswith("I"):
            values = np.asarray(image).astype(np.int64)
            image = Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8))
        return image.convert("RGB")


class ImageDataset(Dataset):
    """Images of a source, decoded and transformed: `dataset[index]` -> (transformed image, class index).

    Args:
        source: the files and their classes.
        transform: from what `decode` returns to what the loader is to collate.
        decode: from the bytes of a file to an image.

    A file that cannot be read raises UserError with its path; it is never replaced by another image.
    """

    def __init__(
        self, source: Source, transform: Callable[[Any], Any], decode: Callable[[bytes], Any] = decode_image
    ) -> None:
        self.source = source
        self.classes = source.classes
        self.transform = transform
        self.decode = decode

    def __len__(self) -> int:
        return len(self.source.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.load(index)), self.source.samples[index][1]

    def load(self, index: int) -> Any:
        """The decoded image, before any transform."""
        try:
            return self.decode(self.source.read(index))
        except _DECODING_ERRORS as error:
            raise UserError(f"{self.name(index)}: cannot be read as an image: {one_line(error)}") from None

    def check(self, index: int) -> None:
        """Raise UserError where the file cannot be decoded as a whole, whatever part a crop would show."""
        ImageDataset(self.source, self.transform).load(index)

    def name(self, index: int) -> str:
        """The path of an image, for messages."""
        return self.source.samples[index][0]


class AugmentedDataset(Dataset):
    """The training view of any dataset: `dataset[SampleKey(epoch, index)]` -> (augmented sample, index).

    Augmentation depends on (seed, epoch, index) alone, so the same sample of the same epoch looks the same whichever
    process, worker or restarted run loads it.

    A sample that cannot be read (UserError) is replaced by the next readable one of the data set. The index that is
    returned says which one it is; the caller reports it.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> tuple[Any, int]:
        epoch, index = key
        for attempt in range(MAX_SUBSTITUTES):
            candidate = (index + attempt) % len(self.dataset)
            seed_everything(AUGMENTATION, self.seed, epoch, candidate)
            try:
                return self.dataset[candidate], candidate
            except UserError:
                if attempt == MAX_SUBSTITUTES - 1:
                    raise
        raise AssertionError("unreachable")
