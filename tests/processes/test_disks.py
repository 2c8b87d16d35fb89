"""Disks that are full, read-only or gone, and logs that nobody reads: one line, and nothing lost."""

import json
import os
import re
import shutil
import signal
import subprocess

import pytest
import runs
import tensorboardX
from crash_steps import Steps
from ranks import train_in_fork
from runs import final_state

import train
from data import TrainingData
from tasks.classification import task as classification
from utils import engine
from utils.checkpoint import BEST_NAME, checkpoints_of, load_file
from utils.resume import Saver

KILLED = -signal.SIGKILL
TIMEOUT_SECONDS = 120


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
