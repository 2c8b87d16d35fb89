"""`test.py --images`: the class map of pictures that nobody has labelled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs import UserError, with_num_classes
from configs.text import printable
from utils.files import atomic_write, write_json
from utils.precision import build_precision
from utils.session import Session

from ..pictures import CLASS_MAPS, find_pictures, look_at_each, one_process, result_files
from .drawing import overlay, palette, with_legend
from .inference import predict_classes
from .transforms import evaluation_views
from .weights import load_segmenter


def segment_pictures(session: Session, weights: str) -> None:
    """Write the class map of every picture, turned upright as its EXIF says, beside it or to the folder --out.

    <picture>.classes.png shows it over the picture, with the share of each class; <picture>.mask.png has the class
    index of each pixel; <picture>.classes.json the shares. Pictures that cannot be read, and folders that cannot be
    written to, are named; the others go on, and the process ends with status 1 (SystemExit).
    Raises UserError where a path does not exist, or a folder holds no picture.
    """
    config, processes, logger = session.config, session.processes, session.logger
    one_process(session)
    paths = find_pictures(session.args.images, logger.info)
    network, names, loaded = load_segmenter(config, weights)
    config = with_num_classes(config, len(names))
    network.to(processes.device)
    precision = build_precision(config, processes.device)
    logger.info(f"{len(paths)} pictures, {loaded}, {len(names)} classes, {precision}")
    files_of = result_files(paths, CLASS_MAPS, session.args.out)

    def look(path: Path, picture: Image.Image) -> dict[str, Any]:
        views = [view.to(processes.device) for view in evaluation_views(config, picture, list(config.TEST.SCALES))]
        size = (picture.height, picture.width)
        classes = predict_classes(config, network, views, size, precision).cpu().numpy()
        pixels = np.bincount(classes.ravel(), minlength=len(names))
        order = [int(i) for i in np.argsort(-pixels, kind="stable") if pixels[i]]
        shares = [{"class": i, "name": names[i], "share": float(f"{pixels[i] / pixels.sum():.6g}")} for i in order]
        result = {"picture": str(path), "classes": shares}
        _write(files_of[path], picture, classes, names, {"weights": loaded} | result)
        shown = ", ".join(f"{entry['name']} {100 * entry['share']:.1f} %" for entry in shares[:5])
        logger.info(printable(f"{path}: {shown}"))
        return result

    look_at_each(session, paths, loaded, look)


def _write(
    files: Sequence[Path], picture: Image.Image, classes: np.ndarray, names: list[str], result: dict[str, Any]
) -> None:
    """The three files of a picture; UserError where they cannot be written."""
    shown = [(entry["class"], f"{100 * entry['share']:.1f} %") for entry in result["classes"]]
    drawn = with_legend(overlay(picture, classes, len(names)), names, shown)
    mask = Image.fromarray(classes.astype(np.uint8 if len(names) <= 256 else np.uint16))
    if mask.mode == "L":
        mask.putpalette(palette(len(names)).ravel().tolist())
    numbers, *drawings = files
    for path, image in zip(drawings, (drawn, mask)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                image.save(partial, format="PNG")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    write_json(str(numbers), result)
