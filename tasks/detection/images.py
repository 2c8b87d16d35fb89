"""Images with their objects as torch datasets."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as run_length
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import clip_boxes_to_image
from yacs.config import CfgNode

from configs import UserError
from configs.errors import one_line
from data import ImageDataset
from data.decoding import upright
from data.sources import PictureSource

from .coco import CocoSplit, encode_mask
from .transforms import Targets, drop_vanished, new_size

Sample = tuple[Tensor, Targets]


class TrainImages(Dataset):
    """`dataset[index]` -> (image uint8 (3, H, W), targets), augmented; crowds are left out.

    Args:
        split: the images.
        labels: {category id: label}.
        transform: of a Pillow image and its targets, `transforms.TrainTransform`.
        with_masks: whether targets have masks.

    An image that cannot be read, or is not of the size that its annotations say, raises UserError.
    """

    def __init__(
        self,
        split: CocoSplit,
        labels: Mapping[int, int],
        transform: Callable[[Image.Image, Targets], tuple[Image.Image, Targets]],
        with_masks: bool,
    ) -> None:
        self.split, self.labels, self.transform, self.with_masks = split, labels, transform, with_masks
        self.files = files_of(split)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Sample:
        image, targets = self.transform(read_image(self.split, self.files, index), self.targets(index))
        return to_tensor(image), targets

    def check(self, index: int) -> None:
        """Raise the UserError of an image that cannot be used, without drawing random numbers."""
        read_image(self.split, self.files, index)
        self.targets(index)

    def name(self, index: int) -> str:
        return self.files.name(index)

    def targets(self, index: int) -> Targets:
        """The objects of an image, as `transforms` describes them, clipped to the image."""
        shape = self.split.images[index]
        objects = [entry for entry in self.split.objects(index) if not entry["iscrowd"]]
        corners = [[x, y, x + width, y + height] for x, y, width, height in (entry["bbox"] for entry in objects)]
        boxes = clip_boxes_to_image(torch.tensor(corners).reshape(-1, 4).float(), (shape.height, shape.width))
        targets = {"boxes": boxes, "labels": torch.tensor([self.labels[e["category_id"]] for e in objects]).long()}
        if self.with_masks:
            encoded = [encode_mask(entry["segmentation"], shape.height, shape.width) for entry in objects]
            try:
                masks = [torch.from_numpy(run_length.decode(one)) for one in encoded]
            except ValueError as error:
                raise UserError(f"{self.split.path}: {shape.file_name}: damaged mask: {one_line(error)}") from None
            nothing = torch.zeros(0, shape.height, shape.width, dtype=torch.uint8)
            targets["masks"] = torch.stack(masks).contiguous() if masks else nothing
        return drop_vanished(targets)


class EvalImages(Dataset):
    """`dataset[index]` -> (index, image uint8 (3, H, W)), resized to be evaluated."""

    def __init__(self, split: CocoSplit, config: CfgNode) -> None:
        self.split, self.config = split, config
        self.files = files_of(split)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, eval_view(read_image(self.split, self.files, index), self.config)


def files_of(split: CocoSplit) -> ImageDataset:
    return ImageDataset(PictureSource([split.file(index) for index in range(len(split))]), lambda image: image)


def read_image(split: CocoSplit, files: ImageDataset, index: int) -> Image.Image:
    """An image, upright where its size is then that of its annotations, else as it is stored."""
    expected = split.images[index]
    size = (expected.width, expected.height)
    image = upright(files.load(index), size)
    if image.size != size:
        raise UserError(
            f"{files.name(index)}: has {image.width} x {image.height} pixels, {split.path} says {size[0]} x {size[1]}"
        )
    return image


def eval_view(image: Image.Image, config: CfgNode) -> Tensor:
    """An image as the detector evaluates it: resized, uint8 (3, H, W)."""
    size = new_size(*image.size, config.TEST.MIN_SIZE, config.TEST.MAX_SIZE)
    return to_tensor(image.resize(size, Image.Resampling.BILINEAR))


def to_tensor(image: Image.Image) -> Tensor:
    """Pillow image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def collate(samples: list[Any]) -> Any:
    """Images of a batch differ in size: a batch is a tuple of lists."""
    return tuple(list(values) for values in zip(*samples))
