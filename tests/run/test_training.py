"""What happens within a run: accumulation, the best checkpoint, TensorBoard, unreadable images, skipped updates."""

import ast
import dataclasses
import json
import math
import re
import signal
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train
from configs import UserError
from tools.digits import write_digits
from utils import engine, resume
from utils import processes as distributed
from utils.checkpoint import load_file
from utils.engine import BufferSnapshot
from utils.supervision import RunSupervisor

NO_WARMUP = ("TRAIN.WARMUP_EPOCHS", "0")
RESULTS = ("progress", "max_accuracy", "best_weights", "is_best")


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def log_of(output, name="log"):
    return (runs.run_folder(output) / f"{name}_rank0.txt").read_text()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradients_are_synchronised_once_an_update(image_folder, tmp_path, monkeypatch, group, accumulation):
    synchronised = []

    def count(state, bucket):
        synchronised.append(bucket.index())
        return allreduce_hook(state, bucket)

    def wrap(network, processes):
        model = distributed.wrap_distributed(network, dataclasses.replace(processes, world_size=2))
        model.register_comm_hook(None, count)
        return model

    monkeypatch.setattr(train, "wrap_distributed", wrap)
    opts = ("DATA.BATCH_SIZE", "2", "TRAIN.ACCUMULATION_STEPS", str(accumulation), *("TRAIN.EPOCHS", "1"))
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path, *opts, "TRAIN.WARMUP_EPOCHS", "0")) == 0
    assert synchronised.count(0) == 18 // (2 * accumulation), "the first bucket, once an update"


def test_a_process_says_that_it_has_come_before_every_batch(image_folder, tmp_path, monkeypatch):
    """Synchronised batch norms wait for the other processes in each, not only in the last one of an update."""
    events = []
    monkeypatch.setattr(RunSupervisor, "arrive", lambda supervisor: events.append("arrive"))
    monkeypatch.setattr(engine, "_gradient_sync", lambda *_, **__: (events.append("batch"), nullcontext())[1])
    opts = ("DATA.BATCH_SIZE", "2", "TRAIN.ACCUMULATION_STEPS", "3", "TRAIN.EPOCHS", "1", *NO_WARMUP)
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path, *opts)) == 0
    assert events == ["arrive", "batch"] * 9


def test_accumulated_gradients_are_those_of_the_whole_batch(image_folder, tmp_path, monkeypatch):
    """Two batches of two give the gradients of one of four, batch norms frozen and nothing random."""
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", lambda self, mode=True: torch.nn.Module.train(self, False))
    weights = []
    for batch, accumulation in (("4", "1"), ("2", "2")):
        opts = (*runs.PLAIN, "DATA.BATCH_SIZE", batch, "TRAIN.ACCUMULATION_STEPS", accumulation)
        output = tmp_path / batch
        assert runs.train_here(monkeypatch, runs.arguments(image_folder, output, *opts)) == 0
        weights.append(load_file(runs.run_folder(output) / "ckpt_epoch_1.pth")["model"])
        lines = re.findall(r"lr ([\d.]+)", log_of(output))
        assert len(lines) == 8, "the schedule moves once an update"
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_once_over_the_whole_update(image_folder, tmp_path, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def clip_and_note(parameters, limit):
        parameters = list(parameters)
        norm = clip(parameters, limit)
        after = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]))
        norms.append((float(norm), float(after), limit))
        return norm

    monkeypatch.setattr(engine.nn.utils, "clip_grad_norm_", clip_and_note)
    opts = ("TRAIN.CLIP_GRAD", "0.5", "DATA.BATCH_SIZE", "2", "TRAIN.ACCUMULATION_STEPS", "2", "TRAIN.EPOCHS", "2")
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path, *opts)) == 0
    assert len(norms) == 8 and all(limit == 0.5 for *_, limit in norms)
    assert all(after <= 0.5 + 1e-4 for _, after, _ in norms) and any(norm > 0.5 for norm, *_ in norms)


