"""Runs killed at every point: saves, updates, processes, disks; nothing lost, the same bits at the end."""

import contextlib
import copy
import errno
import io
import json
import logging
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import tensorboardX
import torch
import torch.distributed as dist
from ranks import Forked, Launched, all_end, in_fork, pid_of, run_ranks, script, train_in_fork
from torch import nn

import train
from data import TrainingData, build_eval_loader
from tasks.classification import task as classification
from tasks.classification.images import eval_dataset, open_split
from tasks.classification.inference import run_network
from utils import checkpoint, engine
from utils.checkpoint import BEST_NAME, checkpoints_of, load_file
from utils.failures import is_communication_failure
from utils.precision import Precision
from utils.processes import Processes
from utils.resume import Saver, load_resume
from utils.run_lock import lock_run_folder
from utils.supervision import RunSupervisor

KILLED = -signal.SIGKILL
TIMEOUT_SECONDS = 120


# ----------------------------------------------------------------------------------------------- crash points of a save
class Steps:
    """Counts the steps in which a process changes a folder, and kills it at one of them, half-way into a write.

    Call in a fork: what it wraps stays wrapped.
    """

    WRITES_PER_STEP = 25  # torch writes a checkpoint in many small pieces

    def __init__(self, kill_at=None, report=False):
        self.kill_at, self.report, self.count, self.writes = kill_at, report, 0, 0
        real_open = open

        def opened(path, mode="r"):
            if "w" not in mode:
                return real_open(path, mode)
            self.reach("before open")
            file = real_open(path, mode)
            self.reach("after open")
            return _Written(file, self)

        checkpoint.open = opened
        for module, name in ((os, "fsync"), (os, "replace"), (os, "link"), (os, "unlink"), (shutil, "copyfile")):
            self.wrap(module, name)
        self.wrap(Path, "unlink")

    def wrap(self, place, name):
        function = getattr(place, name)

        def wrapped(*args, **kwargs):
            self.reach(f"before {name}")
            result = function(*args, **kwargs)
            self.reach(f"after {name}")
            return result

        setattr(place, name, wrapped)

    def reach(self, name):
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.report:
            print(name)
        self.count += 1


class _Written:
    def __init__(self, file, steps):
        self.file, self.steps = file, steps

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, piece):
        self.steps.writes += 1
        if self.steps.writes % self.steps.WRITES_PER_STEP == 0:
            half = len(piece) // 2
            self.file.write(piece[:half])
            self.file.flush()
            self.steps.reach("in write")
            self.file.write(piece[half:])
            return len(piece)
        return self.file.write(piece)


def state_of(number, is_best=False, size=1000, parts=20):
    """A checkpoint that says everywhere which one it is."""
    model = {f"w{i}": torch.full((size,), float(number)) for i in range(parts)}
    return {"model": model, "epoch": number, "max_accuracy": float(number), "num_updates": number, "is_best": is_best}


def saver_of(folder, keep=2):
    config = SimpleNamespace(SAVE_FREQ=1, SAVE_KEEP=keep, TRAIN=SimpleNamespace(EPOCHS=100))
    session = SimpleNamespace(config=config, folder=folder, processes=Processes(0, 0, 1, torch.device("cpu")))
    loop = SimpleNamespace(next_epoch=0, next_update=0)
    return Saver(session, SimpleNamespace(num_updates=0), loop, {})


def save_epoch(folder, number, is_best=True):
    saver = saver_of(folder)
    saver._content = lambda is_best: state_of(number, is_best)
    saver.after_epoch(number, is_best)


def save_update(folder, number, size=1000, parts=20):
    saver = saver_of(folder)
    saver.loop.next_epoch, saver.loop.next_update = 4, number
    saver._content = lambda is_best: state_of(number, is_best, size, parts)
    saver._save_position()


def number_in(path):
    """Which state this is; fails where the file is damaged or a mixture of two."""
    state = load_file(path)
    numbers = {state["epoch"]} | {value for w in state["model"].values() for value in w.unique().tolist()}
    assert len(numbers) == 1, f"{path} holds parts of {numbers}"
    return numbers.pop()


