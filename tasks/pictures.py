"""The pictures that `test.py --images` names, and where results go that lie beside them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from configs import UserError
from data.files import IMAGE_SUFFIXES, count_suffixes, describe_left_out, files_below, is_image_name

# After the whole name of the picture: a.jpg and a.png do not share a file. A folder's results are not its pictures.
TOP5 = ".top5.json"
DETECTIONS = (".detections.json", ".detections.jpg")
CLASS_MAPS = (".classes.json", ".classes.png", ".mask.png")


def find_pictures(arguments: Sequence[str], notify: Callable[[str], None] = lambda line: None) -> list[Path]:
    """The files that are named, whatever their names, and the images anywhere below the folders that are named.

    Sorted within a folder; what is an image there, `data.files` decides. `notify` is called with one line that counts
    what a folder holds beside images. UserError where something is not there.
    """
    pictures: dict[Path, None] = {}  # each once, in order
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            files = [file for file in files_below(path) if not file.endswith((TOP5, *DETECTIONS, *CLASS_MAPS))]
            below = [Path(file) for file in files if is_image_name(file)]
            left_out = describe_left_out(count_suffixes(file for file in files if not is_image_name(file)))
            if not below:
                raise UserError(
                    f"--images {argument}: holds no pictures ({', '.join(IMAGE_SUFFIXES)})"
                    f"{left_out and '; it holds '}{left_out}"
                )
            if left_out:
                notify(f"--images {argument}: left out: {left_out}")
            pictures |= dict.fromkeys(below)
        elif path.is_file():
            pictures[path] = None
        else:
            raise UserError(f"--images {argument}: no such file or folder")
    return list(pictures)


def beside(path: Path, suffix: str, out: str | None) -> Path:
    """The file for a result of a picture: next to the picture, or in the folder `out`."""
    return Path(out or path.parent) / f"{path.name}{suffix}"
