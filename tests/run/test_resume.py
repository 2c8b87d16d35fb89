"""A run that was stopped anywhere and continued ends with the same bits as one that was not."""

import errno
import math
import os
import re
import signal
from contextlib import contextmanager

import pytest
import runs
import torch
from yacs.config import CfgNode

import tasks
import train
from configs import UserError
from utils import resume
from utils.checkpoint import load_file

EPOCHS, UPDATES = 2, 4  # 18 images, 4 an update


@pytest.fixture(scope="module")
def straight_output(data, tmp_path_factory):
    """The run that was never stopped."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        output = tmp_path_factory.mktemp("straight")
        assert runs.train_here(monkeypatch, runs.arguments(data, output)) == 0
    return output


@pytest.fixture(scope="module")
def straight(straight_output):
    """Digest of its last checkpoint, and its samples."""
    return outcome(straight_output)


def outcome(output):
    folder = runs.run_folder(output)
    return runs.digest(folder / "ckpt_epoch_1.pth"), (folder / "samples_rank0.txt").read_text()


@pytest.mark.parametrize(
    "stop_at",
    [pytest.param(n, marks=() if n in (1, 4, 6) else pytest.mark.chaos) for n in range(1, EPOCHS * UPDATES + 1)],
)
def test_stopped_at_any_update(data, tmp_path, monkeypatch, straight, stop_at):
    args = runs.arguments(data, tmp_path)
    assert runs.train_here(monkeypatch, args, stop_at) == 75
    epoch, update = divmod(stop_at - 1, UPDATES)
    assert (runs.run_folder(tmp_path) / f"ckpt_epoch_{epoch}_update_{update + 1}.pth").is_file()
    torch.manual_seed(12345)  # whatever the new process's generators hold must not matter
    assert runs.train_here(monkeypatch, args) == 0
    assert outcome(tmp_path) == straight


def test_many_stops_in_one_run(data, tmp_path, monkeypatch, straight, straight_output):
    """Checkpoint, samples and log are those of a run that was not stopped: no step is missing or logged twice."""
    for stop_at in (1, 2, 4, 5, 8):
        assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path), stop_at) == 75
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path)) == 0
    assert outcome(tmp_path) == straight
    pattern = r"Train: \[\d+/2\]\[\d+/4\]|"
    pattern += r"loss [\d.]+ \([\d.]+\)\tgrad_norm [\d.]+ \([\d.]+\)|mean loss [\d.]+| \* Acc.*|Best acc1.*"
    outputs = (straight_output, tmp_path)
    logs = [re.findall(pattern, (runs.run_folder(output) / "log_rank0.txt").read_text()) for output in outputs]
    assert logs[0] == logs[1] and len(logs[0]) == EPOCHS * (2 * UPDATES + 4)


def after_a_signal(function):
    """The function, called after the run was asked to stop."""

    def call(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    return call


def test_stopped_between_training_and_validation(data, tmp_path, monkeypatch, straight):
    args = runs.arguments(data, tmp_path)
    with monkeypatch.context() as patch:
        runs.change_task(patch, lambda task: {"validate": after_a_signal(task.validate)})
        assert runs.train_here(monkeypatch, args) == 75
    assert [p.name for p in runs.run_folder(tmp_path).glob("ckpt*")] == ["ckpt_epoch_0_update_4.pth"]
    assert runs.train_here(monkeypatch, args) == 0
    assert outcome(tmp_path) == straight


@pytest.mark.parametrize("begun", [False, True])
def test_stopped_while_it_starts(data, tmp_path, monkeypatch, straight, begun):
    """Before its first update: nothing is computed, nothing written, nothing lost."""
    args, folder = runs.arguments(data, tmp_path), runs.run_folder(tmp_path)
    if begun:
        assert runs.train_here(monkeypatch, args, stop_at=3) == 75
    samples = folder / "samples_rank0.txt"
    before = {path.name: path.read_bytes() for path in [*folder.glob("ckpt*"), *folder.glob(samples.name)]}
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "build", after_a_signal(tasks.build))
        assert runs.train_here(monkeypatch, args) == 75
    assert {path.name: path.read_bytes() for path in [*folder.glob("ckpt*"), *folder.glob(samples.name)]} == before
    said = f"stopped by request at update {3 * begun}, nothing new to save; the same command continues"
    assert said in (folder / "log_rank0.txt").read_text()
    assert runs.train_here(monkeypatch, args) == 0
    assert outcome(tmp_path) == straight


def test_a_validation_that_fails_loses_no_epoch(image_folder, tmp_path, monkeypatch, straight):
    image = image_folder / "val" / "bee" / "0.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:40])
    args = runs.arguments(image_folder, tmp_path)
    with pytest.raises(UserError, match=r"bee/0.png: cannot be read as an image"):
        runs.train_here(monkeypatch, args)
    assert [p.name for p in runs.run_folder(tmp_path).glob("ckpt*")] == ["ckpt_epoch_0_update_4.pth"]
    image.write_bytes(whole)
    assert runs.train_here(monkeypatch, args) == 0
    assert outcome(tmp_path) == straight


def test_stopped_in_the_middle_of_accumulation(data, tmp_path, monkeypatch):
    opts = ("DATA.BATCH_SIZE", "2", "TRAIN.ACCUMULATION_STEPS", "2")
    one, two = tmp_path / "one", tmp_path / "two"
    assert runs.train_here(monkeypatch, runs.arguments(data, one, *opts)) == 0
    assert runs.train_here(monkeypatch, runs.arguments(data, two, *opts), stop_at=6) == 75
    assert runs.train_here(monkeypatch, runs.arguments(data, two, *opts)) == 0
    assert outcome(one) == outcome(two)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 1), (1, 0)])
def test_any_number_of_loader_workers(data, tmp_path, monkeypatch, straight, before, after):
    monkeypatch.setattr("data.loaders.usable_workers", lambda config: config.DATA.NUM_WORKERS)
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path, "DATA.NUM_WORKERS", str(before)), 3) == 75
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path, "DATA.NUM_WORKERS", str(after))) == 0
    assert outcome(tmp_path) == straight


def test_periodic_checkpoints_do_not_change_a_run_and_continue_it(data, tmp_path, monkeypatch, straight):
    args = runs.arguments(data, tmp_path, "SAVE_EVERY_UPDATES", "3")
    assert runs.train_here(monkeypatch, args) == 0
    assert outcome(tmp_path) == straight
    folder = runs.run_folder(tmp_path)
    assert sorted(p.name for p in folder.glob("ckpt_epoch*")) == ["ckpt_epoch_0.pth", "ckpt_epoch_1.pth"]


def without_weights(state):
    state["model"]["head.bias"] += 1e-3


def without_statistics(state):
    state["model"]["norm4.running_mean"] += 1e-3


def without_moments(state):
    state["optimizer"]["state"] = {}


def without_ema(state):
    del state["model_ema"]


def without_losses(state):
    state["progress"].update(loss_sum=0.0, norm_sum=0.0)


def without_best(state):
    state["max_accuracy"] = 100.0


def without_best_weights(state):
    state["progress"]["best_weights"] = ""


def without_position(state):
    state["progress"]["next_update"] -= 1


LEAVE_OUT = [
    *(without_weights, without_statistics, without_moments, without_ema),
    *(without_losses, without_best, without_best_weights, without_position),
]


@contextmanager
def leaving_out(monkeypatch, leave_out):
    """Continue without an item of the state."""
    load = resume.load_file

    def incomplete(path):
        state = load(path)
        leave_out(state)
        return state

    with monkeypatch.context() as patch:
        patch.setattr(resume, "load_file", incomplete)
        yield


@pytest.mark.parametrize("leave_out", LEAVE_OUT, ids=lambda f: f.__name__)
def test_every_item_of_the_state_is_needed(data, tmp_path, monkeypatch, straight, straight_output, leave_out):
    """The negative control: a continuation that leaves an item out does not end with the same bits."""
    args = runs.arguments(data, tmp_path)
    assert runs.train_here(monkeypatch, args, stop_at=6) == 75
    with leaving_out(monkeypatch, leave_out):
        assert runs.train_here(monkeypatch, args) == 0
    if leave_out is without_losses:  # they are part of the epoch's mean loss, and gone after its end
        assert mean_losses(tmp_path) != mean_losses(straight_output)
    else:
        assert outcome(tmp_path) != straight


def mean_losses(output):
    means = re.findall(r"EPOCH \d .* mean loss (.*)", (runs.run_folder(output) / "log_rank0.txt").read_text())
    assert len(means) == EPOCHS
    return means


def test_the_count_of_updates_is_needed(data, tmp_path, monkeypatch, straight):
    """It is a function of the position, so that no file can lack it: here it is one too few after the start."""
    args = runs.arguments(data, tmp_path)
    assert runs.train_here(monkeypatch, args, stop_at=6) == 75
    restore = train.restore

    def miscounted(session, path, state, trainer, *rest):
        progress = restore(session, path, state, trainer, *rest)
        trainer.num_updates -= 1
        return progress

    with monkeypatch.context() as patch:
        patch.setattr(train, "restore", miscounted)
        assert runs.train_here(monkeypatch, args) == 0
    assert outcome(tmp_path) != straight


@pytest.mark.parametrize("left_out", [False, True])
def test_skipped_updates_are_counted_over_a_stop(data, tmp_path, monkeypatch, left_out):
    """Two in a row end this run, one before the stop and one after it; the count is needed for that."""
    args = runs.arguments(data, tmp_path, "TRAIN.MAX_NONFINITE_UPDATES", "1")
    clip = torch.nn.utils.clip_grad_norm_
    updates = []

    def not_finite(*args):
        updates.append(clip(*args))
        return updates[-1] * math.nan if len(updates) in (6, 7) else updates[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", not_finite)
    assert runs.train_here(monkeypatch, args, stop_at=6) == 75
    if left_out:
        with leaving_out(monkeypatch, lambda state: state["progress"].update(nonfinite_in_a_row=0)):
            assert runs.train_here(monkeypatch, args) == 0
    else:
        with pytest.raises(FloatingPointError, match="2 in a row"):
            runs.train_here(monkeypatch, args)


def test_float16_scaler_survives_and_is_needed(data, tmp_path, monkeypatch):
    opts = ("AMP_OPT_LEVEL", "O1", "AMP_DTYPE", "float16")
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    assert runs.train_here(monkeypatch, runs.arguments(data, one, *opts)) == 0
    for output in (two, three):
        assert runs.train_here(monkeypatch, runs.arguments(data, output, *opts), stop_at=3) == 75
    stopped = load_file(runs.run_folder(two) / "ckpt_epoch_0_update_3.pth")
    assert stopped["scaler"]["scale"] > 0
    assert runs.train_here(monkeypatch, runs.arguments(data, two, *opts)) == 0
    assert outcome(one) == outcome(two)
    with leaving_out(monkeypatch, lambda state: state.pop("scaler")):
        assert runs.train_here(monkeypatch, runs.arguments(data, three, *opts)) == 0
    assert outcome(one) != outcome(three)


def damage(path):
    """Change 200 bytes in its middle: more than the padding of a file's members."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.unlink()  # it may be one file with the best
    changed = bytes(byte ^ 1 for byte in content[middle : middle + 200])
    path.write_bytes(content[:middle] + changed + content[middle + 200 :])


