"""Signals: all processes stop at one update, save, and the run continues."""

import importlib.util
import os
import re
import signal
import time

import pytest
import runs
import torch
from ranks import FAULT_TRAIN, Launched, Ranks, all_end, is_running, pid_of, report_in, run_ranks, workers_of

from data.workers import STOP_SIGNALS
from utils.checkpoint import load_file
from utils.failures import remove_unfinished_binary
from utils.processes import Processes
from utils.supervision import RunSupervisor

STOP_SECONDS = 30  # what README promises
SHOWN_STOPS = (3, 5)  # the last update of an epoch, and one within; the others show nothing else


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.chaos) for n in (signal.SIGUSR1, signal.SIGINT))],
    ids=lambda number: number.name,
)
def test_a_signal_to_one_process_stops_all_at_one_update_and_the_run_continues(data, tmp_path, two_processes, number):
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2")
    with Ranks("train.py", args, processes=2) as run:
        run.until(r"Train: \[0/2\]\[1/4\]")
        run.kill(number, rank=1)
        codes, output = run.finish(), run.text
    assert codes == [75, 75] and "stopped by request at update" in output
    log = [(runs.run_folder(tmp_path) / f"log_rank{rank}.txt").read_text() for rank in (0, 1)]
    stops = [re.search(r"stopped by request at update (\d+)", text)[1] for text in log]
    assert stops[0] == stops[1]
    assert run_ranks("train.py", args, processes=2).returncode == 0
    ended, straight = (runs.run_folder(output) / "ckpt_epoch_1.pth" for output in (tmp_path, two_processes))
    assert runs.digest(ended) == runs.digest(straight)


@pytest.mark.parametrize(
    "update", [pytest.param(n, marks=() if n in SHOWN_STOPS else pytest.mark.chaos) for n in range(8)]
)
def test_two_processes_stopped_at_any_update(data, tmp_path, two_processes, update):
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2")
    rank = update % 2
    stopped = run_ranks(FAULT_TRAIN, args, processes=2, env={"FAULT": f"stop:{rank}:{update}"})
    assert f"stopped by request at update {update + 1}" in stopped.stdout
    assert run_ranks("train.py", args, processes=2).returncode == 0
    ended, straight = (runs.run_folder(output) / "ckpt_epoch_1.pth" for output in (tmp_path, two_processes))
    assert runs.digest(ended) == runs.digest(straight)
    for rank in (0, 1):
        logs = [
            (runs.run_folder(output) / f"samples_rank{rank}.txt").read_text() for output in (tmp_path, two_processes)
        ]
        assert logs[0] == logs[1]


def test_what_a_killed_compiler_left_is_removed(data, tmp_path):
    """Else a run that was killed while it compiled would fail at it each time that it is started again."""
    unfinished, other = tmp_path / "cache" / "st" / "a.main.so", tmp_path / "b.so"
    unfinished.parent.mkdir(parents=True)
    for file in (unfinished, other):
        file.touch()
    with pytest.raises(ImportError) as loading:
        importlib.util.module_from_spec(importlib.util.spec_from_file_location("a", unfinished))
    assert str(loading.value) == f"{unfinished}: file too short"
    env = {"FAULT": "raise:0:1:binary", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = run_ranks(FAULT_TRAIN, runs.arguments(data, tmp_path / "out"), env=env)
    assert result.returncode == 2 and result.stderr.splitlines()[-1] == (
        f"fault_train.py: error: {unfinished}: left by a compiler that was stopped (file too short); it is removed "
        "now: start the command again"
    )
    assert not unfinished.exists() and other.exists()
    assert not remove_unfinished_binary(ImportError(f"{other}: file too short")) and other.exists()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1", ""])
def test_a_compiler_that_got_the_stop_signal_too_is_no_failure(data, tmp_path, number):
    """Schedulers, `timeout` and terminals signal every process of a job, and a compiler ends of it."""
    env = {"FAULT": f"compiler:0:2:{number}", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "report")}
    result = run_ranks(FAULT_TRAIN, runs.arguments(data, tmp_path), env=env)
    if number:
        assert result.returncode == 75 and report_in(tmp_path / "report")["errorCode"] == 75
        assert result.stderr.splitlines() == [
            f"fault_train.py: error: {number} has stopped the run and its compiler; the same command continues from "
            "the last checkpoint"
        ]
    else:
        assert result.returncode == 1 and report_in(tmp_path / "report")["errorCode"] is None
        assert "InductorError" in result.stderr.splitlines()[-1] and "C++ compile error" in result.stderr