def open_folder(folder):
    """What a run does first; returns the numbers of the checkpoints that it then finds, in their order."""
    os.close(lock_run_folder(folder, print))
    assert not list(folder.glob("*partial*")) and not list(folder.glob(".*partial*"))
    numbers = [number_in(path) for path in checkpoints_of(folder)]
    training = SimpleNamespace(AUTO_RESUME=True)
    config = SimpleNamespace(TRAIN=training, MODEL=SimpleNamespace(RESUME="", PRETRAINED=""))
    logger = logging.getLogger("nowhere")
    session = SimpleNamespace(folder=folder, processes=saver_of(folder).session.processes, config=config, logger=logger)
    load_resume(session)
    return numbers


def save_where_nothing_is(folder):
    save_epoch(folder, 0)


def save_behind_an_epoch(folder):
    """The third whole epoch: saved, made the best one, the first pruned."""
    save_epoch(folder, 2)


def save_in_an_epoch(folder):
    """The second part of an epoch, which replaces the first."""
    save_update(folder, 9)


def save_over_the_same_name(folder):
    save_epoch(folder, 1)


def save_where_nothing_links(folder):
    """The file system has no hard links: the best one is a copy."""

    def no_link(*args, **kwargs):
        raise OSError(errno.EPERM, "no links")

    link, os.link = os.link, no_link
    try:
        save_epoch(folder, 2)
    finally:
        os.link = link


def save_the_best_only(folder):
    saver = saver_of(folder)
    saver.config.SAVE_FREQ = 50
    saver._content = lambda is_best: state_of(2, is_best)
    saver.after_epoch(2, True)


SAVES = {  # what is saved, what was there before
    save_where_nothing_is: (),
    save_behind_an_epoch: (0, 1),
    save_in_an_epoch: (0, 1),
    save_over_the_same_name: (0, 1),
    save_where_nothing_links: (0, 1),
    save_the_best_only: (0, 1),
}


def prepare_folder(folder, save, before):
    folder.mkdir()
    for number in before:
        save_epoch(folder, number)
    if save is save_in_an_epoch:
        save_update(folder, 5)


ALIKE = (save_where_nothing_is, save_over_the_same_name, save_the_best_only)  # they show nothing that others do not


@pytest.mark.parametrize(
    "save",
    [pytest.param(save, marks=pytest.mark.chaos if save in ALIKE else ()) for save in SAVES],
    ids=lambda save: save.__name__,
)
def test_killed_at_every_step_of_a_save(tmp_path, save):
    """Afterwards the newest checkpoint is the old or the new one, whole; so is the best, which is never the worse."""
    template = tmp_path / "template"
    prepare_folder(template, save, SAVES[save])
    shutil.copytree(template, tmp_path / "whole")
    old = open_folder(template)

    def run(folder, kill_at=None):
        Steps(kill_at, report=kill_at is None)
        save(folder)

    status, names = in_fork(lambda: run(tmp_path / "whole"))
    assert status == 0, names
    names = names.splitlines()
    assert {"before open", "in write", "before fsync", "after fsync", "before replace", "after replace"} <= set(names)
    assert names.count("in write") >= 3
    new = open_folder(tmp_path / "whole")
    best_of_new = number_in(tmp_path / "whole" / BEST_NAME)
    seen = set()
    for step, name in enumerate(names):
        folder = tmp_path / f"killed_{step}"
        shutil.copytree(template, folder)
        assert in_fork(lambda f=folder, s=step: run(f, s))[0] == KILLED, name
        found = open_folder(folder)
        assert found[-1:] in (old[-1:], new[-1:]), (name, found)
        seen.add(tuple(found[-1:]))
        if (folder / BEST_NAME).exists():
            best = number_in(folder / BEST_NAME)
            assert best in (*old, best_of_new), name
            assert not found or best >= max(n for n in found if n < 3), f"{name}: best is {best} of {found}"
        else:
            assert not old and not found, f"{name}: {found}, but there is no best checkpoint"
        save(folder)
        assert open_folder(folder) == new, f"{name}: the same save does not succeed afterwards"
        assert number_in(folder / BEST_NAME) == best_of_new
        shutil.rmtree(folder)
    assert len(seen) == len({tuple(old[-1:]), tuple(new[-1:])}), "no kill before the rename, or none after it"


