"""Processes that are lost, slow, different or failing: named, in bounded time."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import runs
import torch
from ranks import FAULT_TRAIN, Launched, Ranks, all_end, pid_of, report_in, run_ranks

import tasks
from configs import read_config
from tasks.networks import build_model
from utils import checkpoint, supervision
from utils import processes as distributed
from utils.checkpoint import load_file
from utils.failures import is_communication_failure


@pytest.mark.launch
def test_a_process_that_looks_after_others_ends_well(tmp_path):
    """Its thread may be inside the store whenever it ends: here it always is."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(runs.ROOT)!r})\n"
        "from utils import supervision\n"
        "from utils.processes import close_processes, init_processes\n"
        "supervision.POLL_SECONDS = 1e-6\n"
        "supervision.RunSupervisor(init_processes(60), 60).listen()\n"
        "close_processes()\n"
    )
    result = runs.launch(str(script), [], processes=2)
    assert result.returncode == 0, result.stderr


def test_a_killed_process_is_named(data, tmp_path):
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2", "TRAIN.EPOCHS", "200")
    with Ranks("train.py", args, processes=2) as run:
        run.until(r"Train: \[3/200\]\[1/4\]")
        run.kill(rank=1)
        codes, output = run.finish(), run.text
    assert codes == [2, -signal.SIGKILL]
    assert re.search(r"train.py: error on process 0 of 2: process 1 on \S+ was lost", output), output
    again = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2", "TRAIN.EPOCHS", "200")
    with Ranks("train.py", again, processes=2) as run:
        run.until(r"resumed from .*ckpt_epoch_\d+\.pth")


def test_a_stopped_process_is_named_within_the_timeout(data, tmp_path):
    opts = ("DATA.BATCH_SIZE", "2", "TRAIN.EPOCHS", "500", "DIST_TIMEOUT_SECONDS", "5")
    with Ranks("train.py", runs.arguments(data, tmp_path, *opts), processes=2) as run:
        run.until(r"Train: \[1/500\]\[1/4\]")
        run.kill(signal.SIGSTOP, rank=1)
        line = run.until(r"train.py: error on process 0 of 2: (.*)")[1]
        run.kill(rank=1)  # what torchrun does after its own grace of 30 s
        assert run.finish() == [2, -signal.SIGKILL]
    assert re.search(r"process 1 on \S+ was lost or too slow", line), line


def test_a_validation_that_fails_on_another_process_loses_no_epoch(image_folder, tmp_path):
    """The main process, which saves, has no damaged image in its own share."""
    args = runs.arguments(image_folder, tmp_path, "DATA.BATCH_SIZE", "2")
    image = sorted((image_folder / "val").glob("*/*"))[3]  # process 1 evaluates the second batch
    whole = image.read_bytes()
    image.write_bytes(whole[:40])
    result = run_ranks("train.py", args, processes=2)
    assert result.returncode != 0
    assert f"{image}: cannot be read as an image" in result.stderr
    saved = runs.run_folder(tmp_path) / "ckpt_epoch_0_update_4.pth"
    assert f"validation failed; the epoch before it is saved as {saved}" in result.stdout
    image.write_bytes(whole)
    again = run_ranks("train.py", args, processes=2)
    assert again.returncode == 0 and f"resumed from {saved}" in again.stdout


def differing_data(data, tmp_path, what):
    """A copy of the data set as another node may have it: an image of another class, or one that is missing."""
    other = tmp_path / "other"
    shutil.copytree(data, other)
    image = other / "train" / "ant" / "0.png"
    if what == "other labels":
        image.rename(other / "train" / "bee" / "9.png")
    else:
        image.unlink()
    return other


@pytest.mark.parametrize("what", ["other labels", "one less", "other recipe"])
def test_a_process_with_other_images_or_another_recipe_is_named(data, tmp_path, what):
    """Nodes share neither disk nor command line: all processes end alike, before the first update."""
    if what == "other recipe":
        swap, named = ("0.00123", "0.00456"), r"TRAIN.BASE_LR 0\.00123 -> 0\.00456"
    else:
        swap, named = (str(data), str(differing_data(data, tmp_path, what))), "the training images .* are not the same"
    args = runs.arguments(data, tmp_path / "out", "DATA.BATCH_SIZE", "2", "TRAIN.BASE_LR", "0.00123")
    result = run_ranks(FAULT_TRAIN, args, processes=2, env={"FAULT": f"differ:1:{swap[0]}:{swap[1]}"})
    assert result.returncode != 0 and "Train: " not in result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("fault_train.py: error")]
    assert lines and "SIGABRT" not in result.stderr
    expected = rf"on process [01] of 2: process 1 on {socket.gethostname()} differs from process 0: {named}$"
    assert all(re.search(expected, line) for line in lines), lines
    assert not runs.run_folder(tmp_path / "out").exists()


