"""DATA.TRAIN_SIZES: the size of training images rises over the epochs, and the batch falls with it."""

import itertools
import json
import re

import pytest
import runs
import torch
from ranks import FAULT_TRAIN, run_ranks
from torch import nn

from configs import UserError, image_size
from data import as_stages
from data.samplers import TrainingOrder
from tasks.classification.stages import training_stages
from utils.checkpoint import load_file
from utils.schedule import build_scheduler, run_length, scaled_learning_rates, set_learning_rate

# 18 images. 4 of 60 x 60 make an update, so 9 of 40 x 40 would; rounded down to an even number: 8.
SIZES = ("DATA.IMG_SIZE", "60", "DATA.TRAIN_SIZES", "[[40, 0], [60, 2]]", "TRAIN.EPOCHS", "3")
# 1400 pixels instead of 3000: 8.5 images, so 8.
OBLONG = ("DATA.IMG_SIZE", "[60, 50]", "DATA.TRAIN_SIZES", "[[[40, 35], 0], [[60, 50], 2]]", "TRAIN.EPOCHS", "3")
UPDATES = [2, 2, 4]  # of each epoch


@pytest.fixture(scope="module", params=[SIZES, (*OBLONG, "DATA.FAST_LOADING", "train")], ids=["exact", "fast"])
def opts(request):
    return request.param


@pytest.fixture(scope="module")
def shapes():
    """Of the inputs of the run below: in the updates, and in validation."""
    return {"training": [], "validation": set()}


@pytest.fixture(scope="module")
def straight(opts, shapes, data, tmp_path_factory):
    """The run that was never stopped."""
    output = tmp_path_factory.mktemp("straight")
    shapes.update(training=[], validation=set())

    def watch(number, network):
        if number == 0:
            network.register_forward_pre_hook(note)

    def note(module, images):
        if module.training:
            shapes["training"].append(tuple(images[0].shape))
        else:
            shapes["validation"].add(tuple(images[0].shape[1:]))

    with pytest.MonkeyPatch.context() as patch:
        runs.in_update(patch.setattr, watch)
        assert runs.train_here(patch, runs.arguments(data, output, *opts)) == 0
    return output


def outcome(output, epoch=2):
    folder = runs.run_folder(output)
    return runs.digest(folder / f"ckpt_epoch_{epoch}.pth"), (folder / "samples_rank0.txt").read_text()


def test_sizes_batches_and_updates_of_each_epoch(straight, shapes, opts):
    small, large = ((3, 40, 40), (3, 60, 60)) if opts is SIZES else ((3, 40, 35), (3, 60, 50))
    assert shapes["training"] == 4 * [(8, *small)] + 4 * [(4, *large)]
    assert shapes["validation"] == {large}
    folder = runs.run_folder(straight)
    seen = runs.samples_by_update(straight, 1)
    assert {key: len(images) for key, images in seen.items()} == {
        (epoch, update): 4 if epoch == 2 else 8 for epoch, updates in enumerate(UPDATES) for update in range(updates)
    }
    for epoch in range(3):
        images = [index for (e, _), indices in seen.items() if e == epoch for index in indices]
        assert len(images) == len(set(images)) == 16, "no image twice in an epoch"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["updates"] for line in lines] == [2, 4, 8]
    assert load_file(folder / "ckpt_epoch_2.pth")["num_updates"] == 8
    log = (folder / "log_rank0.txt").read_text()
    assert "2 then 4 updates per epoch, 8 in all, 2 of warm-up" in log and "3 epochs done: best acc1" in log
    assert re.search(r"images from epoch 0 on 8 a batch at (40|\[40, 35\]), from epoch 2 on 4 a batch at", log)


def test_the_learning_rate_follows_the_epochs_and_the_batch(straight, data, tmp_path, monkeypatch):
    """At the start of an epoch it is that of a run without other sizes, x the batch / the usual one."""
    opts = ("TRAIN.EPOCHS", "3", *runs.PLAIN)
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path, *opts)) == 0
    usual, got = runs.learning_rates(tmp_path), runs.learning_rates(straight)
    assert len(got) == 8
    for epoch, ratio in enumerate((2, 2, 1)):
        expected = ratio * float(usual[f"[{epoch}/3][0/4]"])
        assert float(got[f"[{epoch}/3][0/{UPDATES[epoch]}]"]) == pytest.approx(expected, abs=2e-8)
        half = ratio * float(usual[f"[{epoch}/3][2/4]"])
        assert float(got[f"[{epoch}/3][{UPDATES[epoch] // 2}/{UPDATES[epoch]}]"]) == pytest.approx(half, abs=2e-8)


@pytest.mark.parametrize(("stop_at", "before", "after"), [(1, 0, 2), (4, 2, 0), (5, 2, 2), (7, 0, 0)])
def test_stopped_around_the_change_of_size(data, tmp_path, monkeypatch, straight, opts, stop_at, before, after):
    """Within an epoch of the small size, at its end, right after the change; with loader workers and without."""
    monkeypatch.setattr("data.loaders.usable_workers", lambda config: config.DATA.NUM_WORKERS)
    args = [runs.arguments(data, tmp_path, *opts, "DATA.NUM_WORKERS", str(n)) for n in (before, after)]
    assert runs.train_here(monkeypatch, args[0], stop_at) == 75
    torch.manual_seed(12345)
    assert runs.train_here(monkeypatch, args[1]) == 0
    assert outcome(tmp_path) == outcome(straight)


