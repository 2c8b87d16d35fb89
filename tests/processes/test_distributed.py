"""Several processes: exact evaluation, equal training, agreed stops, lost processes."""

import importlib.util
import json
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
from conftest import write_image_folder
from ranks import FAULT_TRAIN, Launched, Ranks, all_end, is_running, pid_of, run_ranks, workers_of
from torch.testing import assert_close

from configs import read_config, with_num_classes
from data.datasets import ImageDataset
from tasks import keys_of
from tasks.classification.images import open_split
from tasks.classification.transforms import eval_transform
from tasks.networks import build_model
from utils import checkpoint, supervision
from utils import processes as distributed
from utils.checkpoint import load_file
from utils.failures import remove_unfinished_binary

SHOWN_STOPS = (3, 5)  # the last update of an epoch, and one within; the others show nothing else


def learning_rates(output):
    """{"[epoch/epochs][update/updates]": the learning rate that was logged}."""
    log = (runs.run_folder(output) / "log_rank0.txt").read_text()
    return dict(re.findall(r"Train: (\[\d+/\d+\]\[\d+/\d+\]).* lr (\S+)", log))


def samples_by_update(output, processes):
    """{(epoch, update): the images that any process saw}."""
    seen = {}
    for rank in range(processes):
        for line in (runs.run_folder(output) / f"samples_rank{rank}.txt").read_text().splitlines():
            epoch, update, *indices = map(int, line.split())
            seen.setdefault((epoch, update), []).extend(indices)
    return {key: sorted(indices) for key, indices in seen.items()}


@pytest.fixture(scope="module")
def two_processes(data, tmp_path_factory):
    """A finished run of two processes that was never stopped."""
    output = tmp_path_factory.mktemp("two")
    result = run_ranks("train.py", runs.arguments(data, output, "DATA.BATCH_SIZE", "2"), processes=2)
    assert result.returncode == 0, result.stderr
    return output


@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_is_exact_on_any_number_of_processes(tmp_path, processes):
    """22 images of 11 classes, in batches of 4: shares of 11, or of 8, 7 and 7."""
    data, weights = tmp_path / "data", tmp_path / "weights.pth"
    write_image_folder(data, classes="abcdefghijk", train=1, val=2)
    args = runs.arguments(data, tmp_path, flags=["--resume", str(weights)])
    config = with_num_classes(read_config(args, keys_of), 11)
    torch.manual_seed(0)
    network = build_model(config)
    torch.nn.init.normal_(network.head.weight)  # fresh heads rank all classes nearly alike
    torch.save({"model": network.state_dict()}, weights)

    images = ImageDataset(open_split(config, "val", 0, 1), eval_transform(config))
    labels = torch.tensor([images[i][1] for i in range(22)])
    with torch.no_grad():
        ranking = network.eval()(torch.stack([images[i][0] for i in range(22)])).topk(5).indices
    hits = [(ranking[:, :k] == labels[:, None]).sum().item() for k in (1, 5)]
    assert 0 < hits[0] < hits[1] < 22

    result = run_ranks("test.py", args, processes)
    assert result.returncode == 0, result.stderr
    expected = f" * Acc@1 {100 * hits[0] / 22:.3f} Acc@5 {100 * hits[1] / 22:.3f}"
    assert result.stdout.splitlines()[-1] == expected
    for rank in range(processes):
        assert (runs.run_folder(tmp_path) / f"log_eval_rank{rank}.txt").read_text().endswith(expected + "\n")


