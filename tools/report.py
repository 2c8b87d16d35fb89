"""One HTML page about an evaluation; it contains all that it shows, so it opens offline.

    python -m tools.report FOLDER [--data-path DIR] [--out FILE] [--json FILE]

FOLDER is what test.py wrote: <run>/evaluation/<name>/ with metrics.json and predictions.csv. The pictures of
the mistakes come from --data-path, else from where test.py found them. Where they are missing, the page says so.
"""

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from configs import SPLIT_NAMES, UserError
from configs.commands import CommandParser, command
from tasks.classification.class_names import in_words
from tasks.classification.metrics import TEMPERATURE_RANGE, class_results, confusion_matrix
from tasks.classification.predictions import Predictions
from utils.files import STDOUT, atomic_write, check_json_target, write_json
from utils.page import data_uri, jpeg, page, text

WORST_CLASSES, CONFUSED_PAIRS, MISTAKES = 20, 15, 24
THUMBNAIL_PIXELS, JPEG_QUALITY = 192, 80

STYLE = """
:root { color-scheme: light dark; --soft: GrayText; --line: color-mix(in srgb, CanvasText 20%, Canvas);
  --card: color-mix(in srgb, CanvasText 5%, Canvas); --bad: #d9622b; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: Canvas; color: CanvasText;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p { max-width: 46rem; } .soft, figcaption, small { color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem; }
.card b { display: block; font-size: 1.6rem; line-height: 1.2; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line); }
th.name, td.name { text-align: left; overflow-wrap: anywhere; min-width: 6rem; }
figure { margin: 0; break-inside: avoid-page; }
figure img, .missing { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; }
.missing { border: 1px dashed var(--line); padding: 1rem; text-align: center; color: var(--soft); }
figcaption { font-size: .82rem; overflow-wrap: anywhere; } .wrong { color: var(--bad); font-weight: 600; }
.right { color: CanvasText; font-weight: 600; }
"""


@dataclass(frozen=True)
class WrittenEvaluation:
    """The files that test.py wrote about one evaluation."""

    folder: Path
    metrics: dict[str, Any]
    predictions: Predictions
    images_root: Path | None  # the predictions' paths are relative to this folder; None where it was not found


def read_evaluation(folder: str | Path, data_path: str | None = None) -> WrittenEvaluation:
    """Read a folder of test.py. Raises UserError where something is missing or damaged, or no image has a label."""
    folder = Path(folder)
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        several = "map" in metrics
        if not several:
            _ = metrics["acc1_interval"], metrics["acc5_interval"], metrics["calibration"]["counts"]  # or KeyError
    except OSError:
        raise UserError(f"{folder}: holds no metrics.json; give a folder that test.py wrote") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'metrics.json'}: damaged, or not written by test.py") from None
    if several:
        raise UserError(f"{folder}: is of images of several classes; the report is for one class an image")
    predictions = Predictions.load(folder / "predictions.csv")
    if not predictions.labelled.any():
        raise UserError(f"{folder}: no image has a label, so there is nothing to report")
    return WrittenEvaluation(folder, metrics, predictions, _images_root(data_path, metrics, predictions.paths))


def _images_root(data_path: str | None, metrics: dict[str, Any], paths: Sequence[str]) -> Path | None:
    """The data folder or its validation split, whichever holds the images. UserError where --data-path holds none."""
    given = data_path or metrics.get("data")
    if not given:
        return None
    for root in [*(Path(given) / names["val"] for names in SPLIT_NAMES.values()), Path(given)]:
        if any((root / path).is_file() for path in paths[:100]):
            return root
    if data_path:
        raise UserError(f"--data-path {data_path}: holds none of the images, such as {paths[0]}")
    return None


