"""The pictures that `test.py --images` names, and where results go that lie beside them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from configs import UserError
from configs.text import printable
from data import ImageDataset
from data.decoding import upright
from data.files import IMAGE_SUFFIXES, count_suffixes, describe_left_out, files_below, is_image_name
from data.sources import PictureSource
from utils.files import write_json
from utils.session import Session

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


def result_files(pictures: Sequence[Path], suffixes: Sequence[str], out: str | None) -> dict[Path, list[Path]]:
    """The files for the results of each picture, one a suffix: next to it, or in the folder `out`.

    Where pictures of several folders share a name, `out` gets their folders too, from the one above all of them on.
    """
    results = list(pictures)
    if out:
        names = [path.name for path in pictures]
        if len(set(names)) < len(names):
            folders = [path.parent.resolve() for path in pictures]
            above = os.path.commonpath(folders)
            names = [folder.relative_to(above) / path.name for folder, path in zip(folders, pictures)]
        results = [Path(out, name) for name in names]
    return {
        picture: [result.with_name(f"{result.name}{suffix}") for suffix in suffixes]
        for picture, result in zip(pictures, results)
    }


def one_process(session: Session) -> None:
    """Raise UserError where several processes were started to look at pictures."""
    if session.processes.distributed:
        raise UserError("--images works on one process: start test.py without torchrun")


def look_at_each(
    session: Session, paths: Sequence[Path], loaded: str, look: Callable[[Path, Image.Image], dict[str, Any]]
) -> None:
    """Call `look` with each picture, RGB and upright as its EXIF says; what it returns goes to --json.

    Pictures that cannot be read, and those whose `look` raises UserError, are named. The others go on, and the process
    then ends with status 1 (SystemExit). `loaded` says what the weights are.
    """
    images = ImageDataset(PictureSource(paths), lambda image: image)
    results, faults = [], 0
    for index, path in enumerate(tqdm(paths, unit="picture", disable=None, leave=False)):
        try:
            result = look(path, upright(images.load(index)))
        except UserError as error:
            session.logger.error(printable(error.one_line()))
            result = {"error": error.one_line()}
            faults += 1
        results.append({"picture": str(path), **result})
    if session.args.json:
        write_json(session.args.json, {"weights": loaded, "pictures": results})
    if faults:
        session.logger.error(f"{faults} of {len(paths)} pictures: see above")
        raise SystemExit(1)
