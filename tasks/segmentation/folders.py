"""Images with a mask each: which files belong together, what their values mean, and what the classes are called."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from yacs.config import CfgNode

from configs import UserError
from configs.errors import one_line
from data import files
from data.decoding import decode_image, upright
from data.files import is_image_name

IGNORED = -1  # in class maps: a pixel that counts nowhere
MASK_SUFFIX = ".png"
MAX_CLASSES = 2**15 - 1  # class maps are int16
_KEYS = ("DATA.TRAIN_IMAGES", "DATA.TRAIN_MASKS", "DATA.VAL_IMAGES", "DATA.VAL_MASKS")

# Folders of images and masks below the data path, by split. The first layout whose training or validation images are
# there is the data set's.
LAYOUTS = {
    "ADE20K": {
        "train": ("images/training", "annotations/training"),
        "val": ("images/validation", "annotations/validation"),
    },
    "Cityscapes": {"train": ("leftImg8bit/train", "gtFine/train"), "val": ("leftImg8bit/val", "gtFine/val")},
    "folders": {"train": ("train/images", "train/masks"), "val": ("val/images", "val/masks")},
}
CITYSCAPES_IMAGE, CITYSCAPES_IDS, CITYSCAPES_TRAIN_IDS = "_leftImg8bit", "_gtFine_labelIds", "_gtFine_labelTrainIds"
# Class -> the value in `_labelIds` masks, in the order of the training ids.
CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26,
    "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip


@dataclass(frozen=True)
class MaskedImages:
    """One split of a data set.

    `samples` are (image, mask) relative to the data path, by name. A mask's pixel of value `values[c]` is of class c;
    one of a value in `ignored`, or of any other where `others_ignored`, counts nowhere.
    """

    root: Path
    masks: Path  # folder of all masks
    samples: Sequence[tuple[str, str]]
    classes: list[str]
    values: tuple[int, ...]
    ignored: tuple[int, ...]
    others_ignored: bool
    mask_suffix: str  # of masks' names, before .png
    hint: str  # ends the message about a value that is none of these

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The image, upright where its mask is, and its class map: int16 (H, W), class or IGNORED.

        UserError names the file that is at fault.
        """
        path, mask_path = (self.root / name for name in self.samples[index])
        try:
            image = decode_image(path.read_bytes())
        except Exception as error:  # Pillow raises nearly anything on damaged files
            raise UserError(f"{path}: cannot be read as an image: {one_line(error)}") from None
        classes = self.read_mask(mask_path)
        image = upright(image, classes.shape[::-1])
        if classes.shape != (image.height, image.width):
            raise UserError(
                f"{mask_path}: is {classes.shape[1]} x {classes.shape[0]} pixels, its image {path.name} "
                f"{image.width} x {image.height}; they must be of one size"
            )
        return image, classes

    def read_mask(self, path: Path) -> np.ndarray:
        """The class map of a mask: int16 (H, W); UserError where it is none, or holds a value that is no class."""
        raw = read_raw_mask(path)
        lookup = np.full(max(int(raw.max()), *self.values, *self.ignored) + 1, _NO_CLASS, np.int16)
        if self.others_ignored:
            lookup[:] = IGNORED
        lookup[list(self.values)] = np.arange(len(self.values))
        lookup[[value for value in self.ignored if value >= 0]] = IGNORED
        classes = lookup[raw]
        if (classes == _NO_CLASS).any():
            value = int(raw[classes == _NO_CLASS].min())
            raise UserError(f"{path}: the value {value} is no class; {self.hint}")
        return classes

    def mask_name(self, index: int) -> str:
        """The mask's file below the folder of all masks."""
        return os.path.relpath(self.root / self.samples[index][1], self.masks)

    def to_mask(self, classes: np.ndarray) -> Image.Image:
        """A class map (H, W) as a mask with the values of the data set's own."""
        values = np.array(self.values)[classes]
        return Image.fromarray(values.astype(np.uint8 if max(self.values) < 256 else np.uint16))


_NO_CLASS = -2


def read_raw_mask(path: Path) -> np.ndarray:
    """The values in a mask (H, W), of a palette its indices, upright as its EXIF says.

    UserError where it has colours or cannot be read.
    """
    try:
        with Image.open(path, formats=("PNG",)) as mask:
            # Pillow spreads grey values of 2 and 4 bits over 0 to 255.
            spread = {"L;2": 85, "L;4": 17}.get(mask.tile[0].args, 1)
            if mask.mode in ("1", "L", "P") or mask.mode.startswith("I"):
                return np.asarray(upright(mask)).astype(np.int32) // spread
            mode = mask.mode
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise UserError(f"{path}: cannot be read as a PNG mask: {one_line(error)}") from None
    raise UserError(f"{path}: holds colours ({mode}); a mask has one channel, whose values are the classes")


