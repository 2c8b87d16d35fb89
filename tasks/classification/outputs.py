"""What an evaluation writes: metrics.json, the predictions, per_class.csv and confusion.csv, in a folder of its own."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import write_json, write_rows

from . import metrics
from .predictions import Predictions
from .validation_sets import real_accuracy


def summarize(predictions: Predictions, label_sets: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
    """The numbers of an evaluation, as metrics.json holds them: accuracies in percent, NLL in nats, ECE from 0 to 1.

    Images without a label count nowhere. With `label_sets` (ReaL), acc1, acc5 and their intervals are over the images
    that have such labels; everything else is by the labels of the folders, `folder_acc1` and `folder_acc5` included.
    """
    known = predictions.labelled
    labels, nll = predictions.labels[known], predictions.nll[known].astype(np.float64)
    first, any_of_five = predictions.correct(1)[known], predictions.correct(5)[known]
    judged = (first, any_of_five) if label_sets is None else real_accuracy(predictions.top, label_sets)
    bins = metrics.calibration(predictions.top_probabilities[known, 0], first)
    by_class = metrics.class_results(labels, predictions.top[known], nll, len(predictions.classes))
    summary = {
        "images": len(predictions),
        "counted": len(judged[0]),
        "classes": len(predictions.classes),
        "classes_with_images": int(np.count_nonzero(by_class.images)),
        "acc1": metrics.accuracy(judged[0]),
        "acc5": metrics.accuracy(judged[1]),
        "acc1_interval": metrics.accuracy_interval(judged[0]),
        "acc5_interval": metrics.accuracy_interval(judged[1]),
        "mean_class_acc1": float(by_class.acc1[by_class.images > 0].mean()) if len(labels) else math.nan,
        "nll": float(nll.mean()) if len(labels) else math.nan,
        "ece": bins.ece,
        "calibration": {name: getattr(bins, name).tolist() for name in ("edges", "counts", "confidence", "accuracy")},
        "temperature": None,
    }
    if label_sets is not None:
        summary |= {"folder_acc1": metrics.accuracy(first), "folder_acc5": metrics.accuracy(any_of_five)}
    if predictions.logits is not None and len(labels) and len(predictions.classes) > 1:
        logits = predictions.logits if known.all() else predictions.logits[known]
        temperature = metrics.fit_temperature(logits, labels)
        cooled_nll, confidence = metrics.at_temperature(logits, labels, temperature)
        summary["temperature"] = {
            "value": temperature,
            "nll": float(cooled_nll.mean()),
            "ece": metrics.calibration(confidence, first).ece,
            "note": "fitted on these very images: a diagnosis, not a result",
        }
    return summary


def describe(summary: dict[str, Any]) -> list[str]:
    """The numbers of `summarize` as log lines."""
    spans = [f"{low:.2f} to {high:.2f}" for low, high in (summary["acc1_interval"], summary["acc5_interval"])]
    lines = [
        f"95 % bootstrap intervals over {summary['counted']} images: Acc@1 {spans[0]}, Acc@5 {spans[1]}; "
        f"mean over {summary['classes_with_images']} classes {summary['mean_class_acc1']:.3f}"
    ]
    calibrated = f"NLL {summary['nll']:.4f}, expected calibration error {summary['ece']:.4f}"
    if fitted := summary["temperature"]:
        limit = " (the limit of what is tried)" if fitted["value"] in metrics.TEMPERATURE_RANGE else ""
        at = f"at temperature {fitted['value']:.3f}{limit}, fitted on these images"
        calibrated += f"; {fitted['nll']:.4f} and {fitted['ece']:.4f} {at}"
    lines.append(calibrated)
    if "folder_acc1" in summary:
        lines.append(
            f"by the labels of the folders: Acc@1 {summary['folder_acc1']:.3f} Acc@5 {summary['folder_acc5']:.3f}"
        )
    return lines


def write_outputs(folder: Path, predictions: Predictions, summary: dict[str, Any]) -> None:
    """Write everything about one evaluation to a folder. What lay there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    predictions.save(folder / "predictions.csv")
    write_rows(folder / "per_class.csv", PER_CLASS, _per_class_rows(predictions))
    write_rows(folder / "confusion.csv", CONFUSION, _confusion_rows(predictions))
    write_json(str(folder / "metrics.json"), summary)


PER_CLASS = (
    *("class", "name", "images", "acc1", "acc5", "nll", "predicted", "precision"),
    *("confused_with", "confused_name", "confused"),
)
CONFUSION = ("label", "label_name", "predicted", "predicted_name", "images")


def _per_class_rows(predictions: Predictions) -> Iterable[Sequence[Any]]:
    """A line for every class; what has no value, such as the accuracy of a class without images, is empty."""
    known, names = predictions.labelled, predictions.classes
    results = metrics.class_results(
        predictions.labels[known], predictions.top[known], predictions.nll[known], len(names)
    )
    for i, name in enumerate(names):
        other = int(results.confused_with[i])
        numbers = [results.acc1[i], results.acc5[i], results.nll[i]]
        row = [i, name, results.images[i], *map(_number, numbers), results.predicted[i], _number(results.precision[i])]
        yield [*row, *((other, names[other], results.confused[i]) if other >= 0 else ("", "", 0))]


def _confusion_rows(predictions: Predictions) -> Iterable[Sequence[Any]]:
    """The cells of the confusion matrix that are not 0, one per line: never more than images, for any class count."""
    known, names = predictions.labelled, predictions.classes
    cells = metrics.confusion_matrix(predictions.labels[known], predictions.top[known, 0], len(names)).tocoo()
    for label, predicted, images in zip(cells.row.tolist(), cells.col.tolist(), cells.data.tolist()):
        yield label, names[label], predicted, names[predicted], images


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
