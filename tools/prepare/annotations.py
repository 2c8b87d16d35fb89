"""Annotations of Pascal VOC and YOLO as COCO's JSON, which detection reads."""

import json
import math
import os
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
INFO = {"description": "written by tools.prepare, which may write it again"}
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
            splits |= {_stem(line.strip()): split for line in _lines(listed) if line.strip()}
    pictures: dict[str, list[Path]] = {}
    for path in _files(root, is_image_name):
        pictures.setdefault(path.stem, []).append(path)
    annotated = _files(root, lambda name: name.endswith(".xml"))
    if splits and annotated and not any(path.stem in splits for path in annotated):
        raise UserError(f"{root}: ImageSets/Main names none of its XML files, such as {annotated[0].name}; correct it")
    for path in annotated:
        if splits and path.stem not in splits:
            continue
        try:
            tree = ElementTree.parse(path).getroot()
            named = tree.findtext("filename") or path.stem
            objects = [_voc_object(entry) for entry in tree.findall("object")]
            size = tuple(int(float(tree.findtext(f"size/{edge}") or 0)) for edge in ("width", "height"))
        except (ElementTree.ParseError, OSError, ValueError, TypeError, LookupError) as error:
            raise UserError(f"{path}: not an annotation of Pascal VOC: {one_line(error)}") from None
        found = pictures.get(path.stem) or pictures.get(Path(named).stem)
        if not found:
            raise UserError(f"{path}: its picture, {named}, is not below {root}")
        picture = _nearest(path, named, found)
        yield splits.get(path.stem) or _split_of(picture, root), _picture(picture, objects, size)


def _stem(line: str) -> str:
    """Of a line of a split's list: names, which may have spaces, and in some lists the suffix of the picture."""
    return Path(line).stem if is_image_name(line) else line


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
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise ValueError("a box that is not of numbers")
    box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
    return {"category": name.strip(), "bbox": box, "difficult": entry.findtext("difficult", "0").strip() == "1"}


def read_yolo(root: Path) -> Iterator[tuple[str, Picture]]:
    """Pictures below `root` with the boxes or polygons of their text files, each with its split, '' for none.

    A picture without a text has no objects. UserError for what is no YOLO file.
    """
    described, content = _yolo_description(root)
    names = _yolo_names(root, described, content)
    split_of = _described_splits(root, content)
    found, left_out = False, 0
    for path in _files(root, is_image_name):
        split = split_of(path) if split_of else _split_of(path, root)
        if split is None:
            left_out += 1
            continue
        beside = _text_of(path, root)
        found |= beside.is_file()
        picture = _picture(path, [])
        lines = _lines(beside) if beside.is_file() else []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                picture.objects.append(_yolo_object(f"{beside}, line {number}", line, picture, names))
        yield split, picture
    if not found:
        raise UserError(f"{root}: has no texts of YOLO, in labels/ or beside the pictures")
    if left_out:
        print(f"{left_out} pictures are in no split of {described}: they are left out")


def _text_of(picture: Path, root: Path) -> Path:
    """Beside the picture, or in labels/ for images/."""
    parts = picture.relative_to(root).parts
    if "images" not in parts:
        return picture.with_suffix(".txt")
    at = len(parts) - 1 - parts[::-1].index("images")
    return root.joinpath(*parts[:at], "labels", *parts[at + 1 :]).with_suffix(".txt")


def _yolo_description(root: Path) -> tuple[Path, dict[str, Any]]:
    """The file that describes a YOLO data set, and its content; {} where there is none."""
    names = [f"{stem}.{suffix}" for stem in ("data", "dataset") for suffix in ("yaml", "yml")]
    path = next((root / name for name in names if (root / name).is_file()), root)
    if path == root:
        return root, {}
    try:
        content = yaml.load("\n".join(_lines(path)), yaml.BaseLoader)  # which takes a class called `no` for a text
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}; correct it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold keys, such as names; correct it")
    return path, content


def _yolo_names(root: Path, described: Path, content: dict[str, Any]) -> dict[int, str]:
    names = content.get("names")
    if isinstance(names, list | dict):
        try:
            return {int(k): str(v) for k, v in (names.items() if isinstance(names, dict) else enumerate(names))}
        except ValueError:
            raise UserError(f"{described}: names must be a list, or have lines `number: name`; correct it") from None
    listed = next((path for path in (root / "classes.txt", root / "labels" / "classes.txt") if path.is_file()), None)
    if listed is None:
        raise UserError(f"{root}: names its classes in neither data.yaml nor classes.txt")
    return dict(enumerate(line.strip() for line in _lines(listed) if line.strip()))