def test_damaged_checkpoints_are_passed_over(data, tmp_path, monkeypatch, straight):
    args = runs.arguments(data, tmp_path)
    assert runs.train_here(monkeypatch, args, stop_at=6) == 75
    folder = runs.run_folder(tmp_path)
    newest = folder / "ckpt_epoch_1_update_2.pth"
    damage(newest)
    (folder / "samples_rank0.txt").unlink()
    assert runs.train_here(monkeypatch, args) == 0
    log = (folder / "log_rank0.txt").read_text()
    assert f"{newest}: damaged" in log and "resumed from" in log and "ckpt_epoch_0.pth" in log
    assert outcome(tmp_path)[0] == straight[0]


def names_in(folder):
    return sorted(path.name for path in folder.glob("ckpt*"))


def test_what_is_saved_after_a_fallback_stays(data, tmp_path, monkeypatch, straight):
    """The newest is damaged: a stop in the epoch that it was of must leave its checkpoint, and continue from it."""
    args = runs.arguments(data, tmp_path)
    folder = runs.run_folder(tmp_path)
    assert runs.train_here(monkeypatch, args) == 0
    damage(folder / "ckpt_epoch_1.pth")
    (folder / "samples_rank0.txt").unlink()
    assert runs.train_here(monkeypatch, args, stop_at=6) == 75
    assert names_in(folder) == [
        *("ckpt_best.pth", "ckpt_epoch_0.pth", "ckpt_epoch_1.pth.aside", "ckpt_epoch_1_update_2.pth")
    ]
    log = (folder / "log_rank0.txt").read_text()
    assert f"{folder}/ckpt_epoch_1.pth: not the checkpoint being resumed; renamed to ckpt_epoch_1.pth.aside" in log
    assert runs.train_here(monkeypatch, args) == 0
    assert "ckpt_epoch_1_update_2.pth: epoch 1, update 2" in (folder / "log_rank0.txt").read_text()
    assert outcome(tmp_path)[0] == straight[0]


