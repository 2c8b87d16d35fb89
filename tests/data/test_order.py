"""The order of training samples where classes are balanced and images repeated."""

import numpy as np
import pytest
import runs
import torch
from conftest import write_image_folder
from image_data import message_of
from ranks import run_ranks

from data.randomness import ORDER, derive_seed
from data.samplers import ClassBalance, SampleKey, TrainingOrder
from tasks.classification.images import class_balance, open_split, train_dataset

LONG_TAIL = np.repeat([0, 1, 2, 3], [100, 30, 9, 1])[np.random.default_rng(0).permutation(140)]  # 17 updates of 8


def orders(world_size: int = 1, epoch: int = 0, seed: int = 3, labels=LONG_TAIL, **options) -> list[TrainingOrder]:
    made = [TrainingOrder(len(labels), 8, rank, world_size, seed, **options) for rank in range(world_size)]
    for order in made:
        order.set_position(epoch)
    return made


def balanced(strength: float, labels=LONG_TAIL) -> ClassBalance:
    return ClassBalance(labels, strength)


def counts_of(keys: list[SampleKey], labels=LONG_TAIL) -> list[int]:
    return np.bincount(labels[[key.index for key in keys]], minlength=labels.max() + 1).tolist()


# ------------------------------------------------------------------------------------------------------------- balance
@pytest.mark.parametrize("strength", [0.001, 0.25, 0.5, 1.0])
def test_each_class_gets_its_part_of_every_epoch_rounded(strength):
    weights = np.array([100, 30, 9, 1]) ** (1 - strength)
    expected = 17 * 8 * weights / weights.sum()
    for epoch in range(5):
        (order,) = orders(epoch=epoch, balance=balanced(strength))
        keys = list(order)
        assert len(keys) == len(order) == 17 * 8, "as many updates as without balance"
        counts = np.array(counts_of(keys))
        assert (np.floor(expected) <= counts).all() and (counts <= np.ceil(expected)).all()
        seen = np.bincount([key.index for key in keys], minlength=140)
        for label in range(4):
            of_class = seen[label == LONG_TAIL]
            assert of_class.max() - of_class.min() <= 1, "within a class, all images alike"
    assert counts_of(keys) != counts_of(list(orders()[0])) or strength == 0.001


def test_full_balance_is_equal_counts():
    (order,) = orders(balance=balanced(1.0))
    assert counts_of(list(order)) == [34] * 4


def test_copies_of_an_image_are_views_of_their_own():
    """The one image of the rarest class, seen 34 times, is augmented in 34 ways."""
    (order,) = orders(balance=balanced(1.0))
    keys = list(order)
    assert len(set(keys)) == len(keys)
    rare = int(np.flatnonzero(LONG_TAIL == 3)[0])
    assert sorted(key.view for key in keys if key.index == rare) == list(range(34))


def test_which_images_of_a_large_class_are_seen_changes_with_epoch_and_seed():
    def common(**options) -> frozenset[int]:
        keys = list(orders(balance=balanced(1.0), **options)[0])
        return frozenset(key.index for key in keys if LONG_TAIL[key.index] == 0)

    sets = {common(epoch=epoch) for epoch in range(4)} | {common(seed=seed) for seed in (4, 5)}
    assert len(sets) == 6
    assert len(frozenset.union(*(common(epoch=epoch) for epoch in range(20)))) > 95, "none is left out for ever"


def test_balanced_draw_is_the_same_on_every_machine():
    """A change here changes the order of runs that users continue."""
    images, copies = ClassBalance(np.array([0, 0, 0, 0, 1]), 0.5).draw(np.random.default_rng(7), 6)
    assert images.tolist() == [4, 2, 4, 0, 3, 1] and copies.tolist() == [1, 0, 0, 0, 0, 0]


# ------------------------------------------------------------------------------------------------------------- repeats
@pytest.mark.parametrize("repeats", [1, 2, 4, 8])
def test_each_image_of_an_update_has_all_its_views_in_it(repeats):
    whole = list(orders(repeats=repeats)[0])
    assert len(whole) == 17 * 8, "as many updates as without repeats"
    for update in range(17):
        keys = whole[8 * update : 8 * (update + 1)]
        images = {key.index for key in keys}
        assert len(images) == 8 // repeats
        assert {(key.index, key.view) for key in keys} == {(i, v) for i in images for v in range(repeats)}
    assert len({key.index for key in whole}) == 17 * 8 // repeats, "an image is in one update of the epoch"


def test_two_processes_get_one_view_each():
    first, second = (list(order) for order in orders(2, repeats=2))
    assert [key.index for key in first] == [key.index for key in second]
    assert {key.view for key in first} == {0} and {key.view for key in second} == {1}


def test_without_repeats_and_balance_the_order_is_the_released_one():
    (order,) = orders(repeats=1)
    assert [key.index for key in order] == [
        int(i) for i in np.random.default_rng(derive_seed(ORDER, 3, 0)).permutation(140)[: 17 * 8]
    ]
    assert {key.view for key in order} == {0}


@pytest.mark.parametrize("repeats", [3, 16])
def test_repeats_that_do_not_divide_an_update_are_refused(repeats):
    message = message_of(TrainingOrder, 140, 8, 0, 1, 0, repeats=repeats)
    assert message == (
        f"DATA.REPEATS = {repeats}: a global batch of 8 images is no multiple of it; choose another --batch-size"
    )


# ---------------------------------------------------------------------------------------------- processes and resuming
OPTIONS = [
    dict(balance=balanced(1.0)),
    dict(balance=balanced(0.5), repeats=2),
    dict(repeats=4),
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=["balanced", "both", "repeated"])