def test_ema_never_changes_the_raw_weights(image_folder, tmp_path, monkeypatch):
    digests = set()
    for enabled in ("True", "False"):
        output = tmp_path / enabled
        runs.train_here(monkeypatch, runs.arguments(image_folder, output, "EMA.ENABLED", enabled))
        path = runs.run_folder(output) / "ckpt_epoch_1.pth"
        state = load_file(path)
        assert ("model_ema" in state) == (enabled == "True")
        digests.add(runs.digest(path, leave_out=[*RESULTS, *({"model_ema"} & set(state))]))
    assert len(digests) == 1


@pytest.fixture
def planned_accuracies(monkeypatch):
    """Let the evaluations of a run give these accuracies, raw and EMA by turns."""

    def plan(*accuracies):
        queue = iter(accuracies)
        numbers = lambda network: {"acc1": next(queue), "acc5": 100.0, "loss": 1.0}  # noqa: E731
        runs.change_task(monkeypatch, lambda task: {"validate": numbers})

    return plan


def test_the_best_of_raw_and_ema_is_kept_and_says_which(image_folder, tmp_path, monkeypatch, planned_accuracies):
    planned_accuracies(50.0, 40.0, 60.0, 70.0, 65.0, 70.0)
    args = runs.arguments(image_folder, tmp_path, "TRAIN.EPOCHS", "3", "SAVE_KEEP", "1")
    assert runs.train_here(monkeypatch, args) == 0
    best = load_file(runs.run_folder(tmp_path) / "ckpt_best.pth")
    assert (best["epoch"], best["max_accuracy"], best["best_weights"]) == (1, 70.0, "ema")
    assert sorted(p.name for p in runs.run_folder(tmp_path).glob("ckpt*")) == ["ckpt_best.pth", "ckpt_epoch_2.pth"]


def test_an_accuracy_of_zero_has_a_best_checkpoint_too(image_folder, tmp_path, monkeypatch, planned_accuracies):
    planned_accuracies(0.0, 0.0, 0.0, 0.0)
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path)) == 0
    assert load_file(runs.run_folder(tmp_path) / "ckpt_best.pth")["epoch"] == 0


def test_the_best_is_kept_although_the_run_was_killed_just_before(
    image_folder, tmp_path, monkeypatch, planned_accuracies
):
    planned_accuracies(50.0, 40.0, 10.0, 10.0)
    args = runs.arguments(image_folder, tmp_path)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume, "keep_as_best", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.train_here(patch, args)
    planned_accuracies(10.0, 10.0)
    assert runs.train_here(monkeypatch, args) == 0
    assert load_file(runs.run_folder(tmp_path) / "ckpt_best.pth")["epoch"] == 0


def test_a_number_that_is_none_is_never_the_best(image_folder, tmp_path, monkeypatch, planned_accuracies):
    planned_accuracies(math.nan, math.nan, 10.0, math.nan)
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path)) == 0
    best = load_file(runs.run_folder(tmp_path) / "ckpt_best.pth")
    assert (best["epoch"], best["max_accuracy"], best["best_weights"]) == (1, 10.0, "raw")
    assert "Best acc1: none yet, no validation gave a number" in log_of(tmp_path)
    assert "raw weights: acc1 nan, acc5 100, loss 1\n" in log_of(tmp_path)


def test_a_task_that_names_a_number_which_it_does_not_give_loses_no_epoch(image_folder, tmp_path, monkeypatch):
    runs.change_task(monkeypatch, lambda task: {"decides": "acc"})
    with pytest.raises(UserError, match=r"Task\.decides = 'acc': validate gives acc1, acc5, loss; name one"):
        runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path))
    assert (runs.run_folder(tmp_path) / "ckpt_epoch_0_update_4.pth").exists()


