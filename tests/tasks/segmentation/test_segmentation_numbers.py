"""mIoU and its relatives against scikit-learn, and what the masks' values mean."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score

from tasks.segmentation.folders import IGNORED
from tasks.segmentation.metrics import confusion_matrix, summarize


def case(classes: int, seed: int, absent: tuple[int, ...] = (), ignored: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true classes; `absent` ones are predicted but not true."""
    rng = np.random.default_rng(seed)
    true = rng.choice([c for c in range(classes) if c not in absent], size=(37, 53))
    predicted = np.where(rng.random(true.shape) < 0.6, true, rng.integers(classes, size=true.shape))
    true[rng.random(true.shape) < ignored] = IGNORED
    return predicted, true


@pytest.mark.parametrize("kwargs", [{}, {"ignored": 0.2}, {"absent": (2,)}, {"absent": (0, 4), "ignored": 0.5}])
def test_numbers_are_those_of_scikit_learn(kwargs):
    predicted, true = case(5, seed=1, **kwargs)
    counted = true != IGNORED
    found = confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(true).short(), 5)
    expected = sklearn_confusion(true[counted], predicted[counted], labels=range(5))
    assert np.array_equal(found.numpy(), expected)

    present = sorted(set(true[counted].tolist()))
    iou = jaccard_score(true[counted], predicted[counted], labels=range(5), average=None, zero_division=0)
    numbers = summarize(found)
    assert numbers.miou == pytest.approx(100 * iou[present].mean(), rel=1e-12)
    # mmsegmentation counts a class that is predicted but nowhere true: its union is not empty, its IoU is 0.
    assert summarize(found, "zero").miou == pytest.approx(100 * iou.mean(), rel=1e-12)
    recall = [(predicted[true == c] == c).mean() for c in present]
    assert numbers.mean_acc == pytest.approx(100 * np.mean(recall), rel=1e-12)
    assert numbers.pixel_acc == pytest.approx(100 * (predicted == true)[counted].mean(), rel=1e-12)


def test_a_class_that_is_nowhere_counts_in_neither_convention():
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert summarize(confusion, "skip").miou == summarize(confusion, "zero").miou == pytest.approx((75 + 80) / 2)
    assert summarize(confusion).iou.isnan().tolist() == [False, False, True]


def test_sums_beyond_float32_stay_exact():
    confusion = torch.tensor([[2**53 - 1, 1], [0, 2**24 + 1]])
    assert summarize(confusion).pixels.tolist() == [2**53, 2**24 + 1]
