"""Which process sees which image when, augmented how."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import message_of, png, released
from PIL import Image

import data
from data import randomness
from data.datasets import AugmentedDataset, ImageDataset, decode_image
from data.samplers import SampleKey, TrainingOrder
from data.sources import FolderSource
from tasks.classification.images import eval_dataset, open_split, train_dataset
from tasks.classification.transforms import eval_transform, train_transform


# --------------------------------------------------------------------------------------------------- order of training
def indices(order: TrainingOrder) -> list[int]:
    return [key.index for key in order]


def per_update(orders: list[TrainingOrder], global_batch: int) -> list[list[int]]:
    """The images of each update, over all ranks, sorted."""
    share = global_batch // len(orders)
    lists = [indices(order) for order in orders]
    updates = len(lists[0]) // share
    return [sorted(index for mine in lists for index in mine[u * share : (u + 1) * share]) for u in range(updates)]


def orders_of(world_size: int, num_samples: int = 50, global_batch: int = 8, **options) -> list[TrainingOrder]:
    return [TrainingOrder(num_samples, global_batch, rank, world_size, seed=3, **options) for rank in range(world_size)]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_samples", [8, 15, 48, 50])
def test_no_image_is_seen_twice_in_an_epoch(world_size, num_samples, sharded):
    orders = orders_of(world_size, num_samples, sharded=sharded)
    seen = [index for order in orders for index in indices(order)]
    assert len(seen) == len(set(seen)) == num_samples // 8 * 8
    assert set(seen) <= set(range(num_samples))
    assert all(len(order) == len(indices(order)) == len(seen) // world_size for order in orders)
    assert all(order.updates_per_epoch == num_samples // 8 for order in orders)


def test_updates_do_not_depend_on_the_number_of_processes():
    for epoch in range(3):
        updates = []
        for world_size in (1, 2, 4, 8):
            orders = orders_of(world_size)
            for order in orders:
                order.set_position(epoch)
            updates.append(per_update(orders, 8))
        assert updates[0] == updates[1] == updates[2] == updates[3]
        assert len(updates[0]) == 6


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_continuing_at_any_update_is_exact(world_size, sharded):
    for rank in range(world_size):
        whole = orders_of(world_size, sharded=sharded)[rank]
        whole.set_position(epoch=4)
        keys = list(whole)
        for update in range(whole.updates_per_epoch + 1):
            rest = orders_of(world_size, sharded=sharded)[rank]
            rest.set_position(epoch=4, update=update)
            assert list(rest) == keys[update * 8 // world_size :]
            assert len(rest) == len(list(rest))


def test_epochs_seeds_and_ranks_differ():
    order = TrainingOrder(200, 8, 0, 1, seed=0)
    epochs = []
    for epoch in range(4):
        order.set_position(epoch)
        assert [key.epoch for key in order] == [epoch] * 200
        epochs.append(indices(order))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(200)), "shuffled"
    assert indices(TrainingOrder(200, 8, 0, 1, seed=1)) != epochs[0]
    order.set_position(0)
    assert indices(order) == epochs[0], "and the same again"


@pytest.mark.parametrize("world_size", [2, 3])
def test_sharded_order_stays_in_its_share(world_size):
    for rank, order in enumerate(orders_of(world_size, num_samples=50, global_batch=12, sharded=True)):
        assert all(index % world_size == rank for index in indices(order))


def test_what_is_left_behind_differs_between_epochs():
    """Images after the last whole update must not be the same ones in every epoch."""
    order = TrainingOrder(15, 8, 0, 1, seed=0)
    left = set()
    for epoch in range(10):
        order.set_position(epoch)
        left |= {frozenset(set(range(15)) - set(indices(order)))}
    assert len(left) > 5


def test_order_ignores_and_leaves_the_global_random_state():
    order = TrainingOrder(50, 8, 0, 1, seed=0)
    expected = indices(order)
    data.seed_everything(99)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert indices(order) == expected
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_indices_of_an_update():
    for order in orders_of(2):
        order.set_position(epoch=2)
        keys = indices(order)
        assert [order.indices_of(update) for update in range(6)] == [keys[u * 4 : (u + 1) * 4] for u in range(6)]


def test_too_small_a_training_set_names_the_numbers(make_config, image_folder):
    config = make_config("--data-path", str(image_folder), "--batch-size", "16", "--accumulation-steps", "2")
    message = message_of(data.TrainingData, config, images_of(config), 0, 1, False, print)
    assert "18 images" in message and "32" in message and "--batch-size" in message


# -------------------------------------------------------------------------------------------------- augmented batches
def train_data(make_config, root: Path, workers: int, *arguments: str, notify=print, rank=0, world_size=1):
    small = released(make_config).clone()
    opts = ["DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", str(workers), "TRAIN.ACCUMULATION_STEPS", "1"]
    config = make_config("--data-path", str(root), "--batch-size", "4", *arguments).clone()
    config.defrost()
    config.AUG = small.AUG  # the full recipe: every source of randomness
    config.merge_from_list(opts)
    config.freeze()
    return data.TrainingData(config, images_of(config), rank, world_size, False, notify)


def images_of(config):
    return train_dataset(config, open_split(config, "train", 0, 1))


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


def test_same_bits_for_any_number_of_workers(make_config, image_folder, two_cores):
    reference = list(train_data(make_config, image_folder, 0).batches(epoch=1, update=0))
    assert len(reference) == 4
    assert not torch.equal(reference[0][0], reference[1][0])
    for workers in (1, 2):
        data.seed_everything(1000 + workers)
        batches = train_data(make_config, image_folder, workers).batches(epoch=1, update=0)
        for (images, labels), (expected_images, expected_labels) in zip(batches, reference, strict=True):
            assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


def test_continuing_gives_the_same_batches(make_config, image_folder, two_cores):
    training = train_data(make_config, image_folder, 2)
    reference = list(training.batches(epoch=0, update=0))
    for update in (3, 1, 4, 0):  # one loader, whose workers live on
        batches = list(training.batches(epoch=0, update=update))
        assert len(batches) == 4 - update
        assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, reference[update:]))


def test_sample_depends_on_seed_epoch_and_index_alone(make_config, image_folder):
    images = ImageDataset(FolderSource(image_folder / "train"), train_transform(released(make_config)))
    dataset = AugmentedDataset(images, seed=5)
    keys = [SampleKey(epoch, index) for epoch in (0, 1) for index in (0, 7, 3)]
    expected = {key: dataset[key] for key in keys}
    for key in reversed(keys):
        data.seed_everything(int(torch.randint(1000, ())))
        (image, label), index, _ = dataset[key]
        assert torch.equal(image, expected[key][0][0]) and (label, index) == (key.index // 6, key.index)
    assert not torch.equal(expected[keys[0]][0][0], expected[keys[3]][0][0]), "another epoch"
    assert not torch.equal(AugmentedDataset(images, seed=6)[keys[0]][0][0], expected[keys[0]][0][0]), "another seed"


def test_world_sizes_see_the_same_images_augmented_alike(make_config, image_folder):
    """One process with batch 8 and two with batch 4 make the same updates."""
    one = train_data(make_config, image_folder, 0, "--batch-size", "8")
    two = [train_data(make_config, image_folder, 0, rank=rank, world_size=2) for rank in range(2)]
    halves = [list(training.batches(0, 0)) for training in two]
    for update, (images, labels) in enumerate(one.batches(0, 0)):
        ranks = [half[update] for half in halves]
        assert torch.equal(torch.stack([r[0] for r in ranks], 1).flatten(0, 1), images)
        assert torch.equal(torch.stack([r[1] for r in ranks], 1).flatten(), labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_training_image_is_named_and_replaced(make_config, image_folder, two_cores, workers):
    path = image_folder / "train" / "ant" / "5.png"
    path.write_bytes(path.read_bytes()[:100])
    notices: list[str] = []
    training = train_data(make_config, image_folder, workers, notify=notices.append)
    for epoch in range(3):  # 16 of 18 images are seen in an epoch, so one epoch may miss it
        for images, labels in training.batches(epoch, 0):
            assert images.isfinite().all() and len(labels) == 4
    assert len(notices) == 1, "once a run"
    assert str(path) in notices[0] and str(image_folder / "train" / "bee" / "0.png") in notices[0]


def test_substitute_keeps_its_own_label(image_folder, make_config):
    for name in ("4.png", "5.png"):
        (image_folder / "train" / "ant" / name).write_bytes(b"")
    dataset = AugmentedDataset(
        ImageDataset(FolderSource(image_folder / "train"), train_transform(released(make_config))), seed=0
    )
    (image, label), index, _ = dataset[SampleKey(0, 4)]
    assert (label, index) == (1, 6), "the first bee"
    assert torch.equal(image, dataset[SampleKey(0, 6)][0][0])


def test_too_many_unreadable_images_end_the_run(make_config, image_folder):
    for path in (image_folder / "train" / "bee").iterdir():
        path.write_bytes(b"")
    training = train_data(make_config, image_folder, 0, "--opts", "DATA.MAX_UNREADABLE", "2", notify=lambda line: None)
    message = message_of(lambda: [list(training.batches(epoch, 0)) for epoch in range(3)])
    assert "DATA.MAX_UNREADABLE = 2" in message and "/bee/" in message
    training = train_data(make_config, image_folder, 0, "--opts", "DATA.MAX_UNREADABLE", "6", notify=lambda line: None)
    assert all(len(list(training.batches(epoch, 0))) == 4 for epoch in range(3))


@pytest.mark.parametrize("fast", ["no", "train"])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_come_out_nearly_constant_are_counted_in_the_first_epoch(
    make_config, image_folder, two_cores, workers, fast
):
    """One is named. Pixels, order and labels are those of images that are as black and need no warning."""

    def train(value: int) -> tuple[list, list[str]]:
        for path in (image_folder / "train" / "bee").iterdir():
            Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) % value).save(path)
        notices: list[str] = []
        opts = ("--opts", "DATA.FAST_LOADING", fast)
        training = train_data(make_config, image_folder, workers, *opts, notify=notices.append)
        return [batch for epoch in range(2) for batch in training.batches(epoch, 0)], notices

    batches, notices = train(256)
    assert len(notices) == 2
    assert "/train/bee/" in notices[0] and "comes out nearly constant: its values 0 to 255" in notices[0]
    counted = int(notices[1].split()[0])
    assert 4 <= counted <= 6, "16 of 18 images are seen in an epoch, 6 are such"
    black, notices = train(1)
    assert not notices
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches, black, strict=True))


# ----------------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_covers_every_image_exactly_once(make_config, tmp_path, world_size):
    config = make_config("--batch-size", "4", "--opts", "DATA.NUM_WORKERS", "0")
    folder = tmp_path / "val" / "c"
    folder.mkdir(parents=True)
    for count in range(1, 18):
        (folder / f"{count:02d}.png").write_bytes(png(count))
        source = FolderSource(tmp_path / "val")
        reference = eval_transform(config)
        seen = []
        for rank in range(world_size):
            loader, _ = data.build_eval_loader(config, eval_dataset(config, source), rank, world_size, False)
            batches = [views[:, 0] for views, _ in loader]
            assert len(batches) == len(loader)
            seen += [image for images in batches for image in images]
        assert len(seen) == count
        # The red channel of image n is n: which ones were seen can be read from the pixels.
        red = sorted(round(float(data.denormalize(image[None])[0, 0, 0, 0]) * 255) for image in seen)
        assert red == list(range(1, count + 1))
    assert torch.equal(seen[0], reference(decode_image(source.read(0))))


def test_unreadable_validation_image_is_never_replaced(make_config, image_folder):
    path = image_folder / "val" / "bee" / "1.png"
    path.write_bytes(b"")
    config = make_config("--opts", "DATA.NUM_WORKERS", "0")
    images = eval_dataset(config, FolderSource(image_folder / "val"))
    loader, _ = data.build_eval_loader(config, images, 0, 1, pin_memory=False)
    assert message_of(list, loader).startswith(str(path))


def test_usable_workers(make_config, monkeypatch):
    def workers(asked: int, cores: int, processes: str | None) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        return data.usable_workers(make_config("--opts", "DATA.NUM_WORKERS", str(asked)))

    assert workers(32, 64, None) == 32
    assert workers(32, 64, "8") == 8
    assert workers(32, 2, None) == 2
    assert workers(32, 2, "8") == 1
    assert workers(0, 64, "1") == 0
    assert workers(3, 64, "8") == 3


def test_seeding_is_torchs_own():
    """The short way round torch.manual_seed gives the same numbers, for the whole range of seeds."""
    for key in range(20):
        randomness.seed_everything(7, key)
        quick = torch.rand(5)
        torch.manual_seed(randomness.derive_seed(7, key))
        assert torch.equal(quick, torch.rand(5))
