"""From an image and its class map to tensors: augmented for training, resized for evaluation.

Training draws from torch's generator alone, which the loader seeds by (seed, epoch, image).
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F
from yacs.config import CfgNode

from .folders import IGNORED, MaskedImages

_TRIES = 10  # for a crop in which no class covers too much
_MEAN_COLOUR = [round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN]  # around small images: 0 once normalised


class PhotometricDistort(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation, hue. torchvision's exchanges colour channels too."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


class TrainingTransform:
    """Random scale, crop, flip and colours: (image, class map) -> uint8 (h, w, 3), int16 (h, w) of the crop's size."""

    def __init__(self, config: CfgNode) -> None:
        self.config = config
        self.colours = PhotometricDistort()

    def __call__(self, picture: Image.Image, classes: np.ndarray) -> tuple[Tensor, Tensor]:
        aug = self.config.AUG
        image, mask = F.pil_to_tensor(picture), torch.from_numpy(classes)[None]
        low, high = aug.SCALE
        size = resized(self.config, mask.shape[1:], low + (high - low) * torch.rand(()).item())
        # torchvision's own for masks takes the pixel before the centre: the mask would move by up to half a pixel.
        image, mask = F.resize(image, size), F.resize(mask, size, InterpolationMode.NEAREST_EXACT)
        image, mask = self._crop(image, mask)
        if torch.rand(()).item() < aug.HFLIP:
            image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
        if aug.PHOTOMETRIC:
            image = self.colours(image)
        below, right = (wanted - has for wanted, has in zip(aug.CROP, mask.shape[1:]))
        if below or right:
            image = _pad_image(image, right, below)
            mask = F.pad(mask, [0, 0, right, below], fill=IGNORED)
        return as_pixels(image), mask[0]

    def _crop(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """A crop in which no class has more than AUG.MAX_SHARE, else the last of ten."""
        height, width = (min(wanted, has) for wanted, has in zip(self.config.AUG.CROP, mask.shape[1:]))
        for _ in range(_TRIES):
            top, left = (int(torch.randint(has - size + 1, ())) for has, size in zip(mask.shape[1:], (height, width)))
            cropped = F.crop(mask, top, left, height, width)
            counted = cropped[cropped != IGNORED]
            if len(counted) and torch.bincount(counted.flatten().int()).max() <= self.config.AUG.MAX_SHARE * len(
                counted
            ):
                break
        return F.crop(image, top, left, height, width), cropped


def resized(config: CfgNode, size: tuple[int, int], factor: float = 1.0) -> list[int]:
    """Height and width of an image of this size, resized to DATA.IMG_SIZE and DATA.MAX_LONG_SIDE times `factor`.

    At least 32 pixels, the smallest that the network takes. The aspect ratio stays.
    """
    short, long = min(size), max(size)
    ratio = factor
    if config.DATA.IMG_SIZE:
        ratio *= min(config.DATA.IMG_SIZE / short, config.DATA.MAX_LONG_SIDE / long)
    return [max(32, round(ratio * edge)) for edge in size]


def as_pixels(image: Tensor) -> Tensor:
    """(3, H, W) -> (H, W, 3), as `data.normalize` takes it."""
    return image.permute(1, 2, 0).contiguous()


def _pad_image(image: Tensor, right: int, below: int) -> Tensor:
    padded = torch.tensor(_MEAN_COLOUR, dtype=torch.uint8)[:, None, None].repeat(
        1, image.shape[1] + below, image.shape[2] + right
    )
    padded[:, : image.shape[1], : image.shape[2]] = image
    return padded


def evaluation_views(config: CfgNode, picture: Image.Image, scales: list[float]) -> list[Tensor]:
    """The image at each of these scales: uint8 (h, w, 3)."""
    image = F.pil_to_tensor(picture)
    return [as_pixels(F.resize(image, resized(config, image.shape[1:], scale))) for scale in scales]


class TrainingImages(Dataset):
    """`dataset[index]` -> {'image': uint8 (h, w, 3), 'classes': int16 (h, w)}, augmented. UserError: unreadable."""

    def __init__(self, config: CfgNode, images: MaskedImages) -> None:
        self.images, self.transform = images, TrainingTransform(config)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, classes = self.transform(*self.images.load(index))
        return {"image": image, "classes": classes}

    def name(self, index: int) -> str:
        return str(self.images.root / self.images.samples[index][0])

    def check(self, index: int) -> None:
        self.images.load(index)


class EvaluationImages(Dataset):
    """`dataset[index]` -> {'views': [uint8 (h, w, 3)] of each scale, 'classes': int16 (H, W), 'index': int}.

    The class map keeps its size. A file that cannot be read raises UserError: an evaluation is of all images.
    """

    def __init__(self, config: CfgNode, images: MaskedImages) -> None:
        self.config, self.images = config, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture, classes = self.images.load(index)
        views = evaluation_views(self.config, picture, list(self.config.TEST.SCALES))
        return {"views": views, "classes": torch.from_numpy(classes), "index": index}