def test_pruning_after_a_fallback_keeps_the_whole_ones(data, tmp_path, monkeypatch):
    opts = ("TRAIN.EPOCHS", "4", "SAVE_KEEP", "2")
    folder = runs.run_folder(tmp_path)
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path, *opts, "SAVE_KEEP", "0")) == 0
    damage(folder / "ckpt_epoch_2.pth")
    damage(folder / "ckpt_epoch_3.pth")
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path, *opts), stop_at=10) == 75
    assert names_in(folder) == [
        *("ckpt_best.pth", "ckpt_epoch_0.pth", "ckpt_epoch_1.pth"),
        *("ckpt_epoch_2.pth.aside", "ckpt_epoch_2_update_2.pth", "ckpt_epoch_3.pth.aside"),
    ]
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path, *opts)) == 0
    assert names_in(folder)[1:] == [
        *("ckpt_epoch_2.pth", "ckpt_epoch_2.pth.aside", "ckpt_epoch_3.pth", "ckpt_epoch_3.pth.aside")
    ]


def test_a_new_run_in_an_old_folder_is_the_one_that_continues(data, tmp_path, monkeypatch, straight):
    """Twice: what is set aside does not replace what was before."""
    folder = runs.run_folder(tmp_path)
    anew = runs.arguments(data, tmp_path, "TRAIN.AUTO_RESUME", "False", "SAVE_KEEP", "1")
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path)) == 0
    before = {path.name: path.read_bytes() for path in folder.glob("ckpt*")}
    for suffix in (".aside", ".aside2"):
        assert runs.train_here(monkeypatch, anew, stop_at=6) == 75
        assert [name for name in names_in(folder) if "aside" not in name][1:] == [
            *("ckpt_epoch_0.pth", "ckpt_epoch_1_update_2.pth")
        ]
        assert f"ckpt_best.pth{suffix}" in names_in(folder)
    for name, content in before.items():
        assert (folder / f"{name}.aside").read_bytes() == content
    (folder / "samples_rank0.txt").unlink()
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path)) == 0
    assert "ckpt_epoch_1_update_2.pth: epoch 1, update 2" in (folder / "log_rank0.txt").read_text()
    assert outcome(tmp_path)[0] == straight[0]


