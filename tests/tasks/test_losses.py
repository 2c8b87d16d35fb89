"""LOSS and AUG.MIXUP_OFF_EPOCH: the loss of labels, by hand."""

import pytest
import runs
import torch
from timm.data import Mixup
from torch import nn

from configs import UserError
from tasks.classification.losses import build_criterion, class_weights

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.3, 0.1]])
LABELS = torch.tensor([0, 2])
MIXED = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.2, 0.8]])


@pytest.fixture
def criterion_of(make_config):
    def build(*opts, mixed=False, counts=(30, 10, 20)):
        return build_criterion(make_config("--opts", "MODEL.LABEL_SMOOTHING", "0.3", *opts), mixed, counts)

    return build


def test_binary_cross_entropy_is_the_mean_over_classes(criterion_of):
    """Labels are smoothed as timm does: 0.3 is spread over the three classes."""

    def by_hand(targets):
        return -(targets * LOGITS.sigmoid().log() + (1 - targets) * (-LOGITS).sigmoid().log()).mean()

    bce = criterion_of("LOSS.NAME", "bce")
    torch.testing.assert_close(bce(LOGITS, LABELS), by_hand(torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])))
    torch.testing.assert_close(bce(LOGITS, MIXED), by_hand(MIXED))
    bce = criterion_of("LOSS.NAME", "bce", "LOSS.BCE_THRESHOLD", "0.25")
    torch.testing.assert_close(bce(LOGITS, MIXED), by_hand(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])))
    assert bce(LOGITS.bfloat16(), LABELS).dtype == torch.float32


def test_weights_of_classes(make_config):
    def weights(value, counts=(30, 10, 20), *opts):
        return class_weights(make_config("--opts", "LOSS.CLASS_WEIGHTS", value, *opts), counts)

    assert weights("") is None
    torch.testing.assert_close(weights("balanced"), torch.tensor([60 / 90, 60 / 30, 60 / 60]))
    effective = torch.tensor([(1 - 0.9) / (1 - 0.9**n) for n in (30, 10, 20)])
    torch.testing.assert_close(
        weights("effective", (30, 10, 20), "LOSS.EFFECTIVE_BETA", "0.9"), effective / effective.mean()
    )
    assert weights("[1, 0.5, 2]").tolist() == [1.0, 0.5, 2.0]
    assert weights("balanced", (4, 0)).isfinite().all() and weights("effective", (4, 0)).isfinite().all()
    with pytest.raises(UserError, match=r"has 2 weights for 3 classes"):
        weights("[1, 2]")
    for value in ("[0, 0]", "[-1, 1]", "even", "3"):
        with pytest.raises(UserError, match=r"LOSS.CLASS_WEIGHTS = .*must be '', 'balanced', 'effective' or a list"):
            weights(value)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_weighted_cross_entropy_counts_each_image_by_its_class(criterion_of, smoothing):
    """The mean is over images: an image weighs the same in any batch, on any process, in any accumulation."""
    weights = torch.tensor([1.0, 0.5, 2.0])
    opts = ("LOSS.CLASS_WEIGHTS", "[1, 0.5, 2]", "MODEL.LABEL_SMOOTHING", str(smoothing))
    smooth = torch.eye(3)[LABELS] * (1 - smoothing) + smoothing / 3
    for mixed, targets, spread in ((False, LABELS, smooth), (True, MIXED, MIXED)):
        criterion = criterion_of(*opts, mixed=mixed)
        expected = -(weights * spread * LOGITS.log_softmax(1)).sum(1)
        torch.testing.assert_close(criterion(LOGITS, targets), expected.mean())
        torch.testing.assert_close(criterion(LOGITS[:1], targets[:1]), expected[0])
    bce = criterion_of("LOSS.NAME", "bce", *opts)
    terms = nn.functional.binary_cross_entropy_with_logits(LOGITS, MIXED, reduction="none")
    torch.testing.assert_close(bce(LOGITS, MIXED), (weights * terms).mean())


@pytest.mark.parametrize(
    ("threshold", "smoothing", "works"),
    [(0.0, 0.0, True), (0.0, 0.3, False), (0.1, 0.3, True), (0.8, 0.3, False), (0.79, 0.3, True), (0.99, 0.0, True)],
)
def test_a_threshold_that_tells_no_targets_apart_is_refused(criterion_of, threshold, smoothing, works):
    opts = ("LOSS.NAME", "bce", "LOSS.BCE_THRESHOLD", str(threshold), "MODEL.LABEL_SMOOTHING", str(smoothing))
    if not works:
        with pytest.raises(UserError, match=r"LOSS.BCE_THRESHOLD = .* all or none exceed it; set one between, or"):
            criterion_of(*opts)
        return
    targets = torch.eye(3)[LABELS]
    expected = nn.functional.binary_cross_entropy_with_logits(LOGITS, targets)
    torch.testing.assert_close(criterion_of(*opts)(LOGITS, LABELS), expected)


def test_a_threshold_without_bce_is_refused(make_config):
    with pytest.raises(UserError, match=r"LOSS.BCE_THRESHOLD = 0.5: is for LOSS.NAME 'bce'; set that"):
        make_config("--opts", "LOSS.BCE_THRESHOLD", "0.5")


def test_a_run_takes_its_weights_from_its_images_and_mixes_no_more_from_an_epoch_on(
    image_folder, tmp_path, monkeypatch
):
    """Stopped in the epoch that mixes no more, and continued, it ends with the same bits."""
    for path in sorted((image_folder / "train" / "bee").iterdir())[2:]:
        path.unlink()  # 2 of 14 images
    shown, mix = [], Mixup.__call__

    def watched(mixup, *args):
        shown.append(mixup.mixup_enabled)
        return mix(mixup, *args)

    monkeypatch.setattr(Mixup, "__call__", watched)
    monkeypatch.setattr(
        "tasks.classification.task.build_criterion",
        lambda config, mixed, counts: shown.append(counts) or build_criterion(config, mixed, counts),
    )
    opts = ("LOSS.NAME", "bce", "LOSS.CLASS_WEIGHTS", "balanced", "AUG.MIXUP_OFF_EPOCH", "1")
    one, two = (runs.arguments(image_folder, tmp_path / name, *opts) for name in ("one", "two"))
    assert runs.train_here(monkeypatch, one) == 0
    assert shown == [[6, 2, 6], True, True, True, True, False, False, False], "the first batch twice: it is shown"
    assert runs.train_here(monkeypatch, two, stop_at=4) == 75
    assert runs.train_here(monkeypatch, two) == 0
    assert runs.final_state(tmp_path / "one", 2) == runs.final_state(tmp_path / "two", 2)