TWO = ("DATA.IMG_SIZE", "60", "DATA.TRAIN_SIZES", "[[40, 0], [60, 1]]")  # 2 updates, then 4


def test_two_processes_continue_with_the_same_bits_and_one_sees_the_same_images(data, tmp_path):
    def args(name, processes):
        return runs.arguments(data, tmp_path / name, *TWO, "DATA.BATCH_SIZE", str(4 // processes))

    assert run_ranks("train.py", args("straight", 2), processes=2).returncode == 0
    for name, after in (("stopped", 2), ("one", 1)):
        stopped = run_ranks(FAULT_TRAIN, args(name, 2), processes=2, env={"FAULT": "stop:0:3"})
        assert "stopped by request at update 4" in stopped.stdout
        result = run_ranks("train.py", args(name, after), processes=after)
        assert result.returncode == 0, result.stderr
        assert runs.samples_by_update(tmp_path / name, 2) == runs.samples_by_update(tmp_path / "straight", 2)
        assert runs.learning_rates(tmp_path / name) == runs.learning_rates(tmp_path / "straight")
    digests = [runs.digest(runs.run_folder(tmp_path / n) / "ckpt_epoch_1.pth") for n in ("straight", "stopped")]
    assert digests[0] == digests[1]


def test_accumulated_batches_are_scaled_each(data, tmp_path, monkeypatch):
    opts = (*TWO, "DATA.BATCH_SIZE", "2", "TRAIN.ACCUMULATION_STEPS", "2")
    one, two = tmp_path / "one", tmp_path / "two"
    assert runs.train_here(monkeypatch, runs.arguments(data, one, *opts)) == 0
    assert [len(images) for images in runs.samples_by_update(one, 1).values()] == [8, 8, 4, 4, 4, 4]
    assert runs.train_here(monkeypatch, runs.arguments(data, two, *opts), stop_at=3) == 75
    assert runs.train_here(monkeypatch, runs.arguments(data, two, *opts)) == 0
    assert outcome(one, 1) == outcome(two, 1)


def test_other_sizes_are_a_change_of_the_recipe(data, tmp_path, monkeypatch):
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path, *SIZES), stop_at=1) == 75
    other = (*SIZES, "DATA.TRAIN_SIZES", "[[60, 0]]")
    said = "global batch [[0, 8], [2, 4]] -> [[0, 4]]; DATA.TRAIN_SIZES [[40, 0], [60, 2]] -> [[60, 0]]"
    with pytest.raises(UserError, match=re.escape(said)):
        runs.train_here(monkeypatch, runs.arguments(data, tmp_path, *other))
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path, *other, flags=["--allow-changes"])) == 0
    assert "epoch 0, update 2" in (runs.run_folder(tmp_path) / "log_rank0.txt").read_text(), "8 images were seen"
    assert load_file(runs.run_folder(tmp_path) / "ckpt_epoch_2.pth")["num_updates"] == 12


# ----------------------------------------------------------------------------------------------------- without running
@pytest.mark.parametrize("name", ["cosine", "linear", "poly", "step", "multistep"])
def test_every_schedule_follows_the_epochs(make_config, name):
    """Epochs of 7 updates, or of 3 twice as large ones: after as many epochs, the same rate x the ratio."""
    length = ("TRAIN.EPOCHS", 12, "TRAIN.WARMUP_EPOCHS", 3, "TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 4)
    opts = (*length, "TRAIN.LR_SCHEDULER.NAME", name, "TRAIN.LR_SCHEDULER.MILESTONES", "[5, 8]")
    config = make_config("--opts", *opts)
    rates = scaled_learning_rates(config, 1)

    def at(updates_per_epoch, epoch, ratio):
        length = run_length(config, updates_per_epoch)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rates.base)
        scheduler = build_scheduler(config, optimizer, rates, length)
        set_learning_rate(scheduler, length, length.updates_before(epoch), ratio)
        return optimizer.param_groups[0]["lr"]

    staged = [[0, 3], [6, 7]]
    for epoch in range(12):
        ratio = 7 / 3 if epoch < 6 else 1
        assert at(staged, epoch, ratio) == pytest.approx(ratio * at(7, epoch, 1), rel=1e-12), epoch
    assert run_length(config, staged).updates == 6 * 3 + 6 * 7


