"""Small data sets for segmentation, in each layout, and the configuration of a network that trains in seconds."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from yacs.config import CfgNode

from configs import read_config
from tasks import keys_of

CLASSES = ("ground", "square", "bar")
IGNORED = 255
SIZES = ((48, 64), (61, 47), (40, 40))  # height and width of the images, by turns
ADE20K = {"train": ("images/training", "annotations/training"), "val": ("images/validation", "annotations/validation")}

CARD = str(Path(__file__).resolve().parents[1] / "configs" / "segmentation" / "digits.yaml")
SMALL = (
    *("MODEL.NAME", "tiny", "DATA.BATCH_SIZE", "2", "DATA.NUM_WORKERS", "0", "DATA.IMG_SIZE", "0"),
    *("AUG.CROP", "[32, 64]", "AUG.SCALE", "[0.5, 2.0]", "AUG.MAX_SHARE", "0.75", "AUG.HFLIP", "0.5"),
    *("AUG.PHOTOMETRIC", "True", "MODEL.HEAD_DROPOUT", "0.1"),
    *("TEST.WINDOW", "[32, 32]", "TEST.STRIDE", "[20, 20]", "TEST.MEASURE", "[64, 96]"),
    *("MODEL.HEAD", "upernet", "MODEL.HEAD_CHANNELS", "16", "MODEL.AUX_WEIGHT", "0.4"),
    *("MODEL.GMA.EMBEDDING_DIMS", "[10, 10, 20, 20]", "MODEL.GMA.SERIAL_DEPTHS", "[1, 1, 1, 1]"),
    *("MODEL.GMA.MLP_RATIOS", "[2, 2, 2, 2]", "MODEL.GMA.DROP_PATH_RATE", "0.2"),
    *("TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "1", "TRAIN.BASE_LR", "0.003", "TRAIN.RECIPE_BATCH", "0"),
    *("TRAIN.VAL_FREQ", "1", "PRINT_FREQ", "1", "SAVE_KEEP", "0", "EMA.DECAY", "0.9"),
)


def small_config(*opts: str, flags: Sequence[str] = ()) -> CfgNode:
    return read_config(["--cfg", CARD, *flags, "--opts", *SMALL, *opts], keys_of, notify=lambda line: None)


def draw(number: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 (H, W, 3), whose colours tell the classes of its mask, uint8 (H, W), with an ignored edge."""
    rng = np.random.default_rng(number)
    mask = np.zeros(size, np.uint8)
    top, left = rng.integers(2, 12, size=2)
    mask[top : top + 16, left : left + 16] = 1
    mask[-10:-4, 4:-4] = 2
    colours = np.array([[60, 60, 60], [220, 60, 60], [60, 60, 220]])
    image = colours[mask] + rng.integers(-30, 31, size=(*size, 3))
    mask[:, 0] = IGNORED
    return image.clip(0, 255).astype(np.uint8), mask


def write_samples(
    root: Path,
    folders: dict[str, tuple[str, str]] = ADE20K,
    counts: Sequence[int] = (6, 5),
    name: Callable[[int], tuple[str, str]] = lambda number: (f"{number:03d}.png", f"{number:03d}.png"),
    values: Callable[[np.ndarray], np.ndarray] = lambda mask: mask,
) -> Path:
    """Write training and validation samples; `name` gives the files of image and mask, `values` the mask's pixels."""
    first = 0
    for (images, masks), count in zip(folders.values(), counts):
        for number in range(first, first + count):
            image, mask = draw(number, SIZES[number % len(SIZES)])
            for folder, file, pixels in zip((images, masks), name(number), (image, values(mask))):
                path = root / folder / file
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        first += count
    return root


def write_folder(root: Path) -> Path:
    """ADE20K's layout, with classes.txt."""
    write_samples(root)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return root