def test_a_process_that_evaluates_other_images_is_named(data, tmp_path):
    """Each process would fill in the rows of its own images, and the accuracy would be of no data set."""
    other = tmp_path / "other"
    shutil.copytree(data, other)
    image = other / "val" / "ant" / "0.png"
    image.rename(other / "val" / "bee" / "9.png")
    weights = tmp_path / "weights.pth"
    args = runs.arguments(data, tmp_path / "out", flags=["--eval", "--pretrained", str(weights)])
    weights.touch()  # a file that is named must be there
    torch.save(build_model(read_config(args, tasks.keys_of)).state_dict(), weights)
    result = run_ranks(FAULT_TRAIN, args, processes=2, env={"FAULT": f"differ:1:{data}:{other}"})
    assert result.returncode != 0 and " * Acc@1" not in result.stdout
    host = socket.gethostname()
    assert f"process 1 on {host} differs from process 0: the validation images (names" in result.stderr, result.stderr


def test_a_mistake_of_one_process_is_named_by_the_others_too(data, tmp_path):
    """Its node lacks the data: the others, which wait for it to begin, have no traceback to show."""
    args = runs.arguments(data, tmp_path / "out", "DATA.BATCH_SIZE", "2")
    env = {"FAULT": f"differ:1:{data}:{tmp_path}"}
    result = run_ranks(FAULT_TRAIN, args, processes=2, env=env)
    assert result.returncode != 0
    cause = f"--data-path {tmp_path}: has no folder train/"
    lines = sorted(line for line in result.stderr.splitlines() if line.startswith("fault_train.py: error"))
    assert len(lines) == 2 and 'fault_train.py", line' not in result.stderr, result.stderr
    who = f"process 1 on {socket.gethostname()} has failed: "
    assert lines[0].startswith(f"fault_train.py: error on process 0 of 2: {who}{cause}"), lines
    assert lines[1].startswith(f"fault_train.py: error on process 1 of 2: {cause}"), lines


@pytest.mark.parametrize(
    ("what", "message", "code"),
    [
        ("memory", r"CUDA out of memory\. Tried to allocate 2\.00 GiB\.: lower --batch-size .*--use-checkpoint", 2),
        ("unforeseen", "KeyError: 'unforeseen'", 1),
    ],
)
def test_an_error_of_any_kind_is_named_to_the_launcher(data, tmp_path, what, message, code):
    """The first process to fail leaves its cause, not one of those that lose it then."""
    args = runs.arguments(data, tmp_path / "out", "DATA.BATCH_SIZE", "2")
    result = run_ranks(FAULT_TRAIN, args, processes=2, env={"FAULT": f"raise:1:5:{what}"}, reports=tmp_path)
    assert result.codes == [2, code]
    reports = [report_in(tmp_path / f"report{rank}") for rank in range(2)]
    assert reports[1]["extraInfo"]["timestamp"] < reports[0]["extraInfo"]["timestamp"]
    cause = reports[1]["message"]
    assert re.fullmatch(rf"fault_train\.py: error on process 1 of 2: {message}", cause), cause
    assert cause in result.stderr.splitlines()
    assert result.stderr.count("in act") == (code == 1), "a traceback where the line is not enough"


def test_a_failure_of_one_process_ends_those_that_wait_for_it(data, tmp_path):
    """NCCL does not notice that a process has gone: here the other one waits without end, whatever happens."""
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2")
    with Ranks(FAULT_TRAIN, args, processes=2, env={"FAULT": "raise-alone:1:5:disk"}) as run:
        run.until(r"^fault_train.py: error on process 1 of 2: /a/disk: Read-only file system$")
        assert all_end(run.pids)
        codes, output = run.finish(), run.text
    assert codes == [2, 2]
    cause = rf"process 1 on {socket.gethostname()} has failed: /a/disk: Read-only file system"
    assert re.search(rf"^fault_train\.py: error on process 0 of 2: {cause}$", output, re.M), output


