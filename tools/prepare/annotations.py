"""Annotations of Pascal VOC and YOLO as COCO's JSON, which detection reads."""

import json
import math
import re
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import yaml
from PIL import Image

from configs import UserError
from configs.errors import one_line
from configs.text import printable
from data.decoding import upright
from data.files import files_below, is_image_name
from utils.files import write_file

HELD_OUT_EVERY = 5
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class Picture(NamedTuple):
    """A picture and its objects.

    Each has category (its name), bbox [x, y, width, height], and maybe segmentation (YOLO) or difficult (VOC).
    """

    path: Path
    width: int
    height: int
    objects: list[dict[str, Any]]


def read_voc(root: Path) -> Iterator[tuple[str, Picture]]:
    """Pictures of the XML files below `root`, each with its split, '' for none; UserError for what is no VOC file."""
    splits = {}
    for split in SPLITS:
        listed = root / "ImageSets" / "Main" / f"{split}.txt"
        if listed.is_file():
            splits |= {line.split()[0]: split for line in listed.read_text().splitlines() if line.strip()}
    pictures: dict[str, list[Path]] = {}
    for path in _files(root, is_image_name):
        pictures.setdefault(path.stem, []).append(path)
    for path in _files(root, lambda name: name.endswith(".xml")):
        if splits and path.stem not in splits:
            continue
        try:
            tree = ElementTree.parse(path).getroot()
            named = tree.findtext("filename") or path.stem
            objects = [_voc_object(entry) for entry in tree.findall("object")]
            size = tuple(int(float(tree.findtext(f"size/{edge}") or 0)) for edge in ("width", "height"))
        except (ElementTree.ParseError, OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not an annotation of Pascal VOC: {one_line(error)}") from None
        found = pictures.get(path.stem) or pictures.get(Path(named).stem)
        if not found:
            raise UserError(f"{path}: its picture, {named}, is not below {root}")
        picture = _nearest(path, named, found)
        yield splits.get(path.stem) or _split_of(picture, root), _picture(picture, objects, size)


def _nearest(path: Path, named: str, pictures: list[Path]) -> Path:
    """Of pictures with the name of an XML, the one whose folder is most like the XML's; UserError where two are."""

    def likeness(picture: Path) -> tuple[int, bool]:
        ours, theirs = path.parent.parts, picture.parent.parts
        ends = (zip(ours, theirs), zip(ours[::-1], theirs[::-1]))
        return sum(len(list(takewhile(lambda pair: pair[0] == pair[1], end))) for end in ends), picture.name == named

    first, *others = sorted(pictures, key=likeness, reverse=True)
    if others and likeness(others[0]) == likeness(first):
        raise UserError(f"{path}: its picture may be {first} or {others[0]}; give pictures names of their own")
    return first


def _voc_object(entry: ElementTree.Element) -> dict[str, Any]:
    """Corners count pixels from 1, the last one included; COCO's from 0.

    A difficult object is a crowd of COCO: it is not learned, and a detection of it counts as neither right nor wrong.
    """
    left, top, right, bottom = (float(entry.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    name = entry.findtext("name")
    if not name:
        raise ValueError("an object without a name")
    box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
    return {"category": name.strip(), "bbox": box, "difficult": entry.findtext("difficult", "0").strip() == "1"}


def read_yolo(root: Path) -> Iterator[tuple[str, Picture]]:
    """Pictures below `root` with the boxes or polygons of their text files, each with its split, '' for none.

    A picture without a text has no objects. UserError for what is no YOLO file.
    """
    names = _yolo_names(root)
    found = False
    for path in _files(root, is_image_name):
        beside = path.with_suffix(".txt")
        parts = list(path.relative_to(root).parts)
        if "images" in parts:
            at = len(parts) - 1 - parts[::-1].index("images")
            beside = root.joinpath(*parts[:at], "labels", *parts[at + 1 :]).with_suffix(".txt")
        found |= beside.is_file()
        picture = _picture(path, [])
        lines = beside.read_text().splitlines() if beside.is_file() else []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                picture.objects.append(_yolo_object(f"{beside}, line {number}", line, picture, names))
        yield _split_of(path, root), picture
    if not found:
        raise UserError(f"{root}: has no texts of YOLO, in labels/ or beside the pictures")


def _yolo_names(root: Path) -> dict[int, str]:
    described = next((root / name for name in ("data.yaml", "dataset.yaml") if (root / name).is_file()), None)
    if described is not None:
        try:
            names = (yaml.safe_load(described.read_text()) or {}).get("names")
        except (yaml.YAMLError, AttributeError) as error:
            raise UserError(f"{described}: not valid YAML: {one_line(error)}") from None
        if isinstance(names, list | dict):
            return {int(k): str(v) for k, v in (names.items() if isinstance(names, dict) else enumerate(names))}
    listed = next((path for path in (root / "classes.txt", root / "labels" / "classes.txt") if path.is_file()), None)
    if listed is None:
        raise UserError(f"{root}: names its classes in neither data.yaml nor classes.txt")
    return dict(enumerate(line.strip() for line in listed.read_text().splitlines() if line.strip()))


def _yolo_object(where: str, line: str, picture: Picture, names: dict[int, str]) -> dict[str, Any]:
    """`class x y width height`, the box's centre and size, or `class x1 y1 x2 y2 ...`, all as shares of the picture."""
    try:
        category, *numbers = line.split()
        values = [float(number) for number in numbers]
        name = names[int(category)]
    except (ValueError, KeyError):
        raise UserError(f"{where}: {line[:60]!r} must be a known class and numbers") from None
    if len(values) % 2 or len(values) < 4 or not all(map(math.isfinite, values)):
        raise UserError(f"{where}: {line[:60]!r} must have four numbers after the class, or the points of a polygon")
    scaled = [value * (picture.height if i % 2 else picture.width) for i, value in enumerate(values)]
    if len(scaled) == 4:
        x, y, width, height = scaled
        return {"category": name, "bbox": [x - width / 2, y - height / 2, width, height]}
    left, top, right, bottom = min(scaled[::2]), min(scaled[1::2]), max(scaled[::2]), max(scaled[1::2])
    return {"category": name, "bbox": [left, top, right - left, bottom - top], "segmentation": [scaled]}


def _files(root: Path, wanted: Callable[[str], bool]) -> list[Path]:
    return sorted(Path(name) for name in files_below(root) if wanted(name))


def _picture(path: Path, objects: list[dict[str, Any]], said: tuple[int, ...] = (0, 0)) -> Picture:
    """A picture as programs show it, turned as its EXIF says, or as it is stored where its annotations have that size.

    `said` is the size that its annotations say, 0 for none. UserError where it has another, or cannot be read.
    """
    try:
        with Image.open(path) as image:
            stored = image.size
            size = upright(image).size if "exif" in image.info else stored
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image: {one_line(error)}") from None
    if all(said) and said not in (size, stored):
        has, says = (f"{width} x {height}" for width, height in (stored, said))
        raise UserError(f"{path}: has {has} pixels, its annotations are of {says}; correct their size, or remove it")
    return Picture(path, *(stored if said == stored else size), objects)


def _split_of(path: Path, root: Path) -> str:
    """The split that a folder above the picture is named after, '' for none."""
    folders = {re.sub(r"\d{4}$", "", part.lower()) for part in path.relative_to(root).parts[:-1]}
    return next((split for split, names in SPLITS.items() if folders & set(names)), "")


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Picture]]]] = {"voc": read_voc, "yolo": read_yolo}