def test_two_processes_train_as_one_does(data, tmp_path):
    """Same global batch, batch norms frozen and nothing random: only the order of summation differs."""
    weights = {}
    for processes, batch in ((1, "4"), (2, "2")):
        output = tmp_path / str(processes)
        args = runs.arguments(data, output, "DATA.BATCH_SIZE", batch, *runs.PLAIN)
        result = run_ranks(FAULT_TRAIN, args, processes, env={"FAULT": "frozen-norms"})
        assert result.returncode == 0, result.stderr
        weights[processes] = load_file(runs.run_folder(output) / "ckpt_epoch_1.pth")
    for part in ("model", "model_ema"):
        for name, value in weights[1][part].items():
            assert_close(weights[2][part][name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert samples_by_update(tmp_path / "1", 1) == samples_by_update(tmp_path / "2", 2)


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


def report_in(file):
    """What a process that failed left for its launcher."""
    return json.loads(file.read_text())["message"]


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


@pytest.mark.compile
@pytest.mark.parametrize("opts", [(), ("TRAIN.USE_CHECKPOINT", "True")], ids=["", "checkpointing"])
def test_two_compiled_processes_train_as_two_plain_ones(data, tmp_path, two_processes, opts):
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2", *opts, flags=["--compile"])
    result = runs.launch("train.py", args, processes=2, timeout=600)  # most of it is compiling
    assert result.returncode == 0, result.stderr
    losses = [
        [float(loss) for loss in re.findall(r"^.*Train: .*\sloss ([\d.]+)", log.read_text(), re.MULTILINE)]
        for log in (runs.run_folder(output) / "log_rank0.txt" for output in (tmp_path, two_processes))
    ]
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


@pytest.mark.parametrize(
    ("flags", "graphs"),
    [
        ([], 0),
        (["--use-checkpoint"], 0),
        # One of each branch, which no batch norm cuts, and one more with frozen statistics.
        pytest.param(["--compile", "--use-checkpoint"], 3, marks=pytest.mark.compile),
    ],
)
def test_traceable_batch_norms_are_those_of_the_whole_batch(flags, graphs):
    check = str(runs.ROOT / "tests" / "sync_batchnorm_check.py")
    result = runs.launch(check, flags, 2, timeout=600) if graphs else run_ranks(check, flags, 2)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert max(found["errors"]) < 1e-13
    assert (found["breaks"], found["graphs"]) == (0, graphs)


def test_three_processes_continue_with_the_same_bits(data, tmp_path):
    """DDP reorders its buckets after the first update of each start, which two processes cannot show: a + b = b + a."""
    opts = ("DATA.BATCH_SIZE", "2", "TRAIN.EPOCHS", "2")
    straight, stopped = (runs.arguments(data, tmp_path / name, *opts) for name in ("straight", "stopped"))
    assert run_ranks("train.py", straight, processes=3).returncode == 0
    run_ranks(FAULT_TRAIN, stopped, processes=3, env={"FAULT": "stop:1:3"})
    assert run_ranks("train.py", stopped, processes=3).returncode == 0
    digests = [runs.digest(runs.run_folder(tmp_path / n) / "ckpt_epoch_1.pth") for n in ("straight", "stopped")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_sees_the_same_images(data, tmp_path, two_processes, before, after):
    def args(processes):
        return runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", str(4 // processes))

    stopped = run_ranks(FAULT_TRAIN, args(before), processes=before, env={"FAULT": "stop:0:2"})
    assert "stopped by request at update 3" in stopped.stdout
    result = run_ranks("train.py", args(after), processes=after)
    assert result.returncode == 0, result.stderr
    assert f"continuing on {after} processes instead of {before}" in result.stdout
    assert samples_by_update(tmp_path, 2) == samples_by_update(two_processes, 2)
    assert learning_rates(tmp_path) == learning_rates(two_processes)


def test_all_processes_fall_back_to_the_same_checkpoint(data, tmp_path, two_processes):
    shutil.copytree(runs.run_folder(two_processes), runs.run_folder(tmp_path))
    newest, older = (runs.run_folder(tmp_path) / f"ckpt_epoch_{epoch}.pth" for epoch in (1, 0))
    newest.unlink()  # it may be one file with the best
    newest.write_bytes(older.read_bytes()[:-100])
    result = run_ranks("train.py", runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2"), processes=2)
    assert result.returncode == 0, result.stderr
    assert re.search(rf"{newest}: damaged .*; trying the one before", result.stdout)
    for rank in (0, 1):
        log = (runs.run_folder(tmp_path) / f"log_rank{rank}.txt").read_text()
        assert re.findall(r"resumed from (\S+): epoch 1, update 0", log) == [str(older)]
    assert runs.digest(newest) == runs.digest(runs.run_folder(two_processes) / newest.name)


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
    torch.save({"model": {}}, weights)  # they end before they read it
    args = runs.arguments(data, tmp_path / "out", flags=["--eval", "--pretrained", str(weights)])
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
        assert all_end(run.pids, seconds=10)
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


@pytest.mark.parametrize(
    ("variables", "chosen"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node0"}, "ib0"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "loopback"}, "eth0"),  # node 0's name, on node 0
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "node0"}, "ib0"),  # a launcher that does not say how many are on a node
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, None),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node0"}, None),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node0", "GLOO_SOCKET_IFNAME": "own"}, "own"),
    ],
)
def test_network_interface_of_several_nodes(monkeypatch, variables, chosen):
    leads_to = {"node0": "ib0", "loopback": "lo", "127.0.0.1": "lo", "192.0.2.1": "eth0"}
    monkeypatch.setattr(distributed, "interface_towards", leads_to.__getitem__)
    monkeypatch.setattr(os, "environ", dict(variables))
    distributed.choose_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen


