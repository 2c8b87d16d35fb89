"""Inspect a data set in COCO's format before a long run: annotations, and every image as training reads it."""

import hashlib
from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset
from yacs.config import CfgNode

from configs import UserError
from data import usable_workers
from data.workers import init_worker

from ..problems import ERROR, WARNING, Copies, Problem, in_order, open_splits
from .coco import CocoSplit, check_masks, match_classes, open_split
from .images import TrainImages
from .metrics import kinds_of

# kind -> (level, what it means), in the order of the report
KINDS = {
    "split": (ERROR, "split that training cannot open"),
    "classes": (ERROR, "class of val that train does not have"),
    "masks": (ERROR, "objects without masks, which the detector learns"),
    "image": (ERROR, "image or mask that training cannot read"),
    "train-and-val": (ERROR, "image that is in both train and val"),
    "no-extent": (WARNING, "box without extent; training leaves it out"),
    "outside": (WARNING, "box beyond its image; training cuts it off"),
    "empty-area": (WARNING, "object with an area of 0"),
    "unused-class": (WARNING, "class without objects"),
    "duplicate": (WARNING, "image that is in a split twice"),
    "note": (WARNING, "what is left out or counts otherwise"),
}


class _Inspections(Dataset):
    """Of each image: the digest of its bytes, and why training cannot use it, '' where it can."""

    def __init__(self, split: CocoSplit, with_masks: bool) -> None:
        labels = dict.fromkeys(split.categories, 0)
        self.images = TrainImages(split, labels, lambda image, targets: (image, targets), with_masks)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[bytes, str]:
        try:
            self.images.check(index)
            return hashlib.sha256(self.images.split.file(index).read_bytes()).digest(), ""
        except UserError as error:
            return b"", error.one_line()


def check(config: CfgNode) -> list[Problem]:
    """What is wrong with the configured data, in the order of KINDS; UserError where --data-path is no folder."""
    splits, problems = open_splits(config, open_split)
    copies = Copies()
    for name, split in splits.items():
        problems += _check_annotations(config, name, split)
        problems += _check_images(config, name, split, copies)
    if len(splits) == 2:
        try:
            match_classes(splits["val"], list(splits["train"].categories.values()))
        except UserError as error:
            problems.append(Problem("classes", "val", error.one_line()))
    return in_order(problems, KINDS)


def _check_annotations(config: CfgNode, name: str, split: CocoSplit) -> Iterator[Problem]:
    yield from (Problem("note", name, note) for note in split.notes)
    try:
        check_masks(split, config.MODEL.DETECTOR)
    except UserError as error:
        yield Problem("masks", name, error.one_line())
    for category, count in split.counts.items():
        if not count and name == "train":
            yield Problem("unused-class", name, split.categories[category])
    for index, image in enumerate(split.images):
        path = f"{name}/{image.file_name}"
        for entry in split.objects(index):
            x, y, width, height = entry["bbox"]
            what = f"annotation {entry['id']}: box {entry['bbox']}"
            if width <= 0 or height <= 0:
                yield Problem("no-extent", path, what)
            # Annotators round: what reaches less than a pixel beyond the edge is common and harmless.
            elif min(x, y) <= -1 or x + width >= image.width + 1 or y + height >= image.height + 1:
                yield Problem("outside", path, f"{what}, the image has {image.width} x {image.height} pixels")
            if entry["area"] <= 0:
                yield Problem("empty-area", path, f"annotation {entry['id']}")


def _check_images(config: CfgNode, name: str, split: CocoSplit, copies: Copies) -> Iterator[Problem]:
    inspections = _Inspections(split, "mask" in kinds_of(config.MODEL.DETECTOR) and not split.without_mask)
    loader = DataLoader(inspections, batch_size=None, num_workers=usable_workers(config), worker_init_fn=init_worker)
    for image, (digest, reason) in zip(split.images, loader):
        path = f"{name}/{image.file_name}"
        if reason:
            yield Problem("image", path, reason)
            continue
        yield from copies.find(name, path, digest)