def test_going_back_within_a_run(data, tmp_path, monkeypatch, straight):
    """--resume names a checkpoint of the run's own folder: those after it are set aside, itself it stays."""
    folder = runs.run_folder(tmp_path)
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path, "TRAIN.EPOCHS", "2")) == 0
    (folder / "samples_rank0.txt").unlink()
    flags = ["--resume", str(folder / "ckpt_epoch_0.pth")]
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path, "TRAIN.AUTO_RESUME", "False", flags=flags)) == 0
    assert names_in(folder)[1:] == ["ckpt_epoch_0.pth", "ckpt_epoch_1.pth", "ckpt_epoch_1.pth.aside"]
    assert outcome(tmp_path)[0] == straight[0]


def test_a_start_that_is_refused_sets_nothing_aside(data, tmp_path, monkeypatch):
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path), stop_at=2) == 75
    before = names_in(runs.run_folder(tmp_path))
    flags = ["--pretrained", str(tmp_path / "nowhere.pth")]
    with pytest.raises(UserError, match="no such file"):
        runs.train_here(monkeypatch, runs.arguments(data, tmp_path, "TRAIN.AUTO_RESUME", "False", flags=flags))
    assert names_in(runs.run_folder(tmp_path)) == before


def test_a_best_that_cannot_be_linked_is_no_damage(data, tmp_path, monkeypatch):
    """At the start of a continuation: the whole checkpoint must not be passed over for an older one."""
    args = runs.arguments(data, tmp_path)
    assert runs.train_here(monkeypatch, args) == 0
    (runs.run_folder(tmp_path) / "ckpt_best.pth").unlink()
    state = load_file(runs.run_folder(tmp_path) / "ckpt_epoch_1.pth")
    torch.save({**state, "is_best": True}, runs.run_folder(tmp_path) / "ckpt_epoch_1.pth")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        patch.setattr("utils.checkpoint.shutil.copyfile", full)
        with pytest.raises(UserError, match=r"ckpt_best\.pth: cannot be written \(No space left"):
            runs.train_here(monkeypatch, args)
    assert "trying the one before" not in (runs.run_folder(tmp_path) / "log_rank0.txt").read_text()
    assert names_in(runs.run_folder(tmp_path)) == ["ckpt_epoch_0.pth", "ckpt_epoch_1.pth"]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(data, tmp_path, monkeypatch):
    args = runs.arguments(data, tmp_path)
    assert runs.train_here(monkeypatch, args, stop_at=2) == 75
    (runs.run_folder(tmp_path) / "ckpt_epoch_0_update_2.pth").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="none of its 1 checkpoints can be read"):
        runs.train_here(monkeypatch, args)


