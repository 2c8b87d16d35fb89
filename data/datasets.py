"""Labelled images as torch datasets."""

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from configs import UserError
from configs.errors import one_line

from .decoding import decode_image, lost_content
from .randomness import AUGMENTATION, seed_everything
from .samplers import SampleKey
from .sources import Source
from .stages import in_epoch

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
MAX_SUBSTITUTES = 16  # neighbours tried in place of an unreadable image


class ImageDataset(Dataset):
    """Images of a source, decoded and transformed: `dataset[index]` -> (transformed image, class index).

    Where images have several classes, a tuple, it gives (K,) float32 instead: 1 for these classes and 0 for others.

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
        self.last_read = (-1, b"")  # index and content of a file

    def __len__(self) -> int:
        return len(self.source.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.transform(self.load(index)), self.source.samples[index][1]
        return image, multi_hot(label, len(self.classes)) if isinstance(label, tuple) else label

    def load(self, index: int) -> Any:
        """The decoded image, before any transform."""
        try:
            self.last_read = index, self.source.read(index)
            return self.decode(self.last_read[1])
        except _DECODING_ERRORS as error:
            raise UserError(f"{self.name(index)}: cannot be read as an image: {one_line(error)}") from None

    def check(self, index: int) -> None:
        """Raise UserError where the file cannot be decoded as a whole, whatever part a crop would show."""
        ImageDataset(self.source, self.transform).load(index)

    def remark(self, index: int) -> str:
        """What is wrong with the image that was loaded last, though it can be read; '' for nothing."""
        if self.last_read[0] != index:
            return ""
        lost = ""
        with contextlib.suppress(*_DECODING_ERRORS):  # a remark ends no run
            lost = lost_content(self.last_read[1])
        return f"{self.name(index)}: comes out nearly constant: {lost}" if lost else ""

    def name(self, index: int) -> str:
        """The path of an image, for messages."""
        return self.source.samples[index][0]


def multi_hot(labels: Sequence[int], num_classes: int) -> Tensor:
    """Class indices -> (K,) float32, 1 for these and 0 for others."""
    return torch.zeros(num_classes).index_fill_(0, torch.tensor(labels, dtype=torch.int64), 1.0)


class AugmentedSample(NamedTuple):
    """What `AugmentedDataset` gives."""

    sample: Any
    index: int  # of the sample, in the data set
    remark: str  # what is wrong with it, though it can be read


class AugmentedDataset(Dataset):
    """The training view of any dataset: `dataset[SampleKey(epoch, index, view)]` -> AugmentedSample.

    Augmentation depends on (seed, epoch, index, view) alone. So a view looks the same whichever process, worker or
    restarted run loads it.

    A sample that cannot be read (UserError) is replaced by the next readable one of the data set. The index that is
    returned says which one it is; the caller reports it. In the first epoch, `dataset.remark(index)` is asked, where
    there is one.

    `dataset` may be several by epoch (`data.stages`), of the same samples.
    """

    def __init__(self, dataset: Dataset | list, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(in_epoch(self.dataset, 0))

    def __getitem__(self, key: SampleKey) -> AugmentedSample:
        epoch, index, view = key
        dataset = in_epoch(self.dataset, epoch)
        view_key = (view,) if view else ()  # without one: the bits of runs in which an image has one view
        for attempt in range(MAX_SUBSTITUTES):
            candidate = (index + attempt) % len(dataset)
            seed_everything(AUGMENTATION, self.seed, epoch, candidate, *view_key)
            try:
                sample = dataset[candidate]
            except UserError:
                if attempt == MAX_SUBSTITUTES - 1:
                    raise
                continue
            remark = getattr(dataset, "remark", None) if epoch == 0 else None
            return AugmentedSample(sample, candidate, remark(candidate) if remark else "")
        raise AssertionError("unreachable")