@pytest.mark.parametrize(
    "wrong",
    [lambda value, parts: value, lambda value, parts: (value, {"x": 1.0}), lambda value, parts: (value[None], {})],
)
def test_a_task_whose_loss_is_none_is_named(image_folder, tmp_path, monkeypatch, wrong):
    runs.change_task(monkeypatch, lambda task: {"loss": lambda *batch: wrong(*task.loss(*batch))})
    with pytest.raises(UserError, match=r"Task\.loss: returned .*; it must return a scalar tensor and a dict of such"):
        runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path))


def test_a_task_without_fingerprints_is_refused(image_folder, tmp_path, monkeypatch):
    runs.change_task(monkeypatch, lambda task: {"identity": {"val_fingerprint": "x"}})
    with pytest.raises(UserError, match=r"Task\.identity: lacks data_fingerprint"):
        runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path))


def test_metrics_have_every_epoch_once_over_a_stop(image_folder, tmp_path, monkeypatch):
    """And none of an earlier run in the same folder."""
    folder = runs.run_folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"epoch": 7}\n{"epo')
    args = runs.arguments(image_folder, tmp_path, "TRAIN.EPOCHS", "3")
    assert runs.train_here(monkeypatch, args, stop_at=2) == 75
    assert not (folder / "metrics.jsonl").exists()
    assert runs.train_here(monkeypatch, args, stop_at=10) == 75
    (folder / "ckpt_epoch_2_update_2.pth").unlink()  # killed before it could save: its epoch is trained again
    (folder / "ckpt_epoch_1.pth").unlink()
    assert runs.train_here(monkeypatch, args) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["updates"]) for line in lines] == [(0, 4), (1, 8), (2, 12)]
    events = EventAccumulator(str(folder)).Reload()
    for name in ("acc1_raw", "acc5_raw", "loss_raw", "acc1_ema", "loss_ema"):
        assert [line[name] for line in lines] == pytest.approx([e.value for e in events.Scalars(f"val/{name}")])
    assert [line["train_loss"] for line in lines] == pytest.approx(
        [e.value for e in events.Scalars("epoch/train_loss")]
    )
    assert lines[0]["decides"] == "acc1" and lines[0]["higher_is_better"] is True


@pytest.mark.parametrize(("frequency", "saved"), [(2, [1, 2]), (3, [2])])
def test_save_frequency(image_folder, tmp_path, monkeypatch, frequency, saved):
    args = runs.arguments(image_folder, tmp_path, "TRAIN.EPOCHS", "3", "SAVE_FREQ", str(frequency))
    assert runs.train_here(monkeypatch, args) == 0
    names = {p.name for p in runs.run_folder(tmp_path).glob("ckpt*")}
    assert names == {"ckpt_best.pth", *(f"ckpt_epoch_{epoch}.pth" for epoch in saved)}


def test_tensorboard_has_every_step_once_over_a_stop(image_folder, tmp_path, monkeypatch):
    args = runs.arguments(image_folder, tmp_path)
    assert runs.train_here(monkeypatch, args, stop_at=6) == 75
    assert runs.train_here(monkeypatch, args) == 0
    events = EventAccumulator(str(runs.run_folder(tmp_path))).Reload()
    tags = events.Tags()
    for tag in ("loss", "lr", "grad_norm", "images_per_second"):
        assert [event.step for event in events.Scalars(f"train/{tag}")] == list(range(1, 9))
    for tag in ("acc1_raw", "acc5_raw", "loss_raw", "acc1_ema", "acc5_ema", "loss_ema"):
        assert [event.step for event in events.Scalars(f"val/{tag}")] == [4, 8]
    assert tags["images"] == ["train/images"] and len(events.Images("train/images")) == 1


def test_unreadable_training_images_are_named_and_passed_over(image_folder, tmp_path, monkeypatch):
    broken = image_folder / "train" / "bee" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    empty = image_folder / "train" / "cat" / "0.png"
    empty.write_bytes(b"")
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path, "DATA.BATCH_SIZE", "6")) == 0
    log = log_of(tmp_path)
    for path, neighbour in ((broken, "3.png"), (empty, "1.png")):
        assert len(re.findall(rf"{path}: cannot be read as an image: .*{neighbour} is used instead", log)) == 1