# -------------------------------------------------------------------------------------------------------------- content
def page_content(evaluation: WrittenEvaluation) -> dict[str, Any]:
    """What the page shows, pictures aside: metrics, worst classes, confused pairs, most confident mistakes."""
    predictions = evaluation.predictions
    known = np.flatnonzero(predictions.labelled)
    labels, top = predictions.labels[known], predictions.top[known]
    names = in_words(predictions.classes, short=True)
    by_class = class_results(labels, top, predictions.nll[known].astype(np.float64), len(names))
    present = np.flatnonzero(by_class.images)
    worst = present[np.lexsort((-by_class.images[present], by_class.acc1[present]))][:WORST_CLASSES]
    cells = confusion_matrix(labels, top[:, 0], len(names)).tocoo()
    wrong = cells.row != cells.col
    rows, columns, counts = cells.row[wrong], cells.col[wrong], cells.data[wrong]
    pairs = np.lexsort((columns, rows, -counts))[:CONFUSED_PAIRS]
    mistakes = np.flatnonzero(top[:, 0] != labels)
    confidence = predictions.top_probabilities[known, 0]
    surest = mistakes[np.argsort(-confidence[mistakes], kind="stable")][:MISTAKES]
    return {
        "metrics": evaluation.metrics,
        "worst_classes": [
            {
                "name": names[i],
                "images": int(by_class.images[i]),
                "acc1": float(by_class.acc1[i]),
                "precision": float(by_class.precision[i]),
                "confused_with": names[by_class.confused_with[i]] if by_class.confused[i] else None,
                "confused": int(by_class.confused[i]),
            }
            for i in worst
        ],
        "confused_pairs": [
            {
                "label": names[rows[i]],
                "predicted": names[columns[i]],
                "images": int(counts[i]),
                "of": int(by_class.images[rows[i]]),
            }
            for i in pairs
        ],
        "mistakes": [
            {
                "path": predictions.paths[known[i]],
                "label": names[labels[i]],
                "predicted": names[top[i, 0]],
                "probability": float(confidence[i]),
                "label_probability": float(predictions.probabilities[known[i]]),
            }
            for i in surest
        ],
        "num_mistakes": len(mistakes),
        "num_classes_with_images": len(present),
    }


