"""COCO's JSON: found, read, checked, and kept in little memory.

A split is a JSON file with `images`, `annotations` and `categories`, and a folder of images. Masks are polygons, or run
lengths, compressed or not. What COCO leaves out means: iscrowd 0, and the area of the mask, else of the box.
"""

import hashlib
import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval.core import mask as run_length
from yacs.config import CfgNode

from configs import UserError
from configs.errors import one_line
from data.raw import raw_annotations

# Where the annotations and images of a split are looked for, below the data path.
JSON_FILES = {
    "train": (
        *("annotations/instances_train2017.json", "annotations/instances_train.json", "instances_train.json"),
        *("annotations/train.json", "train.json", "train/_annotations.coco.json"),
    ),
    "val": (
        *("annotations/instances_val2017.json", "annotations/instances_val.json", "instances_val.json"),
        *("annotations/val.json", "val.json", "valid/_annotations.coco.json"),
    ),
}
IMAGE_FOLDERS = {
    "train": ("train2017", "train", "images/train2017", "images/train", "images", "."),
    "val": ("val2017", "val", "valid", "images/val2017", "images/val", "images", "."),
}


class CocoImage(NamedTuple):
    """An image as its JSON describes it."""

    id: int
    file_name: str
    width: int
    height: int


class CocoSplit:
    """The images of a split and their objects.

    Args:
        path: the JSON file.
        folder: holds the images.
        images: in the order of the file.
        categories: {id: name}, by rising id; every name is there once.
        objects: of each image, its annotations.
        digest: SHA-256 of the JSON file.
        notes: what is left out, a line each.

    Objects are kept as bytes in one array: loader workers then share them instead of copying them one by one.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        images: Sequence[CocoImage],
        categories: dict[int, str],
        objects: Sequence[list[dict[str, Any]]],
        digest: str,
        notes: Sequence[str],
    ) -> None:
        self.path, self.folder, self.images, self.categories = path, folder, images, categories
        self.digest, self.notes = digest, notes
        packed = [pickle.dumps(of_image) for of_image in objects]
        self._ends = np.cumsum([len(part) for part in packed])
        self._packed = np.frombuffer(b"".join(packed), np.uint8)
        self.counts = dict.fromkeys(categories, 0)  # objects of each category, crowds too
        self.without_mask: list[int] = []  # ids of objects, crowds aside
        for annotation in (annotation for of_image in objects for annotation in of_image):
            self.counts[annotation["category_id"]] += 1
            if not annotation["segmentation"] and not annotation["iscrowd"]:
                self.without_mask.append(annotation["id"])

    def __len__(self) -> int:
        return len(self.images)

    def objects(self, index: int) -> list[dict[str, Any]]:
        """The annotations of an image: id, category_id, bbox [x, y, width, height], area, iscrowd, segmentation.

        `segmentation` is None where there is no mask.
        """
        start = int(self._ends[index - 1]) if index else 0
        return pickle.loads(self._packed[start : int(self._ends[index])].tobytes())

    def file(self, index: int) -> Path:
        return self.folder / self.images[index].file_name

    @property
    def num_objects(self) -> int:
        return sum(self.counts.values())


def open_split(config: CfgNode, split: str) -> CocoSplit:
    """The images of 'train' or 'val' as configured; UserError where something is missing or wrong."""
    keys = {"train": ("TRAIN_JSON", "TRAIN_IMAGES"), "val": ("VAL_JSON", "VAL_IMAGES")}[split]
    named_json, named_folder = (config.DATA[key] for key in keys)
    root = Path(config.DATA.DATA_PATH)
    if not config.DATA.DATA_PATH and not (Path(named_json).is_absolute() and Path(named_folder).is_absolute()):
        raise UserError("no data: give the folder of the annotations and images with --data-path")
    if not root.is_dir():
        raise UserError(f"--data-path {root}: no such folder")
    paths = [root / named_json] if named_json else [root / name for name in JSON_FILES[split]]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        looked_for = named_json or ", ".join(JSON_FILES[split])
        how = (not named_json and raw_annotations(root)) or f"name the file with DATA.{keys[0]}"
        raise UserError(f"{root}: has no annotations for {split} ({looked_for}); {how}")
    folders = [root / named_folder] if named_folder else [root / name for name in IMAGE_FOLDERS[split]]
    return read_json(path, folders, f"DATA.{keys[1]}")


def read_json(path: Path, folders: Sequence[Path], folder_key: str = "DATA.TRAIN_IMAGES") -> CocoSplit:
    """Read a JSON file and check what it says.

    Args:
        path: the file.
        folders: the images' is the first of these that has the first image.
        folder_key: the configuration key that names it, for messages.

    Raises UserError, one line that names the file and the entry, for whatever COCO's format does not allow.
    """
    try:
        encoded = path.read_bytes()
        content = json.loads(encoded)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {one_line(error)}") from None
    reader = _Reader(path)
    reader.need(isinstance(content, dict), "must hold an object with images, annotations and categories")
    images = reader.images(reader.entries(content, "images"))
    categories = reader.categories(reader.entries(content, "categories"))
    objects = reader.objects(reader.entries(content, "annotations"), images, categories)
    folder = next((folder for folder in folders if (folder / images[0].file_name).is_file()), None)
    if folder is None:
        raise UserError(
            f"{path}: its first image, {images[0].file_name}, is not in {', '.join(map(str, folders))}; name the "
            f"images' folder with {folder_key}"
        )
    return CocoSplit(path, folder, images, categories, objects, hashlib.sha256(encoded).hexdigest(), reader.notes)


class _Reader:
    """Checks the entries of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []

    def need(self, condition: bool, what: str) -> None:
        if not condition:
            raise UserError(f"{self.path}: {what}")

    def entries(self, content: dict[str, Any], name: str) -> list[dict[str, Any]]:
        entries = content.get(name)
        self.need(isinstance(entries, list), f"has no list of {name}; a COCO JSON has images, annotations, categories")
        wrong = next((i for i, entry in enumerate(entries) if not isinstance(entry, dict)), None)
        self.need(wrong is None, f"{name}[{wrong}]: must be an object")
        self.need(name == "annotations" or len(entries) > 0, f"has no {name}")
        return entries

    def ids(self, entries: list[dict[str, Any]], name: str) -> None:
        seen = set()
        for number, entry in enumerate(entries):
            found = entry.get("id")
            self.need(_is_int(found), f"{name}[{number}]: id {found!r} must be a whole number")
            self.need(found not in seen, f"{name}[{number}]: id {found} is there twice; give every one its own")
            seen.add(found)

    def images(self, entries: list[dict[str, Any]]) -> list[CocoImage]:
        self.ids(entries, "images")
        images = []
        for entry in entries:
            where = f"image {entry['id']}"
            name, width, height = (entry.get(key) for key in ("file_name", "width", "height"))
            self.need(isinstance(name, str) and name != "", f"{where}: needs a file_name")
            good = all(_is_int(value) and value > 0 for value in (width, height))
            self.need(good, f"{where} ({name}): width {width!r} and height {height!r} must be whole numbers of pixels")
            images.append(CocoImage(entry["id"], name, width, height))
        return images

    def categories(self, entries: list[dict[str, Any]]) -> dict[int, str]:
        self.ids(entries, "categories")
        for entry in entries:
            self.need(isinstance(entry.get("name"), str), f"category {entry['id']}: needs a name")
        names = [entry["name"] for entry in entries]
        return {
            entry["id"]: entry["name"] if names.count(entry["name"]) == 1 else f"{entry['name']} ({entry['id']})"
            for entry in sorted(entries, key=lambda entry: entry["id"])
        }

    def objects(
        self, entries: list[dict[str, Any]], images: list[CocoImage], categories: dict[int, str]
    ) -> list[list[dict[str, Any]]]:
        by_id = {image.id: (number, image) for number, image in enumerate(images)}
        of_image: list[list[dict[str, Any]]] = [[] for _ in images]
        if entries and all("id" not in entry for entry in entries):
            entries = [{**entry, "id": number} for number, entry in enumerate(entries, start=1)]
        self.ids(entries, "annotations")
        if any(entry["id"] == 0 for entry in entries):
            self.notes.append(
                f"{self.path}: an annotation has id 0: COCO's evaluators never count it as found; number them from 1"
            )
        strangers = 0
        for entry in entries:
            image_id = entry.get("image_id")
            if not _is_number(image_id) or image_id not in by_id:
                strangers += 1
                continue
            number, image = by_id[image_id]
            of_image[number].append(self.object(entry, image, categories))
        if strangers:
            self.notes.append(f"{self.path}: {strangers} annotations of images that it does not list are left out")
        return of_image

    def object(self, entry: dict[str, Any], image: CocoImage, categories: dict[int, str]) -> dict[str, Any]:
        where = f"annotation {entry['id']}"
        category, box, crowd = entry.get("category_id"), entry.get("bbox"), entry.get("iscrowd", 0)
        known = _is_number(category) and category in categories
        self.need(known, f"{where}: category_id {category!r} is not among the categories")
        self.need(crowd in (0, 1), f"{where}: iscrowd {crowd!r} must be 0 or 1")
        masks = self.mask(where, entry.get("segmentation"), image)
        if box is None and masks:
            box = run_length.toBbox(encode_mask(masks, image.height, image.width)).tolist()
        good = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))
        self.need(good, f"{where}: bbox {box!r:.80} must be four numbers, [x, y, width, height]")
        area = entry.get("area")
        if area is None:
            encoded = masks and encode_mask(masks, image.height, image.width)
            area = float(run_length.area(encoded)) if encoded else box[2] * box[3]
        self.need(_is_number(area), f"{where}: area {area!r} must be a number")
        return {
            "id": entry["id"],
            "category_id": category,
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
            "segmentation": masks,
        }

    def mask(self, where: str, mask: Any, image: CocoImage) -> Any:
        """The segmentation as it is, without polygons of fewer than three points; None where nothing is left."""
        if not mask:
            return None
        if isinstance(mask, dict):
            size, counts = mask.get("size"), mask.get("counts")
            expected = [image.height, image.width]
            self.need(size == expected, f"{where}: run lengths of size {size!r}, its image has {expected}")
            if isinstance(counts, list):
                good = all(_is_int(count) and count >= 0 for count in counts)
                self.need(good and sum(counts) == math.prod(expected), f"{where}: run lengths do not fill the image")
            else:
                self.need(isinstance(counts, str), f"{where}: run lengths need counts, text or a list")
                try:
                    run_length.area(mask)
                except (ValueError, RuntimeError) as error:
                    self.need(False, f"{where}: damaged run lengths: {one_line(error)}")
            return mask
        good = isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask)
        self.need(good, f"{where}: segmentation must be a list of polygons, or run lengths with size and counts")
        for polygon in mask:
            good = len(polygon) % 2 == 0 and all(map(_is_number, polygon))
            self.need(good, f"{where}: a polygon must be a list of numbers x1, y1, x2, y2, ...")
        return [polygon for polygon in mask if len(polygon) >= 6] or None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def encode_mask(mask: Any, height: int, width: int) -> dict[str, Any]:
    """A segmentation of any form as compressed run lengths, of an image of this size, pixels."""
    if isinstance(mask, list):
        return run_length.merge(run_length.frPyObjects(mask, height, width))
    return run_length.frPyObjects(mask, height, width) if isinstance(mask["counts"], list) else mask


def match_classes(split: CocoSplit, classes: Sequence[str]) -> dict[int, int]:
    """{category id: index of its name in `classes`}; UserError where the split has objects of another class.

    Categories without objects and without a class of their name are left out.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    for category, name in split.categories.items():
        if name not in numbers and split.counts[category]:
            raise UserError(
                f"{split.path}: {split.counts[category]} objects are of category {name!r}, which is none of the "
                f"{len(classes)} classes that are learned ({', '.join(classes[:5])}{', ...' * (len(classes) > 5)})"
            )
    return {category: numbers[name] for category, name in split.categories.items() if name in numbers}


def check_masks(split: CocoSplit, detector: str) -> None:
    """Raise UserError where the detector learns masks and objects of the split have none."""
    if detector == "mask_rcnn" and split.without_mask:
        raise UserError(
            f"{split.path}: {len(split.without_mask)} of {split.num_objects} objects have no mask (the first is "
            f"annotation {split.without_mask[0]}); MODEL.DETECTOR faster_rcnn learns boxes alone"
        )
