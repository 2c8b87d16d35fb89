"""Scenes of digits, to try detection and segmentation without a download: python -m tools.scenes [--output DIR]

Writes pictures of 128 x 128 pixels with three to six of scikit-learn's handwritten digits on a textured ground:

    <output>/detection/     COCO's layout: train/, val/, annotations/instances_{train,val}.json with boxes and masks
    <output>/segmentation/  ADE20K's layout: {images,annotations}/{training,validation}/, classes.txt;
                            0 is the ground, digit d is d + 1

Scenes for validation show digits that scenes for training do not. A folder that exists is left as it is.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from configs import UserError
from configs.commands import CommandParser, command

from .digits import HELD_OUT_EVERY, load_digits

CANVAS = 128  # pixels
DIGIT_SIZES = (28, 52)  # pixels, smallest and largest
DIGITS_PER_SCENE = (3, 6)
SCENES = {"train": 600, "val": 120}
ADE20K_NAMES = {"train": "training", "val": "validation"}
INK = 0.4  # of a digit's blackest, from where on a pixel belongs to it


def draw_scene(rng: np.random.Generator, digits: Sequence[tuple[np.ndarray, int]]) -> tuple[Image.Image, list]:
    """A scene of these (8 x 8 image, digit), and the mask (128, 128) of each digit that was placed, with its class.

    A digit is placed where it touches no other; one that finds no room is left out.
    """
    coarse = rng.integers(40, 200, size=(6, 6, 3)).astype(np.uint8)
    ground = Image.fromarray(coarse).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    canvas = np.asarray(ground).astype(float) + rng.normal(0, 12, size=(CANVAS, CANVAS, 3))
    taken = np.zeros((CANVAS, CANVAS), bool)
    placed = []
    for pixels, digit in digits:
        size = int(rng.integers(DIGIT_SIZES[0], DIGIT_SIZES[1] + 1))
        grey = Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8))
        ink = np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC)) / 255
        colour = rng.choice([0, 255]) + rng.integers(-60, 61, size=3)
        for _ in range(20):
            top, left = rng.integers(0, CANVAS - size + 1, size=2)
            area = np.s_[top : top + size, left : left + size]
            if not taken[area].any():
                break
        else:
            continue
        taken[area] = True
        canvas[area] += ink[..., None] * (colour - canvas[area])
        mask = np.zeros((CANVAS, CANVAS), bool)
        mask[area] = ink >= INK
        placed.append((mask, digit))
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), placed


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths of a mask (H, W): down its columns, beginning with zeros."""
    flat = np.concatenate([[0], mask.T.ravel().astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts[:-1].tolist() if counts[-1] == 0 else counts.tolist()}


def write_scenes(output: Path, scenes: dict[str, int] = SCENES) -> bool:
    """Write both data sets below `output`; returns False if it exists.

    They are written to another folder and then renamed, so that an interrupted run leaves nothing that looks complete.
    Raises UserError if scikit-learn is missing or the folder cannot be written.
    """
    if output.is_dir():
        return False
    images, classes = load_digits()
    seen = [int((classes[: i + 1] == digit).sum()) for i, digit in enumerate(classes)]
    held_out = np.array([count % HELD_OUT_EVERY == 0 for count in seen])
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for seed, (split, count) in enumerate(scenes.items()):
            rng = np.random.default_rng(seed)
            usable = np.flatnonzero(held_out == (split == "val"))
            _write_split(partial, split, rng, [(images[i], int(classes[i])) for i in usable], count)
        names = "ground\n" + "".join(f"{digit}\n" for digit in range(10))
        (partial / "segmentation" / "classes.txt").write_text(names)
        partial.rename(output)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if output.is_dir():
            return False  # another process was faster
        raise UserError(f"--output {output}: cannot be written: {error.strerror}") from None
    return True


def _write_split(root: Path, split: str, rng: np.random.Generator, digits: list, count: int) -> None:
    pictures = root / "detection" / split
    maps = root / "segmentation" / "annotations" / ADE20K_NAMES[split]
    copies = root / "segmentation" / "images" / ADE20K_NAMES[split]
    for folder in (pictures, maps, copies, root / "detection" / "annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": digit + 1, "name": str(digit)} for digit in range(10)],
    }
    for number in range(1, count + 1):
        chosen = rng.integers(len(digits), size=rng.integers(DIGITS_PER_SCENE[0], DIGITS_PER_SCENE[1] + 1))
        scene, placed = draw_scene(rng, [digits[i] for i in chosen])
        name = f"{number:04d}.png"
        scene.save(pictures / name)
        shutil.copyfile(pictures / name, copies / name)
        class_map = np.zeros((CANVAS, CANVAS), np.uint8)
        content["images"].append({"id": number, "file_name": name, "width": CANVAS, "height": CANVAS})
        for mask, digit in placed:
            class_map[mask] = digit + 1
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": digit + 1,
                    "bbox": [int(x) for x in box],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": run_lengths(mask),
                }
            )
        Image.fromarray(class_map).save(maps / name)
    path = root / "detection" / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content))


@command("tools.scenes")
def main(argv: Sequence[str] | None = None) -> None:
    """Write the data sets. `argv` are the arguments without the program's name."""
    parser = CommandParser("tools.scenes", __doc__)
    parser.add_argument("--output", type=Path, default=Path("datasets/digit_scenes"), help="folder to write")
    output = parser.parse_args(argv).output
    print(f"{output}: {'written' if write_scenes(output) else 'already there'}")


if __name__ == "__main__":
    sys.exit(main())