def thumbnail(path: Path) -> str | None:
    """The picture as a small JPEG in a data URI; None where it cannot be read."""
    try:
        with Image.open(path) as picture:
            small = ImageOps.exif_transpose(picture).convert("RGB")
        small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        return jpeg(small, JPEG_QUALITY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


# ----------------------------------------------------------------------------------------------------------------- page
def render(evaluation: WrittenEvaluation, content: dict[str, Any]) -> str:
    """The page as HTML. All text from files is escaped."""
    title = f"Evaluation {evaluation.folder.resolve().name}"
    sections = [_numbers(content), _calibration(content["metrics"]), _mistakes(content, evaluation.images_root)]
    sections += [_worst(content["worst_classes"]), _confused(content["confused_pairs"])]
    origin = f'<p class="soft">{text(_origin(content["metrics"]))}</p>'
    return page(title, STYLE, "\n".join([origin, *sections]))


def _origin(m: dict[str, Any]) -> str:
    """Network, data and settings of the evaluation in one line."""
    size = m.get("image_size")
    height, width = size if isinstance(size, list) else (size, size)
    views = {"none": "one centre crop" if m.get("crop", True) else "the whole image", None: None}
    known = [
        m.get("model"),
        m.get("weights"),
        m.get("data") and f"data {m['data']}",
        m.get("val_set") and f"validation set {m['val_set']}",
        size and f"{height} x {width} pixels",
        views.get(m.get("tta"), m.get("tta")),
        m.get("precision"),
        m.get("fused") and "fused",
        m.get("compiled") and "compiled",
        m.get("fast_loading") and "fast loading",
    ]
    return " \N{MIDDLE DOT} ".join(str(value) for value in known if value)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def _numbers(content: dict[str, Any]) -> str:
    m = content["metrics"]

    def span(key: str) -> str:
        low, high = m[key]
        return f"95 % interval {_number(low)} to {_number(high)}"

    cards = [
        ("Acc@1", f"{_number(m['acc1'], 3)} %", span("acc1_interval")),
        ("Acc@5", f"{_number(m['acc5'], 3)} %", span("acc5_interval")),
        (
            "Class mean",
            f"{_number(m['mean_class_acc1'], 3)} %",
            f"Acc@1, averaged over {content['num_classes_with_images']} classes",
        ),
        ("NLL", _number(m["nll"], 4), "nats; smaller is better"),
        ("Calibration error", _number(m["ece"], 4), "expected, 0 to 1"),
        ("Images", f"{m['counted']:,}", f"{content['num_mistakes']:,} predicted wrongly"),
    ]
    body = "".join(f'<div class="card">{text(a)}<b>{text(b)}</b><small>{text(c)}</small></div>' for a, b, c in cards)
    return f'<section><div class="grid">{body}</div></section>'


def _calibration(m: dict[str, Any]) -> str:
    """A reliability diagram; faint bars stand for few images."""
    from matplotlib.figure import Figure

    bins = m["calibration"]
    edges, counts = np.array(bins["edges"]), np.array(bins["counts"])
    accuracy, confidence = (np.array(bins[name], dtype=np.float64) for name in ("accuracy", "confidence"))
    few = counts < 0.01 * counts.sum()
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axis = figure.subplots()
    axis.bar(edges[:-1], 100 * accuracy, np.diff(edges), align="edge", color=np.where(few, "#c2dcec", "#3b93c9"))
    axis.plot([0, 1], [0, 100], "--", color="#d9622b")
    axis.set(xlim=(0, 1), ylim=(0, 100), xlabel="confidence", ylabel="correct, %")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    verdict = "too sure" if np.nansum(counts * (confidence - accuracy)) > 0 else "not sure enough"
    fitted = m.get("temperature")
    note = f" A temperature of {fitted['value']:.3f} would fit these images best." if fitted else ""
    if fitted and fitted["value"] in TEMPERATURE_RANGE:
        note = f" No temperature from {TEMPERATURE_RANGE[0]:g} to {TEMPERATURE_RANGE[1]:g} would fit these images best."
    return (
        "<section><h2>Calibration</h2><p>Share of correct predictions at each confidence. Bars below the dashed line "
        f"are too sure. On average the network is {verdict}.{text(note)} Faint bars hold less than 1 % of the images."
        f'</p><img src="{data_uri(buffer.getvalue(), "png")}" alt="calibration plot"></section>'
    )


def _mistakes(content: dict[str, Any], root: Path | None) -> str:
    figures = []
    for mistake in content["mistakes"]:
        # A predictions file may name any path. Only pictures in the data folder go into the page.
        path = None if root is None else (root / mistake["path"])
        inside = path is not None and path.resolve().is_relative_to(root.resolve())
        source = thumbnail(path) if inside else None
        picture = (
            f'<img src="{source}" alt="{text(mistake["path"])}">' if source else '<div class="missing">no picture</div>'
        )
        figures.append(
            f'<figure>{picture}<figcaption><span class="wrong">{text(mistake["predicted"])}</span> '
            f'{100 * mistake["probability"]:.1f} %<br>is <span class="right">{text(mistake["label"])}</span> '
            f"({100 * mistake['label_probability']:.1f} %)<br>{text(mistake['path'])}</figcaption></figure>"
        )
    note = "" if root is not None else " The pictures were not found: give their folder with --data-path."
    body = f'<div class="grid">{"".join(figures)}</div>' if figures else "<p>There are none.</p>"
    return (
        "<section><h2>Most confident mistakes</h2><p>Wrong predictions with the highest probabilities. Some labels may "
        f"be wrong.{note}</p>{body}</section>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], names: Sequence[int]) -> str:
    def cell(kind: str, index: int, value: Any) -> str:
        style = ' class="name"' if index in names else ""
        return f"<{kind}{style}>{text(value)}</{kind}>"

    lines = ["".join(cell("th", i, v) for i, v in enumerate(head))]
    lines += ["".join(cell("td", i, v) for i, v in enumerate(row)) for row in rows]
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _worst(classes: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            *(c["name"], c["images"], _number(c["acc1"], 1), _number(c["precision"], 1)),
            f"{c['confused_with']} ({c['confused']})" if c["confused"] else "-",
        )
        for c in classes
    ]
    head = ("class", "images", "Acc@1, %", "precision, %", "most often taken for")
    return f"<section><h2>Worst classes</h2>{_table(head, rows, (0, 4))}</section>"


def _confused(pairs: Sequence[dict[str, Any]]) -> str:
    rows = [(p["label"], p["predicted"], p["images"], f"{100 * p['images'] / p['of']:.1f}") for p in pairs]
    body = _table(("label", "predicted as", "images", "% of the label"), rows, (0, 1)) if rows else "<p>There are none."
    return f"<section><h2>Most confused pairs</h2>{body}</section>"


@command("tools.report")
def main(argv: Sequence[str] | None = None) -> None:
    """Write the page of a command line."""
    parser = CommandParser("tools.report", __doc__)
    parser.add_argument("folder", metavar="FOLDER", help="an evaluation of test.py, <run>/evaluation/<name>")
    parser.add_argument("--data-path", metavar="DIR", help="where the images lie, as for test.py")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write; default FOLDER/report.html")
    parser.add_argument("--json", metavar="FILE", help="write the content for programs; - is standard output")
    args = parser.parse_args(argv)
    check_json_target(args.json)
    evaluation = read_evaluation(args.folder, args.data_path)
    content = page_content(evaluation)
    out = args.out or Path(args.folder) / "report.html"
    try:
        with atomic_write(out) as partial:
            partial.write_text(render(evaluation, content), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    if args.json:
        write_json(args.json, content)
    print(f"wrote {out}", file=sys.stderr if args.json == STDOUT else sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
