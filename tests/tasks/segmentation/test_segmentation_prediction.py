"""Prediction of one image: mirrored input, windows, scales, sizes; and the loss."""

import pytest
import torch
from segmentation_data import small_config
from torch import nn

from tasks.segmentation.folders import IGNORED
from tasks.segmentation.inference import predict_classes, window_starts
from tasks.segmentation.network import Segmenter
from tasks.segmentation.task import segmentation_loss
from utils.precision import build_precision

FLOAT32 = build_precision(small_config(), torch.device("cpu"))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    network = Segmenter(small_config("MODEL.GMA.NUM_CLASSES", "4"), auxiliary=False).train()
    for _ in range(3):  # running statistics of something
        network(torch.randn(4, 3, 64, 64))
    return network.eval()


def image(height: int = 50, width: int = 75) -> torch.Tensor:
    return torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_flipped_input_gives_flipped_output(network, mode):
    config = small_config("TEST.FLIP", "True", "TEST.MODE", mode, "TEST.WINDOW", "[50, 75]")
    size = (50, 75)
    found = predict_classes(config, network, [image()], size, FLOAT32)
    flipped = predict_classes(config, network, [image().flip(1)], size, FLOAT32)
    assert torch.equal(flipped, found.flip(1)) and len(found.unique()) > 1


def test_one_window_over_all_is_the_whole_image(network):
    whole, slide = (
        predict_classes(
            small_config("TEST.MODE", mode, "TEST.WINDOW", "[96, 96]"), network, [image()], (50, 75), FLOAT32
        )
        for mode in ("whole", "slide")
    )
    assert torch.equal(whole, slide)


@pytest.mark.parametrize(
    ("edge", "window", "stride", "starts"),
    [(100, 40, 30, [0, 30, 60]), (101, 40, 30, [0, 30, 60, 61]), (40, 40, 30, [0]), (41, 40, 40, [0, 1])],
)
def test_windows_cover_the_edge(edge, window, stride, starts):
    assert window_starts(edge, window, stride) == starts


class Levels(nn.Module):
    """Logits of two classes that a pixel's brightness decides."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        level = images.mean(1, keepdim=True)
        return torch.cat([level, -level], dim=1)


def test_windows_average_and_sizes_are_the_masks(network):
    picture = torch.zeros(60, 80, 3, dtype=torch.uint8)
    picture[:, 40:] = 255
    for mode in ("whole", "slide"):
        found = predict_classes(small_config("TEST.MODE", mode), Levels(), [picture], (120, 160), FLOAT32)
        assert found.shape == (120, 160)
        assert (found[:, :78] == 1).all() and (found[:, 82:] == 0).all()


def test_scales_are_averaged_as_probabilities():
    # Where the views contradict each other, the surer one wins.
    bright, dark = (torch.full((32, 32, 3), value, dtype=torch.uint8) for value in (255, 90))
    config = small_config("TEST.SCALES", "[1.0, 2.0]")
    found = predict_classes(config, Levels(), [dark, bright.repeat(2, 2, 1)], (32, 32), FLOAT32)
    assert (found == 0).all() and (predict_classes(config, Levels(), [dark], (32, 32), FLOAT32) == 1).all()


def test_the_loss_is_the_mean_over_pixels_that_count():
    torch.manual_seed(0)
    logits, aux = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    classes = torch.randint(3, (2, 4, 5)).short()
    classes[0, :2] = IGNORED
    total, parts = segmentation_loss(small_config(), [logits, aux], classes)
    counted = classes != IGNORED

    def expected(x: torch.Tensor) -> torch.Tensor:
        probabilities = x.movedim(1, -1)[counted].log_softmax(-1)
        return -probabilities.gather(1, classes[counted].long()[:, None]).mean()

    assert parts["main"].item() == pytest.approx(expected(logits).item(), rel=1e-5)
    assert total.item() == pytest.approx((expected(logits) + 0.4 * expected(aux)).item(), rel=1e-5)
    # A batch of nothing but ignored pixels has no loss; it must not be NaN, which would skip the update.
    nothing, _ = segmentation_loss(small_config(), [logits.requires_grad_()], torch.full_like(classes, IGNORED))
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()