def test_the_interface_that_leads_to_a_host():
    assert distributed.interface_towards("127.0.0.1") == "lo"
    assert distributed.interface_towards("no-such-host.invalid") == ""


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


STOP_SECONDS = 30  # what README promises


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
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
    assert all_end([pid, *workers], seconds=5)


@pytest.mark.launch
def test_an_interrupted_run_does_not_wait_for_its_loader_workers(data, tmp_path):
    args = runs.arguments(data, tmp_path, "DATA.NUM_WORKERS", "2", "TRAIN.EPOCHS", "500")
    with Launched(FAULT_TRAIN, args, env={"FAULT": "interrupt:0:8"}) as run:
        run.until(r"Train: \[1/500\]\[1/4\]")
        pid = run.process.pid
        workers = workers_of(pid)
        run.until(r"Train: \[1/500\]\[3/4\]")
        assert all_end([pid], seconds=4), "torch waits for its workers for 5 s, Python without end"
        status, output = run.finish()
    assert status == 130 and "Traceback" not in output, output
    assert workers and all_end(workers, seconds=5)


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


@pytest.mark.parametrize(("what", "named"), [("nan:0", "0"), ("infinite:1", "1"), ("nan-gradient:1", "0, 1")])
def test_one_process_with_a_nan_makes_all_skip_that_update(data, tmp_path, what, named):
    """Gradients are averaged before anybody looks at them: with a finite loss, all have the NaN and are named."""
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2", "SAVE_EVERY_UPDATES", "1", "SAVE_KEEP", "0")
    result = run_ranks(FAULT_TRAIN, args, processes=2, env={"FAULT": f"{what}:2"})
    assert result.returncode == 0, result.stderr
    logs = [(runs.run_folder(tmp_path) / f"log_rank{rank}.txt").read_text() for rank in (0, 1)]
    for log in logs:
        assert len(re.findall(f"update 2 skipped: loss or gradients not finite on process {named}, learning", log)) == 1
    for rank, log in enumerate(logs):
        assert bool(re.search(rf"process {rank}, image indices: \[\d+, \d+\]", log)) == (str(rank) in named)
    state = load_file(runs.run_folder(tmp_path) / "ckpt_epoch_1.pth")
    values = [*state["model"].values(), *state["model_ema"].values()]
    assert all(torch.isfinite(v).all() for v in values if v.is_floating_point())
    assert state["num_updates"] == 8 and state["optimizer"]["state"][0]["step"] == 7