@pytest.mark.parametrize("percent", [0, 25, 50, 75, 100])
def test_killed_with_this_much_written(tmp_path, percent):
    save_epoch(tmp_path, 0)
    whole = (tmp_path / "ckpt_epoch_0.pth").stat().st_size

    def save():
        real_open = open

        def opened(path, mode="r"):
            return _CutAt(real_open(path, mode), whole * percent // 100) if "w" in mode else real_open(path, mode)

        checkpoint.open = opened
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)  # all is written
        save_epoch(tmp_path, 1)

    assert in_fork(save)[0] == KILLED
    assert [p.stat().st_size for p in tmp_path.glob(".*.partial")] == [whole * percent // 100]
    assert open_folder(tmp_path) == [0]


class _CutAt(_Written):
    """A file that a process is killed over once so many bytes are on disk."""

    def __init__(self, file, limit):
        self.file, self.left = file, limit

    def write(self, piece):
        piece = bytes(piece)
        if len(piece) > self.left:
            self.file.write(piece[: self.left])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= len(piece)
        return self.file.write(piece)


@pytest.mark.chaos
def test_a_hundred_kills_during_back_to_back_saves(tmp_path):
    """Killed from outside at any time; what was once reported as saved is never lost."""
    rng = random.Random(0)

    def save_on_and_on(first):
        for number in range(first, first + 1000):
            save_update(tmp_path, number, size=50_000, parts=4)
            print(f"saved {number};")

    acknowledged, continued_in_write = -1, 0
    for kills in range(400):
        if kills >= 100 and continued_in_write >= 10:  # how many kills hit a save depends on the machine
            break
        found = open_folder(tmp_path)
        newest = found[-1] if found else -1
        assert newest >= acknowledged, f"{acknowledged} was saved, {newest} is the newest"
        with Forked(lambda n=newest: save_on_and_on(int(n) + 1)) as child:
            for _ in range(rng.randint(0, 3)):
                child.until("saved")
            child.read(seconds=rng.uniform(0, 0.02))  # somewhere in the next save
            child.kill()
            assert child.finish() == [KILLED]
            acknowledged = max([acknowledged, *map(int, re.findall(r"saved (\d+);", child.text))])
        continued_in_write += any(tmp_path.glob(".*.partial"))
    assert open_folder(tmp_path)[-1] >= acknowledged >= 50
    assert continued_in_write >= 10, "hardly a kill hit a save"


# ------------------------------------------------------------------------------------------------------ killed training
def final_state(output, epochs):
    folder = runs.run_folder(output)
    return runs.digest(folder / f"ckpt_epoch_{epochs - 1}.pth"), runs.digest(folder / BEST_NAME)


def samples(output, rank=0):
    """What was seen, by update: lines of an update that was done again must be equal to the first ones."""
    seen = {}
    for line in (runs.run_folder(output) / f"samples_rank{rank}.txt").read_text().splitlines():
        epoch, update, *indices = map(int, line.split())
        assert seen.setdefault((epoch, update), indices) == indices, f"epoch {epoch}, update {update} differ"
    return seen


def kill_at(step):
    """What prepares a fork to kill itself at this step of its saves, updates and validations."""

    def prepare():
        steps = Steps(kill_at=step)
        runs.in_update(setattr, lambda number, network: steps.reach("update"))
        steps.wrap(classification, "run_network")

    return prepare


def killed_from_outside(args, rng):
    with Forked(script("train.py", args)) as child:
        with contextlib.suppress(AssertionError):  # it has ended
            for _ in range(rng.randint(0, 3)):
                child.until("Train: ")
        child.read(seconds=rng.uniform(0, 0.05))
        child.kill()
        return child.finish()[0], child.text


def end_with_the_same_bits(data, tmp_path, epochs, kills):
    """Run a training by each of `kills`, then to its end; compare it with one that was not killed.

    Returns how many of them have killed it.
    """
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    status, text = train_in_fork(runs.arguments(data, straight, "TRAIN.EPOCHS", str(epochs)))
    assert status == 0, text
    args = runs.arguments(data, killed, "TRAIN.EPOCHS", str(epochs), "SAVE_EVERY_UPDATES", "1")
    done = 0
    for kill in kills:
        status, text = kill(args)
        assert status in (0, KILLED), text
        done += status == KILLED
    status, text = train_in_fork(args)
    assert status == 0, text
    assert final_state(killed, epochs) == final_state(straight, epochs)
    assert samples(killed) == samples(straight)
    assert not list(runs.run_folder(killed).glob(".*.partial"))
    return done


def test_a_training_killed_again_and_again_ends_with_the_same_bits(data, tmp_path):
    """In its first update, in several writes of later ones, and around a validation."""
    steps = (0, 14, 40, 25, 60)
    kills = [lambda args, step=step: train_in_fork(args, kill_at(step)) for step in steps]
    assert end_with_the_same_bits(data, tmp_path, 2, kills) == len(steps)


@pytest.mark.chaos
def test_a_training_killed_a_hundred_times_at_random_ends_with_the_same_bits(data, tmp_path):
    rng = random.Random(100)
    kills = 50 * [
        lambda args: train_in_fork(args, kill_at(rng.randint(1, 60))),
        lambda args: killed_from_outside(args, rng),
    ]
    assert end_with_the_same_bits(data, tmp_path, 50, kills) == 100


KILLING_TRAIN = """
import os, signal, sys
from pathlib import Path

sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import runs
import train
from utils.session import run_script

done = Path(os.environ["KILLS_DONE"])
plan = [tuple(map(int, kill.split(":"))) for kill in os.environ["KILLS"].split()]


def kill(update, network):
    number = len(done.read_text().split()) if done.exists() else 0
    if number < len(plan) and plan[number][0] == int(os.environ["RANK"]) and update >= plan[number][1]:
        with done.open("a") as file:
            file.write(f"{{update}}\\n")
        os.kill(os.getpid(), signal.SIGKILL)


runs.in_update(setattr, kill)
run_script(train.main)
"""


@pytest.mark.launch
@pytest.mark.parametrize(("epochs", "kills"), [(2, 2), pytest.param(8, 30, marks=pytest.mark.chaos)])
def test_processes_killed_at_random_under_torchrun_with_restarts(data, tmp_path, epochs, kills):
    """Two processes; torchrun itself starts them again after each kill, and the run continues by itself."""
    rng = random.Random(kills)
    updates = sorted(rng.randint(0, 4 * epochs - 1) for _ in range(kills))
    plan = " ".join(f"{rng.randint(0, 1)}:{update}" for update in updates)
    killing = tmp_path / "killing_train.py"
    killing.write_text(KILLING_TRAIN.format(root=str(runs.ROOT)))
    opts = ("DATA.BATCH_SIZE", "2", "TRAIN.EPOCHS", str(epochs), "SAVE_EVERY_UPDATES", "1")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    result = run_ranks("train.py", runs.arguments(data, straight, *opts), processes=2)
    assert result.returncode == 0, result.stderr[-5000:]
    command = runs.command(str(killing), runs.arguments(data, killed, *opts), processes=2)
    command[command.index(str(killing)) : command.index(str(killing))] = ["--max-restarts", str(kills)]
    env = runs.environment() | {"KILLS": plan, "KILLS_DONE": str(tmp_path / "done")}
    limit = 120 + 30 * kills
    result = subprocess.run(command, cwd=runs.ROOT, env=env, capture_output=True, text=True, timeout=limit)
    assert result.returncode == 0, result.stderr[-5000:]
    assert len((tmp_path / "done").read_text().split()) == kills
    assert final_state(killed, epochs) == final_state(straight, epochs)
    for rank in (0, 1):
        assert samples(killed, rank) == samples(straight, rank)


@pytest.mark.launch
@pytest.mark.parametrize(("epochs", "kills"), [(2, 1), pytest.param(8, 10, marks=pytest.mark.chaos)])
def test_processes_killed_at_random_under_our_launcher_with_retries(data, tmp_path, epochs, kills):
    """As with torchrun's restarts, by multi_machine_start.py, which starts torchrun again."""
    rng = random.Random(kills + 1)
    plan = [f"{rng.randint(0, 1)}:{update}" for update in sorted(rng.randint(0, 4 * epochs - 1) for _ in range(kills))]
    code = tmp_path / "code"
    code.mkdir()
    (code / "train.py").write_text(KILLING_TRAIN.format(root=str(runs.ROOT)))
    opts = ("DATA.BATCH_SIZE", "2", "TRAIN.EPOCHS", str(epochs), "SAVE_EVERY_UPDATES", "1")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    result = run_ranks("train.py", runs.arguments(data, straight, *opts), processes=2)
    assert result.returncode == 0, result.stderr[-5000:]
    command = [sys.executable, "multi_machine_start.py", "--np", "2", "--code_path", str(code), "--tag", "run"]
    command += ["--config", str(runs.ROOT / "configs" / "groupmixformer_digits.yaml"), "--data_path", str(data)]
    command += [
        "--output",
        str(killed),
        "--retries",
        str(kills),
        "--retry_wait",
        "0",
        "--",
        "--opts",
        *runs.TINY,
        *opts,
    ]
    env = runs.environment() | {"KILLS": " ".join(plan), "KILLS_DONE": str(tmp_path / "done")}
    limit = 120 + 30 * kills
    result = subprocess.run(command, cwd=runs.ROOT, env=env, capture_output=True, text=True, timeout=limit)
    assert result.returncode == 0, result.stderr[-5000:]
    assert len((tmp_path / "done").read_text().split()) == kills
    assert result.stderr.count("; starting it again in 0 s") == kills
    assert final_state(killed, epochs) == final_state(straight, epochs)
    for rank in (0, 1):
        assert samples(killed, rank) == samples(straight, rank)


# ---------------------------------------------------------------------------------------------------------------- disks
@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"this machine does not let the tests mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder, leave):
    """Write a file that leaves so many bytes free."""
    disk = os.statvfs(folder)
    with open(folder / "ballast", "ab") as file:
        file.write(bytes(max(0, disk.f_bavail * disk.f_frsize - leave)))


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("straight")
    status, text = train_in_fork(runs.arguments(data, output))
    assert status == 0, text
    return final_state(output, 2)


def one_line(text):
    """The message with which train.py ended; fails where more than one line of it was told, or a traceback."""
    lines = [line for line in text.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and text.splitlines()[-1] == lines[0] and "Traceback" not in text, text
    return lines[0]


def test_a_disk_that_fills_up_between_two_saves(data, small_disk, straight):
    """Logs are written there too: one line says so, and nothing else is told."""
    args = runs.arguments(data, small_disk)

    def prepare():
        begin_epoch = engine.LoopState.begin_epoch

        def fill_up(loop, epoch):
            begin_epoch(loop, epoch)
            Saver.after_update = lambda saver: fill(small_disk, leave=0)

        engine.LoopState.begin_epoch = fill_up

    status, text = train_in_fork(args, prepare)
    assert status == 2, text
    assert re.search(rf"{small_disk}\S+: cannot be written \(.*\); .*\b0 MiB are free", one_line(text))
    assert [p.name for p in checkpoints_of(runs.run_folder(small_disk))] == ["ckpt_epoch_0.pth"]
    (small_disk / "ballast").unlink()
    status, text = train_in_fork(args)
    assert status == 0, text
    assert final_state(small_disk, 2) == straight


@pytest.mark.parametrize("file", ["log_rank0.txt", "events"])
def test_a_log_that_cannot_be_written_is_told_once_and_stops_nothing(data, tmp_path, straight, file):
    """Neither is part of the run's state. More events than tensorboardX's queue holds: it must not fill up."""
    folder = runs.run_folder(tmp_path)
    folder.mkdir(parents=True)
    if file == "log_rank0.txt":
        (folder / file).symlink_to("/dev/full")

    def prepare():
        if file == "events":
            open_file = tensorboardX.record_writer.open_file
            tensorboardX.record_writer.open_file = lambda path: (open_file(path), open("/dev/full", "wb"))[1]  # noqa: SIM115

    status, text = train_in_fork(runs.arguments(data, tmp_path), prepare)
    assert status == 0, text
    told = re.findall(rf"^{folder}/(\S+): cannot be written \(.*\); \d+ MiB are free; \w+ are left out$", text, re.M)
    assert len(told) == 1 and told[0].startswith(file), text
    assert final_state(tmp_path, 2) == straight


@pytest.mark.parametrize("leave", [0.25, 0.9])
def test_full_disk(data, small_disk, straight, leave):
    """It fills up during the second epoch, to where so much of a checkpoint would fit."""
    args = runs.arguments(data, small_disk)
    folder = runs.run_folder(small_disk)

    def prepare():
        begin_epoch = engine.LoopState.begin_epoch

        def fill_up(loop, epoch):
            begin_epoch(loop, epoch)
            if epoch == 2:
                fill(small_disk, int(leave * (folder / "ckpt_epoch_0.pth").stat().st_size))

        engine.LoopState.begin_epoch = fill_up

    status, text = train_in_fork(args, prepare)
    assert status == 2, text
    message = one_line(text)
    assert re.search(r"ckpt_epoch_1\.pth: cannot be written \(.*\); it needs about \d+ MiB, \d+ MiB are free", message)
    assert str(folder) in message
    left = sorted(path.name for path in folder.iterdir() if "ckpt" in path.name)
    assert left == [BEST_NAME, "ckpt_epoch_0.pth"] or left == ["ckpt_epoch_0.pth"], left
    assert load_file(folder / "ckpt_epoch_0.pth")["epoch"] == 0
    (small_disk / "ballast").unlink()
    status, text = train_in_fork(args)
    assert status == 0 and "resumed from" in text, text
    assert final_state(small_disk, 2) == straight


def fill_before(small_disk, place, name):
    """Let no byte be free when this function is called."""
    function = getattr(place, name)

    def filled_up(*args, **kwargs):
        fill(small_disk, leave=0)
        return function(*args, **kwargs)

    setattr(place, name, filled_up)


@pytest.mark.parametrize(
    ("place", "name", "file"),
    [
        (train, "start_session", "run.lock"),
        (train, "describe_run", "config.json"),
        (classification, "run_network", "ckpt_epoch_0.pth"),
        (TrainingData, "_log_samples", "samples_rank0.txt"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_no_byte_is_free_from_here_on(data, small_disk, straight, place, name, file):
    """Whatever is written next: one line names it and the free space, and once there is some, nothing is lost."""
    status, text = train_in_fork(runs.arguments(data, small_disk), lambda: fill_before(small_disk, place, name))
    assert status == 2, text
    folder = runs.run_folder(small_disk)
    assert re.search(rf"{folder}/{file}: cannot be written \(.*\); (it needs .*, )?0 MiB are free", one_line(text))
    (small_disk / "ballast").unlink()
    status, text = train_in_fork(runs.arguments(data, small_disk))
    assert status == 0, text
    assert final_state(small_disk, 2) == straight


@pytest.mark.launch
@pytest.mark.parametrize(("fault", "status"), [("none", 0), ("raise:0:3:disk", 2)], ids=["", "fault"])
def test_a_run_outlives_whoever_reads_it(data, tmp_path, straight, fault, status):
    """A terminal that was closed, a `tee` that was killed: the log file goes on, and so does the status."""
    command = runs.command("tests/fault_train.py", runs.arguments(data, tmp_path))
    environment = runs.environment() | {"FAULT": fault, "TORCHELASTIC_ERROR_FILE": str(tmp_path / "report")}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=runs.ROOT, env=environment, **pipes) as process:
        while "Train: " not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        process.stdout.close()
        process.stderr.close()
        assert process.wait(TIMEOUT_SECONDS) == status
    log = (runs.run_folder(tmp_path) / "log_rank0.txt").read_text()
    assert log.count("<stdout> is closed (Broken pipe)") == 1
    if status:
        assert json.loads((tmp_path / "report").read_text())["message"]["message"].endswith("Read-only file system")
    else:
        assert "2 epochs done" in log and final_state(tmp_path, 2) == straight


def test_read_only_output(data, small_disk, straight):
    args = runs.arguments(data, small_disk, "SAVE_EVERY_UPDATES", "1")
    status, text = train_in_fork(args, lambda: Steps(kill_at=20))
    assert status == KILLED, text
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    status, text = train_in_fork(args)
    assert status == 2 and re.search(rf"--output: {small_disk}\S*: (cannot be written|Read-only)", one_line(text))
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert train_in_fork(args)[0] == 0
    assert final_state(small_disk, 2)[0] == straight[0]


def test_output_that_vanishes(data, tmp_path):
    """An unmounted disk, say: the run ends at the next save and names the folder."""

    def prepare():
        save = Saver.after_epoch

        def vanish(saver, epoch, is_best):
            shutil.rmtree(tmp_path / "out")
            save(saver, epoch, is_best)

        Saver.after_epoch = vanish

    status, text = train_in_fork(runs.arguments(data, tmp_path / "out"), prepare)
    assert status == 2
    assert re.search(
        rf"{tmp_path}/out/\S*: cannot be written \(.*No such file or directory|does not exist", one_line(text)
    )
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------------- signals
def test_killed_while_it_saves_on_request(data, tmp_path, straight):
    """A stop is asked for, and the patience of who asked ends in the middle of the save."""
    args = runs.arguments(data, tmp_path)

    def never_synced():
        def fsync(descriptor):
            print("syncing")
            while True:
                signal.pause()

        def after_first_epoch(saver, *rest):
            after_epoch(saver, *rest)
            os.fsync = fsync

        after_epoch = Saver.after_epoch
        Saver.after_epoch = after_first_epoch

    with Forked(script("train.py", args, never_synced)) as child:
        child.until(r"Train: \[1/2\]\[0/4\]")
        child.kill(signal.SIGTERM)
        child.until("syncing")
        child.kill()
        assert child.finish() == [KILLED]
    folder = runs.run_folder(tmp_path)
    assert list(folder.glob(".*.partial")) and [p.name for p in checkpoints_of(folder)] == ["ckpt_epoch_0.pth"]
    assert train_in_fork(args)[0] == 0
    assert final_state(tmp_path, 2) == straight and not list(folder.glob(".*.partial"))


def test_a_second_interrupt_ends_at_once(data, tmp_path, straight):
    args = runs.arguments(data, tmp_path)

    def prepare():
        def interrupt_twice(number, network):
            if number == 5:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                print("this must not be reached")

        runs.in_update(setattr, interrupt_twice)

    status, text = train_in_fork(args, prepare)
    assert status == 130 and "not be reached" not in text and "Traceback" not in text, text
    assert [p.name for p in checkpoints_of(runs.run_folder(tmp_path))] == ["ckpt_epoch_0.pth"]
    assert train_in_fork(args)[0] == 0
    assert final_state(tmp_path, 2) == straight


@pytest.mark.launch
def test_torchrun_is_asked_to_stop(data, tmp_path):
    """SIGTERM to torchrun itself, as schedulers send it: saved, all processes gone, and the same command continues."""
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2", "TRAIN.EPOCHS", "300")
    with Launched("train.py", args, processes=2) as run:
        run.until(r"Train: \[1/300\]\[1/4\]")
        pids = [pid_of(tmp_path, rank) for rank in (0, 1)]
        os.kill(run.process.pid, signal.SIGTERM)
        status, output = run.finish()
    assert status != 0
    saved = re.search(r"stopped by request at update (\d+), saved (\S+);", output)
    assert saved, output
    assert all_end([*pids, run.process.pid])
    assert load_file(saved[2])["num_updates"] == int(saved[1])
    assert checkpoints_of(runs.run_folder(tmp_path))[-1] == Path(saved[2])


@pytest.mark.launch
def test_torchrun_is_killed_while_its_processes_start(data, tmp_path):
    """They are importing still, and cannot have told the kernel yet that they want to end with it."""
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2", "TRAIN.EPOCHS", "300")
    with Launched("train.py", args, processes=2) as run:
        pid = run.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        while len(pids := children.read_text().split()) < 2:
            assert run.process.poll() is None
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        assert select.select([run.process.stdout], [], [], TIMEOUT_SECONDS)[0], "its processes wait for it without end"
        run.finish()
    assert all_end(pids)


# ----------------------------------------------------------------------------------------------------------- evaluation
class Brightness(nn.Module):
    """Class scores from the mean colour: nothing to train, another answer for every image."""

    def forward(self, images):
        colour = images.mean(dim=(2, 3))
        return torch.cat([colour, colour * 3 - 1], dim=1)[:, :6]


def _with_samples(source, samples):
    part = copy.copy(source)
    part.samples = samples
    return part


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_of_1_to_17_images_is_exact(tmp_path, data, make_config, world_size):
    """Every number of images on every number of processes: the counts of a plain loop over all images."""
    cfg = make_config(
        "--data-path", data, "--batch-size", "2", "--opts", "DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", "0"
    )
    source = open_split(cfg, "train", 0, 1)
    order = torch.randperm(len(source.samples), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [source.samples[i] for i in order]

    def evaluate_as(rank):
        logger = logging.getLogger("nowhere")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
        if world_size > 1:
            timeout = timedelta(seconds=60)
            store = dist.FileStore(str(tmp_path / "store"), world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        processes = Processes(rank, rank, world_size, torch.device("cpu"))
        supervisor = RunSupervisor(processes, 60)
        supervisor.listen()
        session = SimpleNamespace(processes=processes, logger=logger, config=cfg, supervisor=supervisor)
        precision = Precision("cpu", torch.float32, enabled=False)
        for count in range(1, 18):
            part = _with_samples(source, samples[:count])
            loader, _ = build_eval_loader(cfg, eval_dataset(cfg, part), rank, world_size, False)
            with contextlib.redirect_stdout(io.StringIO()):
                sums = run_network(session, cfg, Brightness(), loader, precision)
            acc1, acc5, loss = sums.means().values()
            print(f"result {count} {sums.count} {acc1!r} {acc5!r} {loss!r}")

    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(Forked(lambda r=rank: evaluate_as(r))) for rank in range(world_size)]
        for child in children:
            assert child.finish() == [0], child.text
    texts = [re.findall(r"result (\d+) (\d+) (\S+) (\S+) (\S+)", child.text) for child in children]
    assert all(text == texts[0] for text in texts)

    loader, _ = build_eval_loader(cfg, eval_dataset(cfg, _with_samples(source, samples)), 0, 1, False)
    logits = torch.cat([Brightness()(views[:, 0]) for views, _ in loader])
    labels = torch.cat([labels for _, labels in loader])
    hits = logits.topk(5).indices == labels[:, None]
    losses = nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    assert len(texts[0]) == 17
    for count, (images, counted, acc1, acc5, loss) in enumerate(texts[0], start=1):
        assert (int(images), int(counted)) == (count, count)
        assert float(acc1) == 100 * hits[:count, 0].sum().item() / count
        assert float(acc5) == 100 * hits[:count].sum().item() / count
        assert float(loss) == pytest.approx(losses[:count].mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer", True),
        ("Timed out waiting 60000ms for recv operation to complete", True),
        ("CUDA error: the launch timed out and was terminated", False),
        ("The size of tensor a must match the size of tensor b", False),
    ],
)
def test_a_failure_of_this_process_is_not_told_as_one_of_another(text: str, others: bool) -> None:
    assert is_communication_failure(RuntimeError(text)) == others