def test_too_many_unreadable_training_images_end_the_run(image_folder, tmp_path, monkeypatch):
    for number in range(3):
        (image_folder / "train" / "bee" / f"{number}.png").write_text("no image")
    with pytest.raises(UserError, match=r"3 unreadable training images.*DATA.MAX_UNREADABLE = 2"):
        runs.train_here(
            monkeypatch, runs.arguments(image_folder, tmp_path, "DATA.MAX_UNREADABLE", "2", "DATA.BATCH_SIZE", "6")
        )


def test_an_unreadable_validation_image_ends_the_evaluation(image_folder, tmp_path, monkeypatch):
    broken = image_folder / "val" / "bee" / "1.png"
    broken.write_bytes(b"")
    with pytest.raises(UserError) as failure:
        runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path))
    assert str(broken) in failure.value.one_line()


def test_a_skipped_update_counts_in_no_mean(image_folder, tmp_path, monkeypatch):
    losses = []

    def once_bad(task):
        def loss(model, batch):
            """The second loss is not finite, while its gradients would be."""
            value, parts = task.loss(model, batch)
            losses.append(value.item())
            return (value + math.nan if len(losses) == 2 else value), parts

        return {"loss": loss}

    runs.change_task(monkeypatch, once_bad)
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path)) == 0
    log = log_of(tmp_path)
    assert "update 1 skipped: loss or gradients not finite on process 0, learning rate" in log
    mean = float(re.search(r"EPOCH 0 .* mean loss ([\d.]+)", log)[1])
    assert mean == pytest.approx((losses[0] + losses[2] + losses[3]) / 3, abs=1e-4)
    assert "[1/4]" in log and "loss nan" in log


def test_one_process_stops_at_the_update_in_which_it_was_asked(image_folder, tmp_path, monkeypatch):
    """Even by a signal that comes in the backward pass."""

    def agree_on_update(supervisor, *numbers):
        if not asked:
            asked.append(signal.raise_signal(signal.SIGUSR1))
        return agree(supervisor, *numbers)

    asked, agree = [], RunSupervisor.agree_on_update
    monkeypatch.setattr(RunSupervisor, "agree_on_update", agree_on_update)
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path)) == 75
    assert "stopped by request at update 1, saved" in log_of(tmp_path)


def test_allowed_changes_take_effect(image_folder, tmp_path, monkeypatch):
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path), stop_at=3) == 75
    changed = runs.arguments(image_folder, tmp_path, "TRAIN.WEIGHT_DECAY", "0.3", flags=["--allow-changes"])
    assert runs.train_here(monkeypatch, changed) == 0
    groups = load_file(runs.run_folder(tmp_path) / "ckpt_epoch_1.pth")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def test_another_order_of_images_is_a_change(image_folder, tmp_path, monkeypatch):
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    for split in ("train", "val"):
        files = sorted((image_folder / split).glob("*/*.png"))
        labels = {name: i for i, name in enumerate(("ant", "bee", "cat"))}
        with zipfile.ZipFile(zipped / f"{split}.zip", "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(image_folder / split))
        lines = [f"{file.relative_to(image_folder / split)}\t{labels[file.parent.name]}\n" for file in files]
        (zipped / f"{split}_map.txt").write_text("".join(lines))
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path), stop_at=3) == 75
    with pytest.raises(UserError, match="order of images over all images -> within shares of 1 processes"):
        runs.train_here(monkeypatch, runs.arguments(zipped, tmp_path, flags=["--zip"]))
    same_order = runs.arguments(zipped, tmp_path, flags=["--zip", "--cache-mode", "full"])
    assert runs.train_here(monkeypatch, same_order) == 0


