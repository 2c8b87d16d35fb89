"""A page about an evaluation, which contains all that it shows: numbers, classes, worst and random pictures."""

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from configs import UserError
from utils.files import write_file
from utils.page import jpeg, page, text, with_titles

from .coco import CocoSplit, encode_mask
from .images import files_of, read_image
from .inference import Result
from .metrics import NUMBERS, Scores
from .pictures import count_mistakes, draw, grid

WORST = RANDOM = 12  # pictures
EDGE = 480  # pixels, of a picture on the page
GRID_NAME = "predictions.png"
STYLE = """
:root { color-scheme: light dark; } body { margin: 0 auto; max-width: 70rem; padding: 1rem; font: 16px/1.5 system-ui; }
table { border-collapse: collapse; font-size: .9rem; } td, th { padding: .2rem .6rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr { border-bottom: 1px solid GrayText; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: .75rem; }
figure { margin: 0; } figure img { width: 49%; } figcaption { font-size: .85rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
"""


def write_report(
    folder: Path,
    split: CocoSplit,
    results: Sequence[list[Result]],
    content: dict[str, Any],
    scores: dict[str, Scores],
    lowest_score: float,
) -> None:
    """Write report.html, and predictions.png with the random pictures; each shows annotations and detections.

    Worst are the pictures with the most objects missed and detections wrong, of those with at least `lowest_score`.
    """
    mistakes = [count_mistakes(split.objects(i), found, lowest_score) for i, found in enumerate(results)]
    worst = [i for i in sorted(range(len(results)), key=lambda i: -mistakes[i])[:WORST] if mistakes[i]]
    drawn = sorted(random.Random(0).sample(range(len(results)), min(RANDOM, len(results))))
    pairs = {index: _pair(split, results[index], index, lowest_score) for index in {*worst, *drawn}}
    sheet, pictures = io.BytesIO(), [picture for index in drawn for picture in pairs[index]]
    with_titles(grid(pictures, columns=6, edge=256), ["annotations", "detections"] * 3).save(sheet, "PNG")
    write_file(sheet.getvalue(), folder / GRID_NAME)

    def figures(indices: Sequence[int]) -> str:
        return "".join(_figure(split, index, pairs[index], mistakes[index]) for index in indices)

    title = f"Evaluation {folder.resolve().name}"
    kinds = [_row([kind, *(content[f"{kind}_{name}"] for name in NUMBERS)]) for kind in scores]
    classes = [
        _row([name, split.counts[category], *(v for each in scores.values() for v in each.by_class[category])])
        for category, name in split.categories.items()
    ]
    class_head = ["class", "objects", *(f"{kind} {name}" for kind in scores for name in ("AP", "AP50", "AR100"))]
    head = _row(["%", *(name.replace("_", " ") for name in NUMBERS)], "th")
    origin = f"{content['model']}, {content['weights']}, {content['images']} images of {content['data']}"
    body = f"""<p>{text(origin)}</p>
<div class="scroll"><table>{head}{"".join(kinds)}</table></div>
<h2>Worst pictures</h2><p>Left the annotations, right the detections with a score of at least {lowest_score:g}. A
mistake is an object that was missed or a detection that is none, at an overlap of one half.</p>
<div class="pictures">{figures(worst)}</div>
<h2>Random pictures</h2><div class="pictures">{figures(drawn)}</div>
<h2>Classes</h2><div class="scroll"><table>{_row(class_head, "th")}{"".join(classes)}</table></div>"""
    write_file(page(title, STYLE, body).encode(), folder / "report.html")


def _pair(split: CocoSplit, found: Sequence[Result], index: int, lowest_score: float) -> tuple[Image.Image, ...]:
    """The picture with its annotations, and with its detections; grey where it cannot be read any more."""
    shape = split.images[index]
    try:
        image = read_image(split, files_of(split), index)
    except UserError:
        image = Image.new("RGB", (shape.width, shape.height), "grey")
    truth = split.objects(index)
    for entry in truth:
        if entry["segmentation"]:
            entry["segmentation"] = encode_mask(entry["segmentation"], shape.height, shape.width)
    shown = [entry for entry in found if entry["score"] >= lowest_score]
    return draw(image, truth, split.categories), draw(image, shown, split.categories)


def _figure(split: CocoSplit, index: int, pictures: Sequence[Image.Image], mistakes: int) -> str:
    images = []
    for picture in pictures:
        small = picture.copy()
        small.thumbnail((EDGE, EDGE))
        images.append(f'<img src="{jpeg(small, quality=80)}" alt="">')
    caption = f"{text(split.images[index].file_name)}: {mistakes} mistakes"
    return f"<figure>{' '.join(images)}<figcaption>{caption}</figcaption></figure>"


def _row(values: Sequence[Any], cell: str = "td") -> str:
    """A row of a table; numbers that are not there are a dash."""
    shown = ["-" if v != v else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values]
    return f"<tr>{''.join(f'<{cell}>{text(value)}</{cell}>' for value in shown)}</tr>"