def convert(root: Path, reader: Callable[[Path], Iterator[tuple[str, Picture]]]) -> dict[str, dict[str, Any]]:
    """{'train': ..., 'val': ...}, the content of COCO's JSON files. UserError where there is nothing to convert."""
    found = list(reader(root))
    if not found:
        raise UserError(f"{root}: holds no annotations of this format")
    # A test set that is not needed for validation stays unseen.
    has_val = any(split == "val" for split, _ in found)
    found = [("val" if split == "test" else split, p) for split, p in found if not (has_val and split == "test")]
    if not any(split == "val" for split, _ in found):
        found = [("val" if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train", p) for i, (_, p) in enumerate(found)]
    names = sorted({entry["category"] for _, picture in found for entry in picture.objects})
    ids = {name: number for number, name in enumerate(names, start=1)}
    contents: dict[str, dict[str, Any]] = {}
    for split in ("train", "val"):
        content: dict[str, Any] = {"images": [], "annotations": []}
        content["categories"] = [{"id": number, "name": name} for name, number in ids.items()]
        for picture in (picture for own, picture in found if (own or "train") == split):
            image = {"id": len(content["images"]) + 1, "file_name": picture.path.relative_to(root).as_posix()}
            content["images"].append({**image, "width": picture.width, "height": picture.height})
            for entry in picture.objects:
                box = [round(value, 3) for value in entry["bbox"]]
                annotation = {"id": len(content["annotations"]) + 1, "image_id": image["id"], "bbox": box}
                annotation |= {"category_id": ids[entry["category"]], "iscrowd": int(entry.get("difficult", False))}
                if "segmentation" in entry:
                    annotation["segmentation"] = [[round(value, 3) for value in entry["segmentation"][0]]]
                else:
                    annotation["area"] = box[2] * box[3]
                content["annotations"].append(annotation)
        contents[split] = content
    return contents


def write_annotations(root: Path, form: str) -> None:
    """Write COCO's JSON of both splits into `root`/annotations; the pictures stay where they are."""
    for split, content in convert(root, READERS[form]).items():
        path = root / "annotations" / f"instances_{split}.json"
        write_file(json.dumps(content).encode(), path)
        print(f"{path}: {len(content['images'])} pictures, {len(content['annotations'])} objects")
    names = [category["name"] for category in content["categories"]]
    print(printable(f"{len(names)} classes: {', '.join(names)}"))