def test_a_process_is_not_ended_while_it_saves(tmp_path, monkeypatch):
    """What is left of a failed run may just be writing the epoch that it has trained."""
    events = []

    class Lock:
        def __enter__(self):
            events.append("may be ended")

        def __exit__(self, *error):
            pass

    def save(state, file):
        events.append(checkpoint.SAVING.locked())
        torch_save(state, file)

    torch_save = torch.save
    monkeypatch.setattr(torch, "save", save)
    checkpoint.save_checkpoint({"model": {}}, tmp_path / "ckpt_epoch_0.pth")
    assert events == [True] and not checkpoint.SAVING.locked()

    supervisor = supervision.RunSupervisor(distributed.Processes(0, 0, 2, torch.device("cpu")), 600)
    supervisor._store = torch.distributed.HashStore()
    supervisor._store.set("cause", "process 1 has failed")
    monkeypatch.setattr(supervision, "SAVING", Lock())
    monkeypatch.setattr(supervision, "GRACE_SECONDS", 0)
    monkeypatch.setattr(supervision, "report_failure", events.append)
    monkeypatch.setattr(os, "_exit", events.append)
    supervisor._end_after_failure()
    assert events == [True, "may be ended", "process 1 has failed", 2]


@pytest.mark.launch
def test_the_last_line_of_the_launcher_names_the_cause(data, tmp_path):
    """Behind torchrun's report; two processes fail alike, and one line is repeated."""
    config = runs.ROOT / "configs" / "groupmixformer_digits.yaml"
    command = [
        sys.executable,
        "multi_machine_start.py",
        "--np",
        "2",
        "--config",
        str(config),
        "--output",
        str(tmp_path),
    ]
    command += ["--data_path", str(data / "nowhere"), "--retries", "1", "--retry_wait", "0"]
    result = subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True)
    assert result.returncode == 2
    ends = [line for line in result.stderr.splitlines() if ": torchrun ended with code" in line]
    assert len(ends) == 1 and result.stderr.splitlines()[-1] == ends[-1], "a wrong path is not tried again"
    cause = rf"train\.py: error on process [01] of 2: --data-path {re.escape(str(data / 'nowhere'))}: no such folder"
    assert re.search(f"torchrun ended with code 2: {cause}", ends[0]), ends


def check_too_slow(output, lines):
    lines = [line for line in lines.splitlines() if line.startswith("fault_train.py: error")]
    assert len(lines) == 2
    assert all(re.search(r": process 1 on \S+ was lost or too slow(: |$)", line) for line in lines), lines
    assert load_file(runs.run_folder(output) / "ckpt_epoch_0.pth")["num_updates"] == 4


def test_a_process_slower_than_the_limit_ends_the_run_and_is_named(data, tmp_path):
    """It comes back to find the others gone, and names itself, not them."""
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2", "DIST_TIMEOUT_SECONDS", "5")
    with Ranks(FAULT_TRAIN, args, processes=2, env={"FAULT": "hold:1:5"}) as run:
        run.until(r"error on process 0 of 2: ")
        (tmp_path / "go on").touch()
        assert run.finish() == [2, 2]
        check_too_slow(tmp_path, run.text)


@pytest.mark.launch
def test_a_process_that_never_comes_back_ends_too(data, tmp_path):
    """It sleeps, so that it cannot hear torchrun."""
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2", "DIST_TIMEOUT_SECONDS", "5")
    with Launched(FAULT_TRAIN, args, processes=2, env={"FAULT": "hold:1:5"}) as run:
        run.until(r"Train: \[1/2\]\[0/4\]")
        pids = [pid_of(tmp_path, rank) for rank in (0, 1)]
        began = time.monotonic()
        status, output = run.finish()
        assert time.monotonic() - began < 60
    assert status != 0 and all_end([*pids, run.process.pid])
    check_too_slow(tmp_path, output)


@pytest.mark.long
def test_a_process_slower_than_the_others_is_waited_for_and_named_in_the_log(data, tmp_path, two_processes):
    opts = ("DATA.BATCH_SIZE", "2", "DIST_TIMEOUT_SECONDS", "40")
    args, env = runs.arguments(data, tmp_path, *opts), {"FAULT": "hold:1:5"}
    with Ranks(FAULT_TRAIN, args, processes=2, env=env) as run:
        run.until(r"^waiting for process 1 on \S+, for more than 4 s now$")
        (tmp_path / "go on").touch()
        codes, output = run.finish(), run.text
    assert codes == [0, 0], output
    assert "waiting for" not in (runs.run_folder(tmp_path) / "log_rank1.txt").read_text()
    ended, straight = (runs.run_folder(output) / "ckpt_epoch_1.pth" for output in (tmp_path, two_processes))
    assert runs.digest(ended) == runs.digest(straight)


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