def open_masks(config: CfgNode, split: str) -> MaskedImages:
    """The 'train' or 'val' images and masks of the configured data; UserError where something is missing."""
    data_path = config.DATA.DATA_PATH
    if not data_path:
        raise UserError("DATA.DATA_PATH is empty: give the folder of the data set with --data-path")
    root = Path(data_path)
    if not root.is_dir():
        raise UserError(f"--data-path {data_path}: no such folder")
    layout, folders = _layout(config, root)
    images, masks = (root / folder for folder in folders[split])
    suffixes = ("", "")
    if layout == "Cityscapes":
        of_train = any(masks.rglob(f"*{CITYSCAPES_TRAIN_IDS}{MASK_SUFFIX}"))
        suffixes = (CITYSCAPES_IMAGE, CITYSCAPES_TRAIN_IDS if of_train else CITYSCAPES_IDS)
    classes, values = _classes(config, root, suffixes[1])
    ignored = tuple({config.DATA.IGNORE_LABEL} | ({0} if config.DATA.REDUCE_ZERO_LABEL else set()) - {-1})
    if clash := set(values) & set(ignored):
        raise UserError(f"DATA.IGNORE_LABEL = {config.DATA.IGNORE_LABEL}: is also class {values.index(clash.pop())}")
    return MaskedImages(
        root=root,
        masks=masks,
        samples=_pairs(root, images, masks, *suffixes),
        classes=classes,
        values=values,
        ignored=ignored,
        others_ignored=suffixes[1] == CITYSCAPES_IDS and values != tuple(range(len(values))),
        mask_suffix=suffixes[1],
        hint=f"the {len(classes)} classes have {values[0]} to {values[-1]}, {config.DATA.IGNORE_LABEL} is ignored"
        + ("" if config.DATA.REDUCE_ZERO_LABEL else "; where 0 is no class, set DATA.REDUCE_ZERO_LABEL True"),
    )


def fingerprint(images: MaskedImages) -> str:
    """SHA-256 over the classes and, for each image and its mask, names and file sizes: what a resumed run must share.

    File contents are not read: a mask that is changed without a change of its size in bytes is not noticed.
    """
    digest = hashlib.sha256(f"{images.classes} {images.values} {sorted(images.ignored)}\n".encode())
    for names in images.samples:
        sizes = [(images.root / name).stat().st_size for name in names]
        digest.update(f"{names[0]}\t{sizes[0]}\t{names[1]}\t{sizes[1]}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def check_first_masks(*splits: MaskedImages) -> None:
    """Raise UserError where the first sample of a split does not load: then most do not, and no run need start."""
    for images in splits:
        images.load(0)


# -------------------------------------------------------------------------------------------------------------- layouts
def _layout(config: CfgNode, root: Path) -> tuple[str, dict[str, tuple[str, str]]]:
    """The name of the data set's layout, and its folders of images and masks by split."""
    given = [config.DATA[key.removeprefix("DATA.")] for key in _KEYS]
    if any(given):
        if not all(given):
            empty = _KEYS[given.index("")]
            raise UserError(f"{empty} is empty; where one of {', '.join(_KEYS)} is given, all four are needed")
        return "folders", {"train": (given[0], given[1]), "val": (given[2], given[3])}
    for layout, folders in LAYOUTS.items():
        if any((root / images).is_dir() for images, _ in folders.values()):
            return layout, folders
    expected = ", ".join(f"{folders['train'][0]}/ ({layout})" for layout, folders in LAYOUTS.items())
    raise UserError(
        f"--data-path {root}: has none of {expected}; name the folders of another layout with {', '.join(_KEYS)}"
    )


def _classes(config: CfgNode, root: Path, mask_suffix: str) -> tuple[list[str], tuple[int, ...]]:
    """The names of the classes, and the value that each has in masks."""
    path = Path(config.DATA.CLASSES) if config.DATA.CLASSES else root / "classes.txt"
    of_ade20k = root / "objectInfo150.txt"
    if not path.is_file() and not config.DATA.CLASSES:
        if mask_suffix:
            values = CITYSCAPES.values() if mask_suffix == CITYSCAPES_IDS else range(len(CITYSCAPES))
            return list(CITYSCAPES), tuple(values)
        path = of_ade20k if of_ade20k.is_file() else path
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it names the classes, one a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
    if path == of_ade20k:  # a table: index, ratio, train, val, name
        lines = [line.split("\t")[-1] for line in lines[1:]]
    while lines and not lines[-1].strip():
        lines.pop()
    names = [line.strip() for line in lines]
    if not names:
        raise UserError(f"{path}: names no class; it needs one a line")
    if "" in names:
        raise UserError(f"{path}:{names.index('') + 1}: is empty; it needs the name of a class")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: names {twice!r} twice; each class needs a name of its own")
    if len(names) > MAX_CLASSES:
        raise UserError(f"{path}: names {len(names)} classes; at most {MAX_CLASSES} are possible")
    first = int(config.DATA.REDUCE_ZERO_LABEL)
    return names, tuple(range(first, first + len(names)))


def _pairs(root: Path, images: Path, masks: Path, image_suffix: str, mask_suffix: str) -> list[tuple[str, str]]:
    """(image, mask) below `root`, by name: the mask has the image's name but for the suffixes."""
    of_masks = {name[: -len(MASK_SUFFIX)]: name for name in files_below(masks) if name.lower().endswith(MASK_SUFFIX)}
    found: dict[str, str] = {}
    for name in filter(is_image_name, files_below(images)):
        stem = name.removesuffix(Path(name).suffix)
        if not stem.endswith(image_suffix):
            continue
        key = stem.removesuffix(image_suffix)
        if key in found:
            raise UserError(f"{images / name}: has the same mask as {found[key]}; give it another name")
        found[key] = name
    if not found:
        raise UserError(f"{images}: holds no images")
    missing = sorted(key for key in found if key + mask_suffix not in of_masks)
    if missing:
        wanted = f"{masks / (missing[0] + mask_suffix)}{MASK_SUFFIX}"
        others = f"; so have {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"{images / found[missing[0]]}: has no mask {wanted}{others}")
    return [
        (os.path.relpath(images / name, root), os.path.relpath(masks / of_masks[key + mask_suffix], root))
        for key, name in sorted(found.items())
    ]


def files_below(folder: Path) -> list[str]:
    """The files anywhere below a folder, relative to it, without companions. UserError where it is none."""
    return [os.path.relpath(path, folder) for path in files.files_below(folder)]