@every_option
def test_updates_are_those_of_one_process_and_may_begin_anywhere(options):
    for epoch in (0, 3):
        (one,) = orders(epoch=epoch, **options)
        expected = list(one)
        for world_size in (2, 4, 8):
            ranks = [list(order) for order in orders(world_size, epoch, **options)]
            assert [key for dealt in zip(*ranks, strict=True) for key in dealt] == expected
        for update in range(18):
            one.set_position(epoch, update)
            assert list(one) == expected[8 * update :] and len(one) == len(expected) - 8 * update
        assert one.indices_of(5) == [key.index for key in expected[40:48]]


def test_views_differ_and_view_0_is_the_image_of_other_runs(make_config, data):
    from data import TrainingData

    opts = ("DATA.NUM_WORKERS", "0", "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "AUG.REPROB", "1.0")
    config = make_config("--data-path", str(data), "--batch-size", "6", "--opts", *opts, "DATA.REPEATS", "3")
    images = train_dataset(config, open_split(config, "train", 0, 1))
    training = TrainingData(config, images, 0, 1, False, print)
    assert training.updates_per_epoch == 3
    pixels, labels = next(training.batches(epoch=1, update=0))
    assert len({tensor.sum().item() for tensor in pixels}) == 6 and labels[0] == labels[1] == labels[2]
    again = next(training.batches(epoch=1, update=0))[0]
    assert torch.equal(pixels, again)
    plain = training.loader.dataset[SampleKey(1, training.order.indices_of(0)[0])].sample[0]
    assert torch.equal(pixels[0], plain)


def test_the_keys_are_refused_with_shares_of_a_zip_file(make_config):
    for name, value in (("DATA.REPEATS", "2"), ("DATA.CLASS_BALANCE", "0.1")):
        refused = message_of(make_config, "--zip", "--opts", name, value)
        assert refused == f"{name} = {value}: needs every image in every process; set DATA.CACHE_MODE 'no' or 'full'"
        make_config("--zip", "--cache-mode", "no", "--opts", name, value)
        make_config("--opts", name, value)
    assert message_of(make_config, "--opts", "DATA.CLASS_BALANCE", "1.1").startswith("DATA.CLASS_BALANCE = 1.1")
    assert message_of(make_config, "--opts", "DATA.REPEATS", "0").startswith("DATA.REPEATS = 0")


@pytest.fixture(scope="module")
def long_tail(tmp_path_factory):
    """Twelve images of ant, two of bee, one of cat."""
    root = tmp_path_factory.mktemp("long") / "data"
    write_image_folder(root, train=12)
    for name, kept in (("bee", 2), ("cat", 1)):
        for number in range(kept, 12):
            (root / "train" / name / f"{number}.png").unlink()
    return root


RUN = ("DATA.CLASS_BALANCE", "1.0", "DATA.REPEATS", "2")


@pytest.mark.launch
def test_a_run_that_is_stopped_ends_with_the_same_bits(long_tail, tmp_path, monkeypatch):
    def train(output: str, **options) -> int:
        return runs.train_here(monkeypatch, runs.arguments(long_tail, tmp_path / output, *RUN), **options)

    assert train("whole") == 0
    assert train("stopped", stop_at=2) == 75
    assert train("stopped") == 0
    assert runs.final_state(tmp_path / "whole", 2) == runs.final_state(tmp_path / "stopped", 2)
    seen = runs.samples_by_update(tmp_path / "whole", 1)
    assert seen == runs.samples_by_update(tmp_path / "stopped", 1)
    labels = [0] * 12 + [1] * 2 + [2]
    for epoch in (0, 1):  # three updates of four: six images, two of each class, twice each
        images = [index for (of, _), indices in seen.items() if of == epoch for index in indices]
        assert np.bincount([labels[index] for index in images]).tolist() == [4, 4, 4]


def test_a_changed_key_is_refused_when_a_run_resumes(long_tail, tmp_path, monkeypatch):
    assert runs.train_here(monkeypatch, runs.arguments(long_tail, tmp_path, *RUN), stop_at=2) == 75
    changed = runs.arguments(long_tail, tmp_path, "DATA.CLASS_BALANCE", "0.5", "DATA.REPEATS", "2")
    assert "DATA.CLASS_BALANCE 1.0 -> 0.5" in message_of(runs.train_here, monkeypatch, changed)


@pytest.mark.launch
def test_two_processes_see_the_images_of_one(long_tail, tmp_path, monkeypatch):
    assert runs.train_here(monkeypatch, runs.arguments(long_tail, tmp_path / "one", *RUN)) == 0
    result = run_ranks("train.py", runs.arguments(long_tail, tmp_path / "two", *RUN, "DATA.BATCH_SIZE", "2"), 2)
    assert result.returncode == 0, result.stderr
    assert runs.samples_by_update(tmp_path / "two", 2) == runs.samples_by_update(tmp_path / "one", 1)


def test_zip_files_give_the_same_updates(long_tail, tmp_path, make_config):
    from image_data import zip_image_folder

    zip_image_folder(long_tail, tmp_path / "zipped")
    found = []
    for words in (("--data-path", long_tail), ("--data-path", tmp_path / "zipped", "--zip", "--cache-mode", "full")):
        config = make_config(*words, "--opts", *RUN)
        source = open_split(config, "train", 0, 1)
        order = TrainingOrder(15, 4, 0, 1, 0, repeats=config.DATA.REPEATS, balance=class_balance(config, source))
        found.append([(source.read(key.index), key.view) for key in order])
    assert found[0] == found[1] and len(found[0]) == 12
