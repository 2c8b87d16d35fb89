"""A run that was stopped anywhere and continued ends with the same bits as one that was not."""

import os
import re
import signal

import pytest
import runs
import torch
from yacs.config import CfgNode

import train
from configs import UserError
from utils import engine, resume
from utils.checkpoint import load_file

EPOCHS, UPDATES = 2, 4  # 18 images, 4 an update


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The run that was never stopped: digest of its last checkpoint, and its samples."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        torch.set_num_threads(1)
        output = tmp_path_factory.mktemp("straight")
        assert runs.train_here(monkeypatch, runs.arguments(data, output)) == 0
    folder = runs.run_folder(output)
    return runs.digest(folder / "ckpt_epoch_1.pth"), (folder / "samples_rank0.txt").read_text()


def outcome(output):
    folder = runs.run_folder(output)
    return runs.digest(folder / "ckpt_epoch_1.pth"), (folder / "samples_rank0.txt").read_text()


@pytest.mark.parametrize("stop_at", range(1, EPOCHS * UPDATES + 1))
def test_stopped_at_any_update(data, tmp_path, monkeypatch, straight, stop_at):
    args = runs.arguments(data, tmp_path)
    assert runs.train_here(monkeypatch, args, stop_at) == 75
    epoch, update = divmod(stop_at - 1, UPDATES)
    assert (runs.run_folder(tmp_path) / f"ckpt_epoch_{epoch}_update_{update + 1}.pth").is_file()
    torch.manual_seed(12345)  # whatever the new process's generators hold must not matter
    assert runs.train_here(monkeypatch, args) == 0
    assert outcome(tmp_path) == straight


def test_ten_stops_in_one_run(data, tmp_path, monkeypatch):
    opts = ("TRAIN.EPOCHS", "3")
    one, many = tmp_path / "one", tmp_path / "many"
    assert runs.train_here(monkeypatch, runs.arguments(data, one, *opts)) == 0
    for stop_at in range(1, 11):
        assert runs.train_here(monkeypatch, runs.arguments(data, many, *opts), stop_at) == 75
    assert runs.train_here(monkeypatch, runs.arguments(data, many, *opts)) == 0
    a, b = runs.run_folder(one), runs.run_folder(many)
    assert runs.digest(a / "ckpt_epoch_2.pth") == runs.digest(b / "ckpt_epoch_2.pth")
    assert (a / "samples_rank0.txt").read_text() == (b / "samples_rank0.txt").read_text()
    steps = [re.findall(r"Train: \[(\d+)/3\]\[(\d+)/4\]", (f / "log_rank0.txt").read_text()) for f in (a, b)]
    assert steps[0] == steps[1] and len(set(steps[0])) == 12, "a step is missing or told twice"


def test_logged_losses_are_the_same(data, tmp_path, monkeypatch):
    one, many = tmp_path / "one", tmp_path / "many"
    runs.train_here(monkeypatch, runs.arguments(data, one))
    for stop_at in (3, 6):
        runs.train_here(monkeypatch, runs.arguments(data, many), stop_at)
    runs.train_here(monkeypatch, runs.arguments(data, many))
    pattern = r"loss [\d.]+ \([\d.]+\)\tgrad_norm [\d.]+ \([\d.]+\)|mean loss [\d.]+| \* Acc.*|Max accuracy.*"
    logs = [re.findall(pattern, (runs.run_folder(o) / "log_rank0.txt").read_text()) for o in (one, many)]
    assert logs[0] == logs[1] and len(logs[0]) == EPOCHS * (UPDATES + 4)


def test_stopped_between_training_and_validation(data, tmp_path, monkeypatch, straight):
    args = runs.arguments(data, tmp_path)
    evaluate = train.evaluate

    def interrupted(*rest):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", interrupted)
        assert runs.train_here(monkeypatch, args) == 75
    assert [p.name for p in runs.run_folder(tmp_path).glob("ckpt*")] == ["ckpt_epoch_0_update_4.pth"]
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


