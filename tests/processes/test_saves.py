"""Saves killed at every step and half-way through every write: a checkpoint is whole or absent."""

import errno
import logging
import os
import random
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from crash_steps import Steps, _Written
from ranks import Forked, in_fork

from utils import checkpoint
from utils.checkpoint import BEST_NAME, checkpoints_of, load_file
from utils.processes import Processes
from utils.resume import Saver, load_resume
from utils.run_lock import lock_run_folder
from utils.schedule import RunLength

KILLED = -signal.SIGKILL


def state_of(number, is_best=False, size=1000, parts=20):
    """A checkpoint that says everywhere which one it is."""
    model = {f"w{i}": torch.full((size,), float(number)) for i in range(parts)}
    return {"model": model, "epoch": number, "max_accuracy": float(number), "num_updates": number, "is_best": is_best}


def saver_of(folder, keep=2):
    config = SimpleNamespace(SAVE_FREQ=1, SAVE_KEEP=keep)
    session = SimpleNamespace(config=config, folder=folder, processes=Processes(0, 0, 1, torch.device("cpu")))
    loop = SimpleNamespace(next_epoch=0, next_update=0)
    return Saver(session, SimpleNamespace(num_updates=0, length=RunLength(100, 0, 1)), loop, {})


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


MARKS = dict.fromkeys((save_in_an_epoch, save_where_nothing_links), pytest.mark.long)
# These show nothing that others do not.
MARKS |= dict.fromkeys((save_where_nothing_is, save_over_the_same_name, save_the_best_only), pytest.mark.chaos)


@pytest.mark.parametrize(
    "save",
    [pytest.param(save, marks=MARKS.get(save, ())) for save in SAVES],
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
