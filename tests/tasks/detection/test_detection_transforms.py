"""Box, mask and image stay together; the detector changes neither size nor order of what it is given."""

import random

import detection_data
import numpy as np
import pytest
import torch
from PIL import Image

from tasks.detection.images import TrainImages, collate, eval_view
from tasks.detection.transforms import TrainTransform, boxes_of_masks, crop, drop_vanished, flip, new_size, resize


def sample(width=61, height=47):
    """A black picture with two bright rectangles, and their boxes and masks."""
    pixels, masks = np.zeros((height, width, 3), np.uint8), torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, color, (left, top, right, bottom) in zip(masks, (0, 1), ((5, 6, 25, 40), (30, 11, 58, 31))):
        pixels[top:bottom, left:right, color] = 255
        mask[top:bottom, left:right] = 1
    targets = {"boxes": boxes_of_masks(masks).float(), "labels": torch.tensor([1, 2]), "masks": masks}
    return Image.fromarray(pixels), targets


def assert_together(image, targets, tolerance):
    """The bright pixels of an object are its mask, and the mask's own box is the object's, up to so many pixels."""
    assert targets["masks"].shape[1:] == (image.height, image.width)
    assert (boxes_of_masks(targets["masks"]) - targets["boxes"]).abs().max() <= tolerance
    for label, mask in zip(targets["labels"].tolist(), targets["masks"].numpy().astype(bool)):
        seen = np.asarray(image)[..., label - 1] > 127
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        box = targets["boxes"][targets["labels"].tolist().index(label)].numpy()
        assert np.abs(around - box).max() <= max(tolerance, 0.5)
        assert (seen ^ mask).sum() <= 2 * tolerance * (mask.sum() ** 0.5) * 2


def test_flip_is_exact_and_undoes_itself():
    image, targets = sample()
    flipped, moved = flip(image, targets)
    assert_together(flipped, moved, 0)
    back, undone = flip(flipped, moved)
    assert back.tobytes() == image.tobytes()
    assert all(torch.equal(undone[name], targets[name]) for name in targets)


@pytest.mark.parametrize("short_side", [33, 94, 141])
def test_resized_masks_have_the_resized_boxes(short_side):
    image, targets = resize(*sample(), short_side)
    assert min(image.size) == short_side
    assert_together(image, targets, 0.5)


def test_a_flipped_image_is_resized_to_the_flipped_image():
    for size in (33, 77):
        image, targets = flip(*resize(*sample(), size))
        other, others = resize(*flip(*sample()), size)
        assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1
        assert torch.equal(targets["masks"], others["masks"])
        torch.testing.assert_close(targets["boxes"], others["boxes"])


def test_a_cut_object_has_the_box_of_what_is_left():
    image, targets = crop(*sample(), left=10, top=8, width=25, height=30)
    assert_together(image, targets, 0)
    assert targets["boxes"].tolist() == [[0, 0, 15, 30], [20, 3, 25, 23]]
    _, one = crop(*sample(), left=28, top=0, width=30, height=40)
    assert one["labels"].tolist() == [2]
    image, targets = sample()
    del targets["masks"]
    assert crop(image, targets, 10, 8, 25, 30)[1]["boxes"].tolist() == [[0, 0, 15, 30], [20, 3, 25, 23]]


def test_an_l_shaped_object_that_is_cut_keeps_no_empty_box():
    image, targets = sample()
    targets["masks"][0] = 0
    targets["masks"][0, 6:40, 5:8] = targets["masks"][0, 36:40, 5:25] = 1
    _, cut = crop(image, targets, left=0, top=0, width=40, height=30)
    assert cut["boxes"][0].tolist() == [5, 6, 8, 30]  # the foot of the L is outside


def test_every_training_view_keeps_them_together():
    config = detection_data.tiny_config("DATA.CROP", "[24, 40]", "DATA.CROP_MIN_SIZES", "[48, 94]")
    transform, sizes = TrainTransform(config), set()
    for seed in range(40):
        random.seed(seed)
        image, targets = transform(*sample())
        sizes.add(min(image.size))
        if len(targets["boxes"]):
            # Two resizes, the second by up to two: half a pixel of the first is one of the second.
            assert (boxes_of_masks(targets["masks"]) - targets["boxes"]).abs().max() <= 1.5
    assert {32, 48} <= sizes


@pytest.mark.parametrize(
    ("size", "expected"), [((640, 480), (1067, 800)), ((480, 640), (800, 1067)), ((2000, 500), (1333, 333))]
)
def test_sizes_are_those_of_the_relatives(size, expected):
    assert new_size(*size, 800, 1333) == expected


def test_views_depend_on_seed_epoch_and_index_alone(tmp_path):
    from data.datasets import AugmentedDataset
    from data.samplers import SampleKey
    from tasks.detection.coco import read_json

    detection_data.make_split(tmp_path, "train", 6)
    split = read_json(tmp_path / "annotations" / "instances_train.json", [tmp_path / "train"])
    config = detection_data.tiny_config()
    images = TrainImages(split, {2: 1, 7: 2}, TrainTransform(config), with_masks=True)
    augmented = AugmentedDataset(images, seed=3)
    views = [augmented[SampleKey(epoch, 2)][0] for epoch in (0, 1, 2, 3, 0)]
    assert torch.equal(views[0][0], views[4][0])
    assert all(torch.equal(views[0][1][name], views[4][1][name]) for name in views[0][1])
    assert len({view[0].numpy().tobytes() for view in views}) > 2
    empty, none = images[4]
    assert none["boxes"].shape == (0, 4) and none["masks"].shape == (0, *empty.shape[1:])
    crowd = split.objects(3)
    assert [entry["iscrowd"] for entry in crowd] == [1, 0] and len(images.targets(3)["boxes"]) == 1
    pictures, targets = collate([images[0], images[4]])
    assert [picture.shape[0] for picture in pictures] == [3, 3] and len(targets) == 2


def test_boxes_outside_and_without_extent_are_dropped():
    boxes = torch.tensor([[0.0, 0, 5, 5], [3, 3, 3, 9], [4, 4, 3, 9]])
    kept = drop_vanished({"boxes": boxes, "labels": torch.arange(3)})
    assert kept["labels"].tolist() == [0]


def test_evaluation_sees_the_whole_image_resized():
    view = eval_view(sample()[0], detection_data.tiny_config())
    assert view.dtype == torch.uint8 and view.shape == (3, 32, 42)