def _described_splits(root: Path, content: dict[str, Any]) -> Callable[[Path], str | None] | None:
    """The split of a picture by data.yaml's train, val and test, None for none of them.

    None where they do not name two different places below `root`: folders, or texts with a picture a line.
    """
    of_split: dict[str, set[Path]] = {}
    for split in SPLITS:
        named = content.get(split) or []
        for entry in [named] if isinstance(named, str) else named:
            parts = [part for part in Path(entry).parts if part != ".."]  # '../train/images', as some programs write
            places = (root / str(content.get("path") or "") / entry, root / entry, root.joinpath(*parts))
            inside = (_absolute(place) for place in places if _absolute(place).is_relative_to(_absolute(root)))
            place = next((place for place in inside if place.exists()), None)
            listed = [root / line.strip() for line in _lines(place)] if place and place.is_file() else [place or root]
            found = {_absolute(path) for path in listed if path.exists()} if place else set()
            of_split.setdefault(split, set()).update(path for path in found if path.is_relative_to(_absolute(root)))
    train, others = of_split.get("train", set()), of_split.get("val") or of_split.get("test") or set()
    if not train or not others or train & others:
        return None

    def split_of(path: Path) -> str | None:
        path = _absolute(path)
        near = next((place for place in (path, *path.parents) if any(place in of for of in of_split.values())), None)
        return next((split for split, places in of_split.items() if near in places), None)

    return split_of


def _absolute(path: Path) -> Path:
    """Without '..'; links stay, as pictures may be links."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - pathlib has none that leaves links


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
        _check_shares(where, line, values[0], values[1], min(values[2:]))
        return {"category": name, "bbox": [x - width / 2, y - height / 2, width, height]}
    left, top, right, bottom = min(scaled[::2]), min(scaled[1::2]), max(scaled[::2]), max(scaled[1::2])
    _check_shares(where, line, *((min(values[i::2]) + max(values[i::2])) / 2 for i in (0, 1)))
    return {"category": name, "bbox": [left, top, right - left, bottom - top], "segmentation": [scaled]}


def _check_shares(where: str, line: str, x: float, y: float, size: float = 0) -> None:
    """The centre of an object is in the picture; its edges may be a little outside."""
    if not (0 <= x <= 1 and 0 <= y <= 1 and size >= 0):
        raise UserError(f"{where}: {line[:60]!r} must be in shares of the picture, 0 to 1, not in pixels; correct it")


def _lines(path: Path) -> list[str]:
    """The lines of a text, without the mark that Windows puts before them."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text in UTF-8; save it as one") from None


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
    if not any(picture.objects for _, picture in found):
        raise UserError(f"{root}: none of its {len(found)} pictures has an object; a detector needs some")
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


def _texts_without_picture(root: Path) -> list[Path]:
    """Of the texts in folders called labels."""
    pictures = {_text_of(path, root) for path in _files(root, is_image_name)}
    texts = _files(root, lambda name: name.endswith(".txt") and Path(name).name != "classes.txt")
    return [path for path in texts if "labels" in path.relative_to(root).parts and path not in pictures]


def _check_ours(path: Path) -> None:
    """Raise UserError where a file is there that this program did not write."""
    try:
        ours = not path.exists() or json.loads(path.read_bytes()).get("info") == INFO
    except (ValueError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"{path}: is there already, and not by tools.prepare; move it away to have it written")


def write_annotations(root: Path, form: str) -> None:
    """Write COCO's JSON of both splits into `root`/annotations; the pictures stay where they are.

    UserError, and nothing is written, where a file of another program's is there.
    """
    contents = convert(root, READERS[form])
    paths = {split: root / "annotations" / f"instances_{split}.json" for split in contents}
    for path in paths.values():
        _check_ours(path)
    for content, path in zip(contents.values(), paths.values()):
        write_file(json.dumps({"info": INFO} | content).encode(), path)
        print(f"{path}: {len(content['images'])} pictures, {len(content['annotations'])} objects")
    if form == "yolo" and (lone := _texts_without_picture(root)):
        print(printable(f"{len(lone)} texts have no picture that is read, such as {lone[0]}: they are left out"))
    names = [category["name"] for category in content["categories"]]
    print(printable(f"{len(names)} classes: {', '.join(names)}"))
