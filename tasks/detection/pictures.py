"""Detections drawn on pictures, and `test.py --images`, which does so for pictures that nobody has annotated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as run_length
from PIL import Image, ImageDraw, ImageFont, ImageOps

from configs import UserError
from configs.text import printable
from tasks.pictures import DETECTIONS, find_pictures, look_at_each, one_process, result_files
from utils.checkpoint import find_weights
from utils.files import write_json
from utils.precision import build_precision
from utils.session import Session

from .images import eval_view
from .inference import detect, results_of
from .task import check_settings
from .weights import load_detector

MASK_OPACITY = 0.45
# Of the classes, in turn: bright, and told apart by most eyes.
COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#f032e6", "#000075")


def draw(image: Image.Image, objects: Sequence[dict[str, Any]], names: dict[int, str]) -> Image.Image:
    """A copy of the picture with boxes, masks, names and scores.

    Args:
        image: RGB.
        objects: with bbox [x, y, width, height], category_id, and where there are any score and segmentation
            (compressed run lengths).
        names: {category id: name}.
    """
    colors = {category: COLORS[number % len(COLORS)] for number, category in enumerate(names)}
    pixels = np.asarray(image).astype(np.float32)
    for entry in objects:
        if entry.get("segmentation"):
            mask = run_length.decode(entry["segmentation"]).astype(bool)
            color = np.array(_rgb(colors[entry["category_id"]]), np.float32)
            pixels[mask] += MASK_OPACITY * (color - pixels[mask])
    drawn = Image.fromarray(pixels.astype(np.uint8))
    canvas, edge = ImageDraw.Draw(drawn), max(image.size)
    font, width = ImageFont.load_default(size=max(10, edge // 50)), max(1, edge // 400)
    for entry in objects:
        left, top, box_width, box_height = entry["bbox"]
        color = colors[entry["category_id"]]
        # An annotation may have a width below 0, which evaluation never finds.
        corners = (left, top, left + max(0, box_width), top + max(0, box_height))
        canvas.rectangle(corners, outline=color, width=width)
        label = names[entry["category_id"]]
        label += f" {entry['score']:.2f}" if "score" in entry else ""
        text = canvas.textbbox((left, top), label, font=font)
        # Above the box, or within it at the top of the picture.
        shift = min(0, top - text[3]) if text[3] - text[1] <= top else 0
        area = canvas.textbbox((left, top + shift), label, font=font)
        canvas.rectangle((area[0], area[1] - 1, area[2] + 2, area[3] + 1), fill=color)
        canvas.text((left + 1, top + shift), label, fill="white", font=font)
    return drawn


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def draw_pictures(session: Session) -> None:
    """Detect in every picture, and write <picture>.detections.jpg and .json in its folder, or in that of --out.

    Photographs are turned upright as their EXIF says; boxes and masks are those of the turned picture. Pictures that
    cannot be read, and files that cannot be written, are named; the others go on, and the process ends with status 1
    (SystemExit). Raises UserError where a path does not exist, or a folder holds no picture.
    """
    config, processes, logger = session.config, session.processes, session.logger
    one_process(session)
    check_settings(config)
    paths = find_pictures(session.args.images, logger.info)
    network, known, loaded = load_detector(config, find_weights(config), None)
    network = network.to(processes.device).eval()
    precision = build_precision(config, processes.device)
    logger.info(f"{len(paths)} pictures, {loaded}, {len(known['classes'])} classes, {precision}")
    categories = dict(enumerate(known["category_ids"]))
    names = dict(zip(known["category_ids"], known["classes"]))
    files_of = result_files(paths, DETECTIONS, session.args.out)

    def look(path: Path, image: Image.Image) -> dict[str, Any]:
        view = eval_view(image, config).to(processes.device)
        found = results_of(detect(network, view, (image.height, image.width), precision), 0, categories)
        objects = [{**entry, "name": names[entry["category_id"]]} for entry in found]
        for entry in objects:
            del entry["image_id"]
        numbers, drawing = files_of[path]
        shown = [entry for entry in objects if entry["score"] >= config.TEST.DRAW_SCORE]
        result = {"width": image.width, "height": image.height, "detections": objects}
        save_picture(draw(image, shown, names), drawing)  # first: it makes the folder
        write_json(str(numbers), {"weights": loaded, "picture": str(path), **result})
        which = f"{len(shown)} of {len(objects)} detections drawn, from TEST.DRAW_SCORE {config.TEST.DRAW_SCORE:g} on"
        logger.info(printable(f"{path}: {which}: {drawing}"))
        return result

    look_at_each(session, paths, loaded, look)


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture; UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def grid(pictures: Sequence[Image.Image], columns: int, edge: int) -> Image.Image:
    """Pictures side by side, each fitted into a square of `edge` pixels."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * edge, rows * edge), "white")
    for number, picture in enumerate(pictures):
        small = ImageOps.contain(picture, (edge - 4, edge - 4))
        sheet.paste(small, (number % columns * edge + 2, number // columns * edge + 2))
    return sheet


def count_mistakes(truth: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], lowest_score: float) -> int:
    """Objects that were missed, and detections of at least this score that are none, at an overlap (IoU) of one half.

    Detections are taken by falling score, each for the object of its class that it overlaps most. Crowds do not count,
    nor do detections of their class that lie within them.
    """
    found = [entry for entry in found if entry["score"] >= lowest_score]
    if not truth:
        return len(found)
    crowds = [entry["iscrowd"] for entry in truth]
    boxes = [[entry["bbox"] for entry in entries] for entries in (found, truth)]
    overlaps = np.asarray(run_length.iou(np.array(boxes[0], float), np.array(boxes[1], float), crowds)) if found else []
    free = [not crowd for crowd in crowds]
    mistakes = 0
    for entry, row in zip(found, overlaps):
        alike = [i for i, other in enumerate(truth) if other["category_id"] == entry["category_id"] and row[i] >= 0.5]
        hit = max((i for i in alike if free[i]), key=lambda i: row[i], default=None)
        if hit is not None:
            free[hit] = False
        elif not any(crowds[i] for i in alike):
            mistakes += 1
    return mistakes + sum(free)
