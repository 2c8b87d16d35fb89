"""A real, small data set that needs no download: scikit-learn's 1,797 handwritten digits as an ImageFolder.

    python -m data.digits --output datasets/digits

writes `<output>/{train,val}/<digit>/<number>.png`, 32 x 32 grey; every fifth image of each digit is held out for
validation. A complete data set is left as it is.
"""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SIZE = 32  # pixels; the originals are 8 x 8 with 17 grey levels
HELD_OUT_EVERY = 5


def write_digits(output: Path) -> bool:
    """Write the data set to the folder `output`; returns False where it is there already.

    It is written beside and renamed, so that an interrupted run leaves nothing that looks complete.
    """
    if output.is_dir():
        return False
    from sklearn.datasets import load_digits  # needed here only: training and evaluation run without scikit-learn

    digits = load_digits()
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    seen: dict[int, int] = {}
    for number, (image, digit) in enumerate(zip(digits.images, digits.target)):
        seen[digit] = seen.get(digit, 0) + 1
        split = "val" if seen[digit] % HELD_OUT_EVERY == 0 else "train"
        folder = partial / split / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        grey = np.rint(image * (255 / 16)).astype(np.uint8)
        enlarged = Image.fromarray(grey).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        enlarged.save(folder / f"{number:04d}.png")
    try:
        partial.rename(output)
    except OSError:
        shutil.rmtree(partial)
        if not output.is_dir():
            raise
        return False  # another process was faster
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Write scikit-learn's handwritten digits as an ImageFolder.")
    parser.add_argument("--output", type=Path, default=Path("datasets/digits"), help="folder to write")
    output = parser.parse_args().output
    print(f"{output}: {'written' if write_digits(output) else 'already there'}")


if __name__ == "__main__":
    main()