WORKERS = [
    pytest.param(before, after, marks=() if (before, after) in {(0, 2), (2, 1)} else pytest.mark.long)
    for before in range(4)
    for after in range(4)
]


@pytest.mark.parametrize(("before", "after"), WORKERS)
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


def without_position(state):
    state["progress"]["next_update"] -= 1


LEAVE_OUT = [
    *(without_weights, without_statistics, without_moments, without_ema),
    *(without_losses, without_best, without_position),
]


@pytest.mark.parametrize("leave_out", LEAVE_OUT, ids=lambda f: f.__name__)
def test_every_item_of_the_state_is_needed(data, tmp_path, monkeypatch, straight, leave_out):
    """The negative control: a continuation that leaves an item out does not end with the same bits."""
    args = runs.arguments(data, tmp_path, "SAVE_EVERY_UPDATES", "7")  # after the last stop, within its epoch
    assert runs.train_here(monkeypatch, args, stop_at=6) == 75
    load, kept = resume.load_file, {}

    def incomplete(path):
        state = load(path)
        leave_out(state)
        return state

    def keep(state, path):
        kept[path.name] = (state["progress"]["loss_sum"], state["max_accuracy"])

    with monkeypatch.context() as patch:
        patch.setattr(resume, "load_file", incomplete)
        save = resume.save_checkpoint
        patch.setattr(resume, "save_checkpoint", lambda state, path: (keep(state, path), save(state, path)))
        assert runs.train_here(monkeypatch, args) == 0
    if leave_out is without_losses:  # they are part of the epoch's mean loss, and gone after its end
        folder = runs.run_folder(tmp_path)
        means = re.findall(r"EPOCH 1 .* mean loss (.*)", (folder / "log_rank0.txt").read_text())
        assert kept["ckpt_epoch_1_update_3.pth"][0] < 3.0 and len(means) == 1
    else:
        assert outcome(tmp_path) != straight


def test_float16_scaler_survives(data, tmp_path, monkeypatch):
    opts = ("AMP_OPT_LEVEL", "O1", "AMP_DTYPE", "float16")
    one, two = tmp_path / "one", tmp_path / "two"
    assert runs.train_here(monkeypatch, runs.arguments(data, one, *opts)) == 0
    assert runs.train_here(monkeypatch, runs.arguments(data, two, *opts), stop_at=3) == 75
    stopped = load_file(runs.run_folder(two) / "ckpt_epoch_0_update_3.pth")
    assert stopped["scaler"]["scale"] > 0
    assert runs.train_here(monkeypatch, runs.arguments(data, two, *opts)) == 0
    assert outcome(one) == outcome(two)


def test_damaged_checkpoints_are_passed_over(data, tmp_path, monkeypatch, straight):
    args = runs.arguments(data, tmp_path)
    assert runs.train_here(monkeypatch, args, stop_at=6) == 75
    folder = runs.run_folder(tmp_path)
    newest = folder / "ckpt_epoch_1_update_2.pth"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    (folder / "samples_rank0.txt").unlink()
    assert runs.train_here(monkeypatch, args) == 0
    log = (folder / "log_rank0.txt").read_text()
    assert f"{newest}: damaged" in log and "resumed from" in log and "ckpt_epoch_0.pth" in log
    assert outcome(tmp_path)[0] == straight[0]


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
    monkeypatch.setattr(train, "evaluate", lambda *_: engine.Evaluation(next(accuracies), 100.0, 1.0, 6))
    forward_backward = engine._accumulate_gradients

    def killed(session, trainer, *rest):
        if trainer.num_updates == 9:
            raise KeyboardInterrupt
        return forward_backward(session, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_accumulate_gradients", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.train_here(patch, args)
    folder = runs.run_folder(tmp_path)
    second = (folder / "ckpt_epoch_1.pth").read_bytes()
    assert runs.train_here(monkeypatch, args) == 0
    assert (folder / "ckpt_epoch_1.pth").read_bytes() == second
    assert load_file(folder / "ckpt_best.pth")["epoch"] == 2
    assert not list(folder.glob(".*.partial"))
