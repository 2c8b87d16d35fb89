"""Small data sets in COCO's format, and a detector small enough for a test."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from yacs.config import CfgNode

from configs import read_config
from tasks import keys_of

ROOT = Path(__file__).resolve().parents[1]
CATEGORIES = [{"id": 7, "name": "dot"}, {"id": 2, "name": "bar"}]  # gaps, and not in order
TINY = (
    *("MODEL.NAME", "tiny", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "0", "DATA.MIN_SIZES", "[32, 48]"),
    *("TEST.MIN_SIZE", "32", "MODEL.PYRAMID_CHANNELS", "8", "TRAIN.REGIONS", "16", "AUG.HFLIP", "0.5"),
    *("MODEL.GMA.EMBEDDING_DIMS", "[20, 20, 20, 20]", "MODEL.GMA.SERIAL_DEPTHS", "[1, 1, 1, 1]"),
    *("MODEL.GMA.DROP_PATH_RATE", "0.2", "TRAIN.UPDATES", "0", "TRAIN.WARMUP_UPDATES", "0"),
    *("TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "1", "TRAIN.VAL_FREQ", "1"),
    *("EMA.ENABLED", "True", "EMA.DECAY", "0.9", "PRINT_FREQ", "1", "SAVE_KEEP", "0", "LOG_SAMPLES", "True"),
)


def make_split(root: Path, split: str, count: int, masks: bool = True, **changes: Any) -> dict[str, Any]:
    """Write so many pictures of bars and dots with their annotations; returns the content of the JSON.

    Every fifth picture has no object, and every fourth has a crowd. `changes` replace lists of the JSON.
    """
    rng = np.random.default_rng(count)
    folder = root / split
    folder.mkdir(parents=True)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": copy.deepcopy(CATEGORIES)}
    for number in range(1, count + 1):
        height, width = (int(edge) for edge in rng.integers(40, 64, 2))
        pixels = rng.integers(0, 60, (height, width, 3)).astype(np.uint8)
        content["images"].append({"id": 10 * number, "file_name": f"{number}.png", "width": width, "height": height})
        for kind in range(2) if number % 5 else ():
            x, y = (int(rng.integers(0, edge - 20)) for edge in (width, height))
            w, h = ((16, 12), (8, 18))[kind]
            pixels[y : y + h, x : x + w] = (255, 40, 40) if kind else (40, 255, 40)
            annotation = {
                "id": len(content["annotations"]) + 1,
                "image_id": 10 * number,
                "category_id": CATEGORIES[kind]["id"],
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": int(kind == 0 and number % 4 == 0),
            }
            if masks and annotation["iscrowd"]:
                mask = np.zeros((height, width), bool)
                mask[y : y + h, x : x + w] = True
                annotation["segmentation"] = {"size": [height, width], "counts": run_lengths(mask)}
            elif masks:
                annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            content["annotations"].append(annotation)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    content |= changes
    write(root, split, content)
    return content


def run_lengths(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], mask.T.ravel().astype(int), [1 - int(mask[-1, -1])]])
    return np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat))])).tolist()


def write(root: Path, split: str, content: Any) -> Path:
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def make_data(root: Path, masks: bool = True, train: int = 10, val: int = 5) -> Path:
    """A data set of both splits."""
    make_split(root, "train", train, masks)
    make_split(root, "val", val, masks)
    return root


def config_of(*arguments: str) -> CfgNode:
    """The configuration of digits' detector with these arguments."""
    cfg = () if "--cfg" in arguments else ("--cfg", str(ROOT / "configs" / "detection" / "digits.yaml"))
    return read_config([*cfg, *map(str, arguments)], keys_of, notify=lambda line: None)


def tiny_config(*opts: str) -> CfgNode:
    return config_of("--opts", *TINY, *opts)


def arguments(data: Path, output: Path, *opts: str) -> list[str]:
    """The command line of a tiny run; `opts` are KEY VALUE pairs after those of TINY."""
    cfg = str(ROOT / "configs" / "detection" / "digits.yaml")
    return [
        "--cfg",
        cfg,
        *("--data-path", str(data), "--output", str(output), "--tag", "run"),
        *("--opts", *TINY, *opts),
    ]