def test_explicit_resume_of_a_damaged_file_refuses(data, tmp_path, monkeypatch):
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"PK\x03\x04 no checkpoint")
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        runs.train_here(monkeypatch, runs.arguments(data, tmp_path, flags=["--resume", str(damaged)]))


def test_changed_recipe_is_refused_with_the_difference(data, tmp_path, monkeypatch):
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path), stop_at=3) == 75
    changed = ("TRAIN.WEIGHT_DECAY", "0.1", "SEED", "1", "DATA.BATCH_SIZE", "6")
    with pytest.raises(UserError) as refusal:
        runs.train_here(monkeypatch, runs.arguments(data, tmp_path, *changed))
    for part in ("TRAIN.WEIGHT_DECAY 0.05 -> 0.1", "SEED 0 -> 1", "global batch 4 -> 6", "--allow-changes"):
        assert part in refusal.value.one_line()
    allowed = runs.arguments(data, tmp_path, *changed, flags=["--allow-changes"])
    assert runs.train_here(monkeypatch, allowed) == 0
    log = (runs.run_folder(tmp_path) / "log_rank0.txt").read_text()
    assert "continuing with a change: SEED 0 -> 1" in log
    assert "epoch 0, update 2" in log, "12 images were seen: two updates of six"


def test_free_settings_may_change(data, tmp_path, monkeypatch, straight):
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path), stop_at=5) == 75
    moved = data.parent / "moved"
    if not moved.exists():
        moved.symlink_to(data)
    opts = ("SAVE_KEEP", "1", "PRINT_FREQ", "2", "DATA.BATCH_SIZE", "4", "TRAIN.USE_CHECKPOINT", "True")
    assert runs.train_here(monkeypatch, runs.arguments(moved, tmp_path, *opts)) == 0
    assert outcome(tmp_path) == straight


