"""Trainings killed at every step and at random moments: nothing lost, the same bits at the end."""

import contextlib
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
from crash_steps import Steps
from ranks import Forked, Launched, all_end, pid_of, run_ranks, script, train_in_fork
from runs import final_state

from tasks.classification import task as classification
from utils.checkpoint import checkpoints_of, load_file
from utils.resume import Saver

KILLED = -signal.SIGKILL
TIMEOUT_SECONDS = 120


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