def test_resume_flag_is_said_to_be_unused_where_the_run_has_its_own_checkpoints(image_folder, tmp_path, monkeypatch):
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path), stop_at=2) == 75
    other = str(runs.run_folder(tmp_path) / "ckpt_epoch_0_update_2.pth")
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path, flags=["--resume", other])) == 0
    assert f"--resume {other} is not used" in log_of(tmp_path)


def test_train_with_eval_or_pretrained_evaluates_and_does_not_train(image_folder, tmp_path, monkeypatch):
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path / "a")) == 0
    weights = str(runs.run_folder(tmp_path / "a") / "ckpt_best.pth")
    args = runs.arguments(image_folder, tmp_path / "b", flags=["--eval", "--pretrained", weights])
    assert runs.train_here(monkeypatch, args) == 0
    log = log_of(tmp_path / "b", "log_eval")
    assert "Train:" not in log and re.search(r" \* Acc@1 \d+\.\d{3} Acc@5 100\.000\n$", log)
    assert not list(runs.run_folder(tmp_path / "b").glob("ckpt*"))


@pytest.mark.parametrize("flag", ["--throughput", "--flops"])
def test_measurements_need_neither_data_nor_weights(tmp_path, monkeypatch, flag):
    args = runs.arguments(tmp_path / "nowhere", tmp_path, flags=[flag])
    assert runs.train_here(monkeypatch, args) == 0
    expected = (
        r"throughput [\d.]+ images/s, peak memory \d+ MiB"
        if flag == "--throughput"
        else r", 1000 classes: [\d.]+ GFLOPs, [\d,]+ parameters"
    )
    assert re.search(expected, log_of(tmp_path, "log_eval"))


ALLOWED_IMPORTS = {
    "configs": {"configs"},
    "models": {"models"},
    "data": {"data", "configs"},
    "utils": {"utils", "data", "configs"},
    "tasks": {"tasks", "models", "utils", "data", "configs"},
    "tools": {"tools", "tasks", "models", "utils", "data", "configs"},
}


@pytest.mark.parametrize("package", ALLOWED_IMPORTS)
def test_imports_point_one_way(package):
    own = {*ALLOWED_IMPORTS, "train", "test", "multi_machine_start"}
    for path in (runs.ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            imported = {name.split(".")[0] for name in names} & own
            assert imported <= ALLOWED_IMPORTS[package], f"{path.relative_to(runs.ROOT)} imports {imported}"


def test_train_py_reads_like_a_table_of_contents():
    text = (runs.ROOT / "train.py").read_text()
    assert len(text.splitlines()) <= 120
    assert len(re.findall(r"^def |^class ", text, re.MULTILINE)) == 1
    assert (runs.ROOT / "test.py").stat().st_size < 2000


def test_checkpoints_by_the_clock(image_folder, tmp_path, monkeypatch):
    kept = []
    save = resume.save_checkpoint
    monkeypatch.setattr(resume, "save_checkpoint", lambda state, path: kept.append(path.name) or save(state, path))
    clock = iter(range(0, 10_000, 25))  # seconds; one look at every update, one at every save
    monkeypatch.setattr(resume, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    args = runs.arguments(image_folder, tmp_path, "SAVE_EVERY_MINUTES", "0.9", "TRAIN.EPOCHS", "1", *NO_WARMUP)
    assert runs.train_here(monkeypatch, args) == 0
    assert kept == ["ckpt_epoch_0_update_3.pth", "ckpt_epoch_0.pth"]


def test_buffers_are_copied_in_lists_of_one_type(monkeypatch):
    """Batch norms mix float32 with the int64 count of batches, and torch copies mixed lists one tensor at a time."""
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(4))
    copy, lists = torch._foreach_copy_, []
    monkeypatch.setattr(torch, "_foreach_copy_", lambda into, of: (lists.append([*into, *of]), copy(into, of)))
    statistics = BufferSnapshot(network)
    statistics.take()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network[0](torch.randn(2, 3, 4, 4))
    network[1](torch.randn(2, 4, 4, 4))
    assert not torch.equal(network[1].running_mean, before["1.running_mean"])
    statistics.restore()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert len(lists) == 4 and all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in lists)