@pytest.mark.parametrize(("split", "named"), [("train", "training"), ("val", "validation")])
def test_changed_data_are_noticed(image_folder, tmp_path, monkeypatch, split, named):
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path), stop_at=2) == 75
    (image_folder / split / "ant" / "0.png").rename(image_folder / split / "ant" / "9.png")
    with pytest.raises(UserError, match=rf"the {named} images .* are not the same"):
        runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path))


def test_weights_alone_cannot_be_resumed(data, tmp_path, monkeypatch):
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path), stop_at=2) == 75
    state = load_file(runs.run_folder(tmp_path) / "ckpt_epoch_0_update_2.pth")
    torch.save({"model": state["model"]}, tmp_path / "weights.pth")
    flags = ["--resume", str(tmp_path / "weights.pth")]
    with pytest.raises(UserError, match=r"holds weights only.*--pretrained"):
        runs.train_here(monkeypatch, runs.arguments(data, tmp_path / "new", flags=flags))


def test_a_released_training_checkpoint_continues(data, tmp_path, monkeypatch):
    """As the released code saved it after epoch 0: its keys only, the configuration a pickled CfgNode."""
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path / "own")) == 0
    state = load_file(runs.run_folder(tmp_path / "own") / "ckpt_epoch_0.pth")
    released = {key: state[key] for key in ("model", "optimizer", "lr_scheduler", "max_accuracy", "epoch")}
    released["config"] = CfgNode({"TRAIN": {"EPOCHS": 300}})
    for group in released["optimizer"]["param_groups"]:
        group["fused"] = None
    for values in released["optimizer"]["state"].values():
        values["step"] = int(values["step"])  # as old releases of torch counted
    torch.save(released, tmp_path / "released.pth")
    flags = ["--resume", str(tmp_path / "released.pth")]
    load, loaded = torch.optim.AdamW.load_state_dict, []
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda o, state: (loaded.append(state), load(o, state)))
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path / "new", flags=flags)) == 0
    # torch decides by the groups that it is given whether `step` lies on the GPU, where the fused update needs it.
    assert [group["fused"] for group in loaded[0]["param_groups"]] == [True] * len(loaded[0]["param_groups"])
    new, own = (load_file(runs.run_folder(tmp_path / d) / "ckpt_epoch_1.pth")["model"] for d in ("new", "own"))
    assert all(torch.equal(new[name], own[name]) for name in own)


def test_a_finished_run_returns_at_once(data, tmp_path, monkeypatch, straight):
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path)) == 0
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path)) == 0
    assert outcome(tmp_path) == straight


def test_a_run_killed_and_continued_from_its_best_keeps_that_checkpoint(data, tmp_path, monkeypatch):
    """A continuation keeps the best once more, and what is saved as best next must not be written into it."""
    args = runs.arguments(data, tmp_path, "TRAIN.EPOCHS", "4", "SAVE_FREQ", "2")
    accuracies = iter([50.0, 50.0, 60.0, 60.0, 70.0, 70.0, 10.0, 10.0])
    runs.change_task(monkeypatch, lambda task: {"validate": lambda network: {"acc1": next(accuracies)}})

    def killed(number, network):
        if number == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        runs.in_update(patch.setattr, killed)
        with pytest.raises(KeyboardInterrupt):
            runs.train_here(patch, args)
    folder = runs.run_folder(tmp_path)
    second = (folder / "ckpt_epoch_1.pth").read_bytes()
    assert runs.train_here(monkeypatch, args) == 0
    assert (folder / "ckpt_epoch_1.pth").read_bytes() == second
    assert load_file(folder / "ckpt_best.pth")["epoch"] == 2
    assert not list(folder.glob(".*.partial"))