@pytest.mark.parametrize("place", ["train", "evaluate", "save"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_polite_stop_takes_less_than_30_seconds(data, tmp_path, processes, place):
    """SIGTERM to the last process; where only the main one saves, to that one. All have saved and are gone in time."""
    opts = ("DATA.BATCH_SIZE", str(4 // processes), "DATA.NUM_WORKERS", "1", "TRAIN.EPOCHS", "300")
    rank = 0 if place == "save" else processes - 1
    args, env = runs.arguments(data, tmp_path, *opts), {"FAULT": f"sigterm-in:{place}:{rank}"}
    with Ranks(FAULT_TRAIN, args, processes, env) as run:
        asked = float(run.until(r"signalled at (\S+)")[1])
        codes, output = run.finish(), run.text
        took = time.time() - asked
    assert codes == [75] * processes, output
    update, path = re.search(r"stopped by request at update (\d+), saved (\S+);", output).groups()
    assert load_file(path)["num_updates"] == int(update) == {"train": 1, "evaluate": 4, "save": 5}[place]
    assert took < STOP_SECONDS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_every_process_of_a_run_saves(data, tmp_path, number):
    """As pkill and systemd send it: the loader workers must wait for their process, and end with it."""
    args = runs.arguments(data, tmp_path, "DATA.NUM_WORKERS", "2", "TRAIN.EPOCHS", "500")
    with Ranks("train.py", args) as run:
        run.until(r"Train: \[1/500\]\[1/4\]")  # validated once: both loaders have workers
        pid = run.pids[0]
        workers = workers_of(pid)
        for process in (*workers, pid):
            os.kill(process, number)
        codes, output = run.finish(), run.text
    assert len(workers) == 2 * min(2, len(os.sched_getaffinity(0)))
    assert codes == [75], output
    update, path = re.search(r"stopped by request at update (\d+), saved (\S+);", output).groups()
    assert load_file(path)["num_updates"] == int(update)
    assert all_end([pid, *workers])


def test_a_signal_that_was_ignored_before_stays_so():
    """`nohup python train.py` ignores SIGHUP."""
    supervisor = RunSupervisor(Processes(0, 0, 1, torch.device("cpu")), timeout_seconds=1)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        supervisor.listen()
        signal.raise_signal(signal.SIGHUP)
        assert not supervisor.stop_agreed()
        signal.raise_signal(signal.SIGTERM)
        assert supervisor.stop_agreed()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.launch
def test_a_lost_connection_saves_under_nohup_torchrun(data, tmp_path):
    """torchrun takes SIGHUP although `nohup` ignores it, hands it on, and ends; its processes save before that."""
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2", "TRAIN.EPOCHS", "500", "DATA.NUM_WORKERS", "1")
    command = ["nohup", *runs.command("train.py", args, processes=2)]
    with Launched("train.py", args, processes=2, command=command) as run:
        run.until(r"Train: \[1/500\]\[1/4\]")
        pids = [pid_of(tmp_path, rank) for rank in (0, 1)]
        os.killpg(run.process.pid, signal.SIGHUP)
        _, output = run.finish()
    update, path = re.search(r"stopped by request at update (\d+), saved (\S+);", output).groups()
    assert load_file(path)["num_updates"] == int(update)
    assert all_end(pids)


@pytest.mark.launch
def test_an_interrupted_run_does_not_wait_for_its_loader_workers(data, tmp_path):
    args = runs.arguments(data, tmp_path, "DATA.NUM_WORKERS", "2", "TRAIN.EPOCHS", "500")
    with Launched(FAULT_TRAIN, args, env={"FAULT": "interrupt:0:8"}) as run:
        run.until(r"Train: \[1/500\]\[1/4\]")
        pid = run.process.pid
        workers = workers_of(pid)
        run.until(r"Train: \[1/500\]\[3/4\]")
        assert all_end([pid]), "torch waits for workers that hang (5 s, here an hour), Python without end"
        status, output = run.finish()
    assert status == 130 and "Traceback" not in output, output
    assert workers and all_end(workers)


@pytest.mark.launch
def test_workers_do_not_outlive_torchrun(data, tmp_path):
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2", "TRAIN.EPOCHS", "500", "DATA.NUM_WORKERS", "1")
    with Launched("train.py", args, processes=2) as run:
        run.until(r"Train: \[1/500\]\[1/4\]")
        pids = [pid_of(tmp_path, rank) for rank in (0, 1)]
        os.kill(run.process.pid, signal.SIGKILL)
        run.finish()  # the pipe closes when the last process that holds it is gone
    assert all_end(pids)


def test_a_killed_loader_worker_ends_the_run_in_one_line(data, tmp_path):
    args = runs.arguments(data, tmp_path, "DATA.NUM_WORKERS", "1", "TRAIN.EPOCHS", "500")
    with Ranks("train.py", args) as run:
        run.until(r"Train: \[1/500\]\[1/4\]")
        os.kill(workers_of(run.pids[0])[0], signal.SIGKILL)
        codes, output = run.finish(), run.text
    assert codes == [2], output
    assert output.splitlines()[-1].startswith("train.py: error: a loader worker was lost: ")
    assert "Traceback" not in output


def test_a_killed_loader_worker_of_one_process_ends_all(data, tmp_path):
    opts = ("DATA.BATCH_SIZE", "2", "DATA.NUM_WORKERS", "1", "TRAIN.EPOCHS", "500")
    with Ranks("train.py", runs.arguments(data, tmp_path, *opts), processes=2) as run:
        run.until(r"Train: \[1/500\]\[1/4\]")
        os.kill(workers_of(run.pids[1])[0], signal.SIGKILL)
        codes, output = run.finish(), run.text
    assert codes == [2, 2]
    assert re.search(r"^train.py: error on process 1 of 2: a loader worker was lost: ", output, re.M), output
    assert load_file(runs.run_folder(tmp_path) / "ckpt_epoch_0.pth")["num_updates"] == 4


def test_a_stop_waits_for_the_checkpoint(data, tmp_path):
    """The first process that ends lets torchrun end all: none may end before the main one has saved."""
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2", "TRAIN.EPOCHS", "500")
    with Ranks(FAULT_TRAIN, args, processes=2, env={"FAULT": "slow-save"}) as run:
        run.until(r"Train: \[0/500\]\[1/4\]")
        run.kill(signal.SIGUSR1, rank=1)
        run.until("saving slowly")
        assert is_running(run.pids[1]), "process 1 must wait"
        (tmp_path / "go on").touch()
        run.finish()
    log = (runs.run_folder(tmp_path) / "log_rank1.txt").read_text()
    (saved,) = re.findall(r"stopped by request at update \d+, saved (\S+);", log)
    assert load_file(saved)["num_updates"] > 0