@pytest.mark.parametrize(("update", "left"), [(2, []), (7, ["ckpt_epoch_0.pth"])])
def test_processes_that_disagree_on_the_gradients_end(data, tmp_path, update, left):
    """Else one would skip or clip where the other does not, and their weights would drift apart unseen.

    Within an epoch, and in the last update of a run.
    """
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2")
    result = run_ranks(FAULT_TRAIN, args, processes=2, env={"FAULT": f"other-norm:1:{update}"})
    assert result.returncode != 0
    found = re.search(r"different norms .* order of their ranks ([\d.]+), ([\d.]+): their weights", result.stderr)
    assert float(found[2]) == pytest.approx(2 * float(found[1]), rel=1e-4)
    folder = runs.run_folder(tmp_path)
    assert [path.name for path in sorted(folder.glob("ckpt_epoch_*.pth"))] == left


def test_too_many_nans_in_a_row_end_the_run_with_the_last_checkpoint_good(data, tmp_path):
    args = runs.arguments(data, tmp_path, "TRAIN.MAX_NONFINITE_UPDATES", "1")
    result = run_ranks(FAULT_TRAIN, args, env={"FAULT": "nan:0:5+"})
    assert result.returncode == 2
    assert re.fullmatch(r"fault_train.py: error: update 6 skipped: .* 2 in a row.*", result.stderr.splitlines()[-1])
    state = load_file(runs.run_folder(tmp_path) / "ckpt_epoch_0.pth")
    assert all(torch.isfinite(v).all() for v in state["model"].values() if v.is_floating_point())


def test_a_second_run_in_the_same_folder_is_refused(data, tmp_path):
    args = runs.arguments(data, tmp_path, "TRAIN.EPOCHS", "500")
    with Ranks("train.py", args) as run:
        run.until(r"Train: \[0/500\]\[1/4\]")
        second = run_ranks("train.py", args)
        assert second.returncode == 2
        who = f"process {run.pids[0]} on {socket.gethostname()}"  # the second has not written to the log
        assert f"is being written by {who}; give this run another --tag" in second.stderr
        run.kill()
        run.finish()
    with Ranks("train.py", args) as run:
        run.until(r"Train: \[\d+/500\]\[\d/4\]")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.launch
@pytest.mark.parametrize("launcher", ["torch.distributed.launch", "torch.distributed.run"])
def test_the_released_commands(data, tmp_path, launcher):
    """As the released README has them, but for paths, the number of processes and a smaller network."""
    use_env = ["--use_env"] if launcher.endswith("launch") else []
    head = [sys.executable, "-m", launcher, "--nproc_per_node", "2", "--nnodes", "1", *use_env]
    released = ["--data-path", str(data), "--batch-size", "2", "--output", str(tmp_path), "--cfg"]
    released += ["./configs/groupmixformer_small.yaml", "--model-type", "groupmixformer", "--model-file"]
    released += ["groupmixformer.py", "--tag", "groupmixformer_small"]
    smaller = [
        "--opts",
        *runs.TINY,
        "MODEL.NAME",
        "groupmixformer_small",
        "TRAIN.EPOCHS",
        "1",
        "TRAIN.WARMUP_EPOCHS",
        "0",
    ]
    env = runs.environment()
    train_command = [*head, "--master_port", free_port(), "train.py", *released, *smaller]
    trained = subprocess.run(train_command, cwd=runs.ROOT, env=env, capture_output=True, text=True, timeout=180)
    assert trained.returncode == 0, trained.stderr
    folder = tmp_path / "groupmixformer_small" / "groupmixformer_small"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "curves.png", "log_rank0.txt", "log_rank1.txt", "ckpt_epoch_0.pth", "ckpt_best.pth"} <= names
    assert "groupmixformer.py" in names and any(name.startswith("events.out.tfevents") for name in names)
    weights = ["--resume", str(folder / "ckpt_best.pth")]
    test_command = [*head, "--master_port", free_port(), "test.py", *released, *weights, *smaller]
    tested = subprocess.run(test_command, cwd=runs.ROOT, env=env, capture_output=True, text=True, timeout=180)
    assert tested.returncode == 0, tested.stderr
    assert re.fullmatch(r" \* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3}", tested.stdout.splitlines()[-1])


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
