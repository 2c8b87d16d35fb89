"""A real, small data set without a download: python -m tools.digits [--output DIR]

Writes scikit-learn's 1,797 handwritten digits as an ImageFolder: `<output>/{train,val}/<digit>/<number>.png`, 32 x 32
pixels, grey. Every fifth image of each digit is for validation. A folder that exists is left as it is.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from configs import UserError
from configs.commands import CommandParser, command

IMAGE_SIZE = 32  # pixels; the originals are 8 x 8 with 17 grey levels
HELD_OUT_EVERY = 5


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits as images (1797, 8, 8) of 0 to 16, and their classes (1797); UserError without scikit-learn."""
    try:
        import sklearn.datasets  # needed here only
    except ImportError:
        raise UserError("scikit-learn, which has the digits, is not installed; pip install scikit-learn") from None
    digits = sklearn.datasets.load_digits()
    return digits.images, digits.target


def write_digits(output: Path) -> bool:
    """Write the data set to the folder `output`; returns False if that exists.

    It is written to another folder and then renamed, so that an interrupted run leaves nothing that looks complete.
    Raises UserError if scikit-learn is missing or the folder cannot be written.
    """
    if output.is_dir():
        return False
    images, classes = load_digits()
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    seen: dict[int, int] = {}
    try:
        for number, (image, digit) in enumerate(zip(images, classes)):
            seen[digit] = seen.get(digit, 0) + 1
            split = "val" if seen[digit] % HELD_OUT_EVERY == 0 else "train"
            folder = partial / split / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            grey = np.rint(image * (255 / 16)).astype(np.uint8)
            enlarged = Image.fromarray(grey).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
            enlarged.save(folder / f"{number:04d}.png")
        partial.rename(output)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if output.is_dir():
            return False  # another process was faster
        raise UserError(f"--output {output}: cannot be written: {error.strerror}") from None
    return True


@command("tools.digits")
def main(argv: Sequence[str] | None = None) -> None:
    """Write the data set. `argv` are the arguments without the program's name."""
    parser = CommandParser("tools.digits", __doc__)
    parser.add_argument("--output", type=Path, default=Path("datasets/digits"), metavar="DIR", help="folder to write")
    output = parser.parse_args(argv).output
    print(f"{output}: {'written' if write_digits(output) else 'already there'}")


if __name__ == "__main__":
    sys.exit(main())
