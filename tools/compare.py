"""Is one network better than another? From the predictions of both on the same images.

    python -m tools.compare A.csv B.csv [--json FILE]

Prints accuracies, the difference with its 95 % paired bootstrap interval, and McNemar's exact test of top-1 and top-5.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs import UserError
from configs.commands import CommandParser, command
from tasks.classification.metrics import Comparison, compare
from tasks.classification.predictions import Predictions
from utils.files import STDOUT, check_json_target, write_json


def compare_predictions(first: Predictions, second: Predictions) -> dict[str, Any]:
    """Top-1 and top-5 of two networks on the images that have labels; {'acc1': Comparison, 'acc5': ..., ...}.

    Images are matched by their paths, in any order. Raises UserError where images or labels differ.
    """
    second = _in_order_of(first, second)
    known = first.labelled
    if not known.any():
        raise UserError("no image has a label; there is nothing to compare")
    results: dict[str, Any] = {f"acc{k}": compare(first.correct(k)[known], second.correct(k)[known]) for k in (1, 5)}
    results["agreement"] = 100 * float(np.mean(first.top[:, 0] == second.top[:, 0]))
    return results


def _in_order_of(first: Predictions, second: Predictions) -> Predictions:
    """The second predictions, their rows in the order of the first's images."""
    position = {path: row for row, path in enumerate(second.paths)}
    for predictions, name in ((first, "first"), (second, "second")):
        if len(set(predictions.paths)) < len(predictions):
            raise UserError(f"the {name} file names an image twice")
    only_first = [path for path in first.paths if path not in position]
    only_second = sorted(set(second.paths) - set(first.paths))
    if only_first or only_second:
        example = (only_first or only_second)[0]
        raise UserError(
            f"not about the same images: {len(only_first)} are only in the first file, {len(only_second)} only in the "
            f"second, such as {example!r}"
        )
    rows = np.array([position[path] for path in first.paths], dtype=np.int64)
    differ = np.flatnonzero(first.labels != second.labels[rows])
    if len(differ):
        raise UserError(f"the labels of {len(differ)} images differ, such as that of {first.paths[differ[0]]!r}")
    columns = ("labels", "probabilities", "nll", "top", "top_probabilities")
    return dataclasses.replace(second, paths=first.paths, **{name: getattr(second, name)[rows] for name in columns})


def format_comparison(results: dict[str, Any], names: Sequence[str]) -> str:
    """The results as text for people."""
    lines = [f"A  {names[0]}", f"B  {names[1]}", ""]
    for key, title in (("acc1", "Acc@1"), ("acc5", "Acc@5")):
        result: Comparison = results[key]
        low, high = result.interval
        lines += [
            f"{title}  A {result.accuracies[0]:.3f}  B {result.accuracies[1]:.3f}  B - A {result.difference:+.3f} "
            f"(95 % from {low:+.3f} to {high:+.3f})",
            f"       {result.only_first} images only A has right, {result.only_second} only B: McNemar p = "
            f"{result.p_value:.3g}, {'a difference' if result.p_value < 0.05 else 'no difference'} at the 5 % level",
        ]
    return "\n".join([*lines, f"the same first prediction for {results['agreement']:.2f} % of the images", ""])


@command("tools.compare")
def main(argv: Sequence[str] | None = None) -> None:
    """Compare two files."""
    parser = CommandParser("tools.compare", __doc__)
    parser.add_argument("files", nargs=2, metavar="FILE", help="predictions.csv that test.py wrote")
    parser.add_argument("--json", metavar="FILE", help="write the results for programs; - is standard output")
    args = parser.parse_args(argv)
    check_json_target(args.json)
    results = compare_predictions(*map(Predictions.load, args.files))
    text = format_comparison(results, args.files)
    print(text, end="", file=sys.stderr if args.json == STDOUT else sys.stdout)
    if args.json:
        plain = {key: dataclasses.asdict(results[key]) for key in ("acc1", "acc5")}
        write_json(args.json, {"files": args.files, **plain, "agreement": results["agreement"]})


if __name__ == "__main__":
    sys.exit(main())