def test_positions_in_a_run_of_unlike_epochs(make_config):
    config = make_config("--opts", "TRAIN.EPOCHS", "5", "TRAIN.WARMUP_EPOCHS", "1.5")
    length = run_length(config, [[0, 2], [1, 3], [4, 4]])
    assert (length.updates, length.warmup_updates, length.epochs, str(length)) == (15, 4, 5, "5 epochs")
    assert [length.updates_of(epoch) for epoch in range(6)] == [2, 3, 3, 3, 4, 0]
    places = [(epoch, update) for epoch in range(5) for update in range(length.updates_of(epoch))]
    assert [length.position(update) for update in range(15)] == places
    assert [length.updates_before(epoch) + update for epoch, update in places] == list(range(15))
    assert [length.is_last(epoch) for epoch in range(5)] == 4 * [False] + [True]
    plain = run_length(config, 7)
    assert [plain.time(t) for t in range(35)] == list(range(35)) and type(plain.time(9)) is int


@pytest.mark.parametrize("options", [{}, {"sharded": True}, {"repeats": 2}], ids=str)
def test_the_order_of_a_process_continues_at_any_update_of_any_batch(options):
    for rank, (epoch, batch, updates) in itertools.product(range(2), [(1, 12, 4), (2, 8, 6)]):
        order = TrainingOrder(50, [[0, 12], [2, 8]], rank, 2, seed=3, **options)
        order.set_position(epoch)
        keys = list(order)
        assert len(keys) == len(order) == updates * batch // 2
        for update in range(updates):
            order.set_position(epoch, update)
            assert list(order) == keys[update * batch // 2 :] and len(order) == len(list(order))
            assert order.indices_of(update) == [key.index for key in keys[update * batch // 2 :][: batch // 2]]


def stages_of(config):
    return [(epoch, image_size(stage), stage.DATA.BATCH_SIZE) for epoch, stage in as_stages(training_stages(config))]


@pytest.mark.parametrize(
    ("size", "batch", "sizes", "expected"),
    [
        ("224", 128, "[]", [(0, (224, 224), 128)]),
        (
            *("224", 128, "[[128, 0], [160, 100], [192, 150], [224, 200]]"),
            [(0, (128, 128), 384), (100, (160, 160), 240), (150, (192, 192), 160), (200, (224, 224), 128)],
        ),
        ("224", 16, "[[160, 0]]", [(0, (160, 160), 30)]),
        ("224", 12, "[[160, 0]]", [(0, (160, 160), 22)]),  # 22.5
        ("224", 7, "[[160, 0]]", [(0, (160, 160), 13)]),  # 13.125
        ("[64, 96]", 8, "[[[64, 48], 0], [40, 1]]", [(0, (64, 48), 16), (1, (40, 40), 30)]),
    ],
)
def test_batches_keep_their_pixels_in_eighths(make_config, size, batch, sizes, expected):
    opts = ("DATA.IMG_SIZE", size, "TRAIN.EPOCHS", "300", "DATA.TRAIN_SIZES", sizes)
    assert stages_of(make_config("--batch-size", batch, "--opts", *opts)) == expected
    kept = stages_of(make_config("--batch-size", batch, "--opts", *opts, "DATA.SCALE_BATCH", "False"))
    assert kept == [(epoch, size, batch) for epoch, size, _ in expected]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("[[128, 1]]", "first epochs must rise from 0"),
        ("[[128, 0], [160, 9], [192, 9]]", "first epochs must rise from 0"),
        ("[[128, 0], [224, 20]]", "less than TRAIN.EPOCHS = 20"),
        ("[[32, 0]]", "each size must lie between 33 and"),
        ("[[[64, 240], 0]]", "and DATA.IMG_SIZE = 224"),
        ("[128, 0]", "must be a list of sizes and the first epoch of each, such as [[128, 0], [192, 100]]"),
        ("[[128, 0.5]]", "must be a list of sizes and the first epoch"),
        ("[[128.5, 0]]", "must be a whole number, or height and width"),
        ("128", "must be a list of sizes"),
    ],
)
def test_what_cannot_be_trained_is_refused_before(make_config, sizes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_config("--opts", "DATA.IMG_SIZE", "224", "DATA.TRAIN_SIZES", sizes)


@pytest.mark.parametrize("key", ["TRAIN.UPDATES", "TRAIN.WARMUP_UPDATES"])
def test_a_run_that_counts_updates_is_refused(make_config, key):
    opts = ("DATA.IMG_SIZE", "224", "DATA.TRAIN_SIZES", "[[128, 0]]")
    with pytest.raises(UserError, match=r"counts epochs, so the run must too; set TRAIN\.UPDATES 0"):
        make_config("--opts", *opts, key, "10")


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            ("DATA.REPEATS", "4", "DATA.BATCH_SIZE", "12", "DATA.IMG_SIZE", "40"),
            "a global batch of 14 images is no mul",
        ),
        (("AUG.CUTMIX_MINMAX", "[0.5, 0.52]"), "a box in images of 40 pixels"),
        (("DATA.BATCH_SIZE", "10"), "18 images, fewer than one global batch of 22"),
    ],
)
def test_what_a_smaller_size_does_not_allow_is_refused(data, tmp_path, monkeypatch, opts, message):
    opts = (*SIZES, *opts, *(("DATA.TRAIN_SIZES", "[[35, 0]]") if "DATA.REPEATS" in opts else ()))
    with pytest.raises(UserError, match=message):
        runs.train_here(monkeypatch, runs.arguments(data, tmp_path, *opts))
