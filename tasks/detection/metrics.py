"""COCO's average precision and recall, of boxes and masks, by faster-coco-eval: pycocotools' numbers, sooner."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from .coco import CocoSplit, encode_mask
from .inference import Result

# COCO's twelve numbers, in its order.
NUMBERS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
KINDS = {"box": "bbox", "mask": "segm"}  # our name -> COCO's


@dataclass(frozen=True)
class Scores:
    """What COCO computes of one kind; percent, NaN where there are no such objects."""

    numbers: dict[str, float]  # the twelve
    by_class: dict[int, tuple[float, float, float]]  # category id -> AP, AP50, AR100


def kinds_of(detector: str) -> tuple[str, ...]:
    return ("box", "mask") if detector == "mask_rcnn" else ("box",)


def score(split: CocoSplit, results: Sequence[Result], kind: str) -> Scores:
    """COCO's numbers of the results of all images, of kind 'box' or 'mask'."""
    truth = COCO(ground_truth(split, with_masks=kind == "mask"))
    found = truth.loadRes(results_of_kind(results, kind))
    evaluation = COCOeval_faster(truth, found, KINDS[kind])
    evaluation.run()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]  # [T, R, K, A, M] and [T, K, A, M]
    numbers = dict(zip(NUMBERS, map(_percent, evaluation.stats)))
    by_class = {
        int(category): tuple(map(_mean, (precision[:, :, k, 0, -1], precision[0, :, k, 0, -1], recall[:, k, 0, -1])))
        for k, category in enumerate(evaluation.params.catIds)
    }
    return Scores(numbers, by_class)


def results_of_kind(results: Sequence[Result], kind: str) -> list[Result]:
    """The results as COCO takes them for one kind: the size of a mask is its own area, not that of a box beside it."""
    other = "bbox" if kind == "mask" else "segmentation"
    return [{name: value for name, value in result.items() if name != other} for result in results]


def ground_truth(split: CocoSplit, with_masks: bool) -> dict[str, Any]:
    """The split as COCO's evaluators take it: every annotation has an area, and masks are run lengths."""
    annotations = []
    for index, image in enumerate(split.images):
        for entry in split.objects(index):
            mask = entry.pop("segmentation")
            if with_masks and mask:
                entry["segmentation"] = encode_mask(mask, image.height, image.width)
            elif with_masks:  # a crowd that has a box alone
                x, y, width, height = entry["bbox"]
                corners = [x, y, x, y + height, x + width, y + height, x + width, y]
                entry["segmentation"] = encode_mask([corners], image.height, image.width)
            annotations.append({**entry, "image_id": image.id})
    return {
        "images": [{"id": image.id, "width": image.width, "height": image.height} for image in split.images],
        "categories": [{"id": category, "name": name} for category, name in split.categories.items()],
        "annotations": annotations,
    }


def _percent(value: float) -> float:
    return 100 * float(value) if value > -1 else math.nan


def _mean(values: np.ndarray) -> float:
    return _percent(values[values > -1].mean()) if (values > -1).any() else math.nan
