"""What an evaluation writes: metrics.json, per_class.csv, confusion.csv and .png, images.csv, report.html."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from yacs.config import CfgNode

from configs import UserError
from utils.files import atomic_write, write_json, write_rows
from utils.page import jpeg, page, text, with_titles
from utils.precision import Precision

from .drawing import overlay, side_by_side
from .folders import MaskedImages
from .inference import predict_classes
from .metrics import Summary, summarize
from .transforms import evaluation_views

PER_CLASS = ("class", "name", "iou", "accuracy", "pixels", "predicted")
CONFUSION = ("label", "label_name", "predicted", "predicted_name", "pixels")
IMAGES = ("image", "mask", "miou", "pixel_acc", "pixels")
SHOWN = 12  # worst pictures, and random ones
PICTURE_HEIGHT = 200  # pixels
PICTURES_NAME = "predictions.png"  # of some random ones
MOST_LABELS = 40  # classes up to which the confusion picture names them

STYLE = """
:root { color-scheme: light dark; } body { margin: 0 auto; max-width: 70rem; padding: 1rem;
  font: 16px/1.5 system-ui, sans-serif; } img { max-width: 100%; } figure { margin: 0 0 1rem; }
h1 { overflow-wrap: anywhere; } table { border-collapse: collapse; }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid GrayText; }
td.name, th.name { text-align: left; }
"""


def write_outputs(
    folder: Path,
    config: CfgNode,
    network: nn.Module,
    precision: Precision,
    images: MaskedImages,
    confusion: Tensor,
    by_image: Tensor,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Write everything about one evaluation to its folder; returns what metrics.json holds.

    Args:
        folder: is made.
        config, network, precision: predict the images that are shown, again.
        images: that were evaluated.
        confusion: int64 (K, K), rows are true classes.
        by_image: of each image, correct pixels, pixels that count, mIoU: float64 (images, 3).
        about: what was evaluated, for metrics.json.
    """
    numbers = summarize(confusion, config.TEST.ABSENT_CLASSES)
    other = summarize(confusion, "zero" if config.TEST.ABSENT_CLASSES == "skip" else "skip")
    names = images.classes
    metrics = about | numbers.as_dict()
    metrics |= {
        "images": len(images),
        "classes": len(names),
        "classes_in_masks": int((numbers.pixels > 0).sum()),
        "miou_with_absent_classes_as_zero": numbers.miou if config.TEST.ABSENT_CLASSES == "zero" else other.miou,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "per_class.csv", PER_CLASS, _class_rows(numbers, names))
        cells = confusion.nonzero().tolist()
        rows = [(i, names[i], j, names[j], int(confusion[i, j])) for i, j in cells]
        write_rows(folder / "confusion.csv", CONFUSION, rows)
        shares = [(m, 100 * hits / count if count else math.nan, int(count)) for hits, count, m in by_image.tolist()]
        table = [(*names, _number(miou), _number(acc), n) for names, (miou, acc, n) in zip(images.samples, shares)]
        write_rows(folder / "images.csv", IMAGES, table)
        draw_confusion(folder / "confusion.png", confusion, names)
        worst = [i for i in np.argsort(by_image[:, 2].numpy(), kind="stable") if by_image[i, 1] > 0][:SHOWN]
        random = np.sort(np.random.default_rng(0).permutation(len(images))[:SHOWN])
        pictures = {int(i): _show(config, network, precision, images, int(i)) for i in {*worst, *random}}
        sheet = _stack([pictures[int(i)] for i in random[:6]])
        with_titles(sheet, ["image", "mask", "prediction"]).save(folder / PICTURES_NAME)
        body = [_numbers_table(metrics, numbers, names)]
        for title, chosen in (("Worst", worst), ("Random", random)):
            body.append(f"<h2>{title}: image, mask, prediction</h2>")
            for i in map(int, chosen):
                caption = f"{images.samples[i][0]}: mIoU {shares[i][0]:.1f}, {shares[i][1]:.1f} % of its pixels"
                body.append(_figure(pictures[i], caption))
        written = page(f"Evaluation {folder.name}", STYLE, "\n".join(body))
        with atomic_write(folder / "report.html") as partial:
            partial.write_text(written, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    write_json(str(folder / "metrics.json"), metrics)
    return metrics


def _class_rows(numbers: Summary, names: Sequence[str]) -> list[Sequence[Any]]:
    """A line for every class; what has no value, such as the accuracy of a class without pixels, is empty."""
    columns = (numbers.iou, numbers.accuracy, numbers.pixels, numbers.predicted)
    return [
        (i, name, _number(iou), _number(accuracy), pixels, predicted)
        for i, (name, iou, accuracy, pixels, predicted) in enumerate(zip(names, *(c.tolist() for c in columns)))
    ]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def draw_confusion(path: Path, confusion: Tensor, names: Sequence[str]) -> None:
    """The confusion matrix as a picture: of each true class, a row, the share of its pixels that is predicted."""
    from matplotlib.figure import Figure  # imported lazily: it is slow

    total = confusion.sum(1, keepdim=True)
    shares = (100 * confusion.double() / total).masked_fill(total == 0, math.nan)
    edge = min(4 + 0.28 * len(names), 14)
    figure = Figure(figsize=(edge + 1, edge), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares.numpy(), vmin=0, vmax=100, cmap="Blues")
    if len(names) <= MOST_LABELS:
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
        for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            label.set_parse_math(False)  # a class may have a dollar sign in its name
    axis.set(xlabel="predicted", ylabel="class")
    figure.colorbar(image, label="% of the class's pixels", shrink=0.8)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


def _show(config: CfgNode, network: nn.Module, precision: Precision, images: MaskedImages, index: int) -> Image.Image:
    """Image, mask and prediction side by side."""
    device = next(network.parameters()).device
    picture, classes = images.load(index)
    views = [view.to(device) for view in evaluation_views(config, picture, list(config.TEST.SCALES))]
    predicted = predict_classes(config, network, views, classes.shape, precision).cpu().numpy()
    count = len(images.classes)
    return side_by_side([picture, *(overlay(picture, each, count) for each in (classes, predicted))], PICTURE_HEIGHT)


def _stack(rows: Sequence[Image.Image]) -> Image.Image:
    canvas = Image.new("RGB", (max(row.width for row in rows), sum(row.height + 4 for row in rows)), "white")
    top = 0
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height + 4
    return canvas


def _figure(picture: Image.Image, caption: str) -> str:
    return f'<figure><img src="{jpeg(picture, quality=85)}" alt=""><figcaption>{text(caption)}</figcaption></figure>'


def _numbers_table(metrics: dict[str, Any], numbers: Summary, names: Sequence[str]) -> str:
    facts = ("weights", "model", "data", "mode", "scales", "flip", "precision", "images")
    origin = " \N{MIDDLE DOT} ".join(f"{name} {metrics[name]}" for name in facts)
    order = torch.argsort(numbers.iou.nan_to_num(1e9), stable=True).tolist()
    rows = [
        f'<tr><td class="name">{text(names[i])}</td><td>{_number(float(numbers.iou[i]))[:6]}</td>'
        f"<td>{_number(float(numbers.accuracy[i]))[:6]}</td><td>{int(numbers.pixels[i]):,}</td></tr>"
        for i in order
    ]
    return (
        f"<p>{text(origin)}</p><p><b>{text(numbers.line())}</b></p>"
        '<table><tr><th class="name">class</th><th>IoU</th><th>accuracy</th><th>pixels</th></tr>'
        f"{''.join(rows)}</table>"
    )