def test_float16_overflow_lowers_the_scale_and_changes_nothing_else(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build_scaler", lambda precision: torch.amp.GradScaler("cpu", init_scale=2.0**100))
    opts = ("AMP_OPT_LEVEL", "O1", "AMP_DTYPE", "float16", "TRAIN.EPOCHS", "1", *NO_WARMUP, "SAVE_EVERY_UPDATES", "1")
    states = []
    save = resume.save_checkpoint
    monkeypatch.setattr(resume, "save_checkpoint", lambda state, path: states.append(state) or save(state, path))
    torch.manual_seed(0)
    assert runs.train_here(monkeypatch, runs.arguments(image_folder, tmp_path, *opts)) == 0
    assert "update 0 skipped: loss or gradients not finite" in log_of(tmp_path)
    assert re.search(r"4 in a row, loss scale now [\d.e+]+", log_of(tmp_path))
    last = load_file(runs.run_folder(tmp_path) / "ckpt_epoch_0.pth")
    assert last["scaler"]["scale"] == 2.0**96 and last["optimizer"]["state"] == {}
    assert all(torch.isfinite(v).all() for v in last["model"].values() if v.is_floating_point())
    assert last["model"]["norm4.num_batches_tracked"] == 0, "skipped batches do not count in the statistics"


# ---------------------------------------------------------------------------------------------------------- fine-tuning
def test_a_run_with_factors_on_the_learning_rate_continues_with_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opts = ("TRAIN.LAYER_DECAY", "0.8", "TRAIN.HEAD_LR_SCALE", "3.0")
    whole, stopped = (runs.arguments(data, tmp_path / name, *opts) for name in ("whole", "stopped"))
    assert runs.train_here(monkeypatch, whole) == 0
    assert runs.train_here(monkeypatch, stopped, stop_at=3) == 75
    assert runs.train_here(monkeypatch, stopped) == 0
    digests = [runs.digest(runs.run_folder(tmp_path / name) / "ckpt_epoch_1.pth") for name in ("whole", "stopped")]
    assert digests[0] == digests[1]
    log = (runs.run_folder(tmp_path / "whole") / "log_rank0.txt").read_text()
    plain = runs.arguments(data, tmp_path / "plain")
    assert runs.train_here(monkeypatch, plain) == 0
    expected = (runs.run_folder(tmp_path / "plain") / "log_rank0.txt").read_text()
    logged = [re.findall(r" lr (\S+)", text) for text in (log, expected)]
    assert logged[0] == logged[1] != [], "the log tells the schedule's rate, whatever the factors"


@pytest.mark.chaos
def test_fine_tuning_at_another_resolution_beats_training_from_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_digits(tmp_path / "digits")

    def accuracy(cfg: str, tag: str, *flags: str) -> float:
        args = ["--cfg", str(runs.ROOT / "configs" / cfg), "--data-path", str(tmp_path / "digits"), "--tag", tag]
        assert runs.train_here(monkeypatch, [*args, "--output", str(tmp_path / "o"), *flags]) == 0
        (log,) = (tmp_path / "o").glob(f"*/{tag}/log_rank0.txt")
        return float(re.findall(r"best acc1 (\S+)", log.read_text())[-1])

    first = accuracy("groupmixformer_digits.yaml", "first", "--opts", "TRAIN.EPOCHS", "8")
    weights = tmp_path / "o" / "groupmixformer_digits" / "first" / "ckpt_best.pth"
    tuned = accuracy("groupmixformer_digits_48.yaml", "tuned", "--pretrained", str(weights))
    scratch = accuracy("groupmixformer_digits_48.yaml", "scratch")
    assert first > 90 and tuned > 80 and tuned > scratch + 5
