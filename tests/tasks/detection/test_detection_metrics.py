"""COCO's numbers: equal to pycocotools', and what is given to the evaluator."""

import contextlib
import io
import json

import detection_data
import numpy as np
import pytest
from pycocotools import mask as reference_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tasks.detection.coco import read_json
from tasks.detection.metrics import KINDS, NUMBERS, ground_truth, score


def made_up_results(content, rng, share=0.8):
    """Annotations moved about, some of another class, and some of nothing, with scores that often are the same."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    results = []
    for annotation in content["annotations"] * 2:
        if rng.random() > share:
            continue
        height, width = sizes[annotation["image_id"]]
        x, y, w, h = (value + rng.normal(0, 1.5) for value in annotation["bbox"])
        x, y, w, h = max(0, x), max(0, y), max(1, w), max(1, h)
        mask = np.zeros((height, width), np.uint8)
        mask[round(y) : round(y + h), round(x) : round(x + w)] = 1
        if rng.random() < 0.2:  # of another size than the mask
            w, h = 40 * w, 40 * h
        encoded = reference_mask.encode(np.asfortranarray(mask))
        results.append(
            {
                "image_id": annotation["image_id"],
                "category_id": int(rng.choice([annotation["category_id"], 2, 7], p=[0.8, 0.1, 0.1])),
                "bbox": [round(float(value), 3) for value in (x, y, w, h)],
                "score": round(float(rng.random()), 1),
                "segmentation": {"size": [height, width], "counts": encoded["counts"].decode()},
            }
        )
    return results


def by_pycocotools(path, results, kind):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), KINDS[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_numbers_equal_pycocotools_with_crowds_and_ties(tmp_path, kind):
    content = detection_data.make_split(tmp_path, "val", 24)
    for annotation in content["annotations"][::3]:  # of every size that COCO tells apart
        annotation["area"] = 2000 * (1 + annotation["id"] % 7)
    path = detection_data.write(tmp_path, "val", content)
    results = made_up_results(content, np.random.default_rng(5))
    # COCO's code would take the size of a box beside a mask for the mask's.
    alone = [{k: v for k, v in r.items() if k != {"box": "segmentation", "mask": "bbox"}[kind]} for r in results]
    expected = by_pycocotools(str(path), alone, kind)
    assert 5 < 100 * expected[0] < 95 and (expected > -1).sum() >= 11
    numbers = score(read_json(path, [tmp_path / "val"]), results, kind).numbers
    assert list(numbers) == list(NUMBERS)
    for value, reference in zip(numbers.values(), expected):
        assert np.isnan(value) if reference == -1 else value == pytest.approx(100 * reference, abs=1e-12)


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_ground_truth_as_detections_scores_1(tmp_path, kind):
    detection_data.make_split(tmp_path, "val", 12)
    split = read_json(tmp_path / "annotations" / "instances_val.json", [tmp_path / "val"])
    truth = ground_truth(split, with_masks=True)
    results = [{**annotation, "score": 0.5} for annotation in truth["annotations"] if not annotation["iscrowd"]]
    scores = score(split, results, kind)
    assert {scores.numbers[name] for name in ("ap", "ap50", "ap75", "ar100")} == {100.0}
    assert list(scores.by_class) == [2, 7]  # by rising id
    assert all(values == (100.0, 100.0, 100.0) for values in scores.by_class.values())


def test_nothing_found_scores_0(tmp_path):
    detection_data.make_split(tmp_path, "val", 6)
    split = read_json(tmp_path / "annotations" / "instances_val.json", [tmp_path / "val"])
    numbers = score(split, [], "mask").numbers
    assert numbers["ap"] == 0 and np.isnan(numbers["ap_large"])  # there are no large objects


def test_what_a_custom_file_leaves_out_is_computed(tmp_path):
    content = detection_data.make_split(tmp_path, "val", 6)
    for annotation in content["annotations"]:
        for name in ("id", "area", "iscrowd"):
            del annotation[name]
    del content["annotations"][0]["bbox"]
    path = detection_data.write(tmp_path, "val", content)
    split = read_json(path, [tmp_path / "val"])
    first = split.objects(0)[0]
    assert (first["bbox"], first["area"], first["iscrowd"], first["id"]) == ([*first["bbox"][:2], 16, 12], 192, 0, 1)
    assert json.loads(path.read_text())["annotations"][0].get("bbox") is None
