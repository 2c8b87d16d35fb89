"""multi_machine_start.py: its arguments and its command in this process, its supervision with a stub for torchrun."""

import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path
from string import Template
from types import SimpleNamespace

import pytest
from stub_checkout import METACHARACTERS, ROOT, Checkout
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from utils import failures

spec = importlib.util.spec_from_file_location("multi_machine_start", ROOT / "multi_machine_start.py")
multi_machine_start = importlib.util.module_from_spec(spec)
spec.loader.exec_module(multi_machine_start)

TORCHRUN_SETTINGS = ("PET_SIGNALS_TO_HANDLE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


# ----------------------------------------------------------------------------------------------- arguments and command
@pytest.fixture
def no_rank(monkeypatch):
    module = multi_machine_start
    own = ("SLURM_LOCALID", *TORCHRUN_SETTINGS)
    for name in (*module.NODE_RANK_VARIABLES, *module.ADDRESS_VARIABLES, *module.PORT_VARIABLES, *own):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "is_ignored", lambda number: False)  # the tests may run under nohup


@pytest.fixture
def dry_run(checkout, capsys, no_rank):
    """The command that these arguments give, as the list of arguments that a shell would make of the printed line."""

    def run(*arguments: str) -> list[str]:
        code_path = ["--code_path", str(checkout.root), "--np", "2", "--dry_run"]
        assert multi_machine_start.main([*code_path, *arguments]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        return shlex.split(line)

    return run


@pytest.fixture
def refusal(checkout, capsys, no_rank):
    """The line that refuses these arguments."""

    def run(*arguments: str) -> str:
        assert multi_machine_start.main(["--code_path", str(checkout.root), *arguments, "--dry_run"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def test_command_with_the_released_flags(checkout, dry_run):
    released = "--np 4 --ip 10.0.0.1 --main_port 12345 --machine_num 3 --vis_gpu 0,1,2,3 --tag t --output out"
    released += " --data_path /data --config configs/groupmixformer_tiny.yaml --batchsize 64 --node_rank 2"
    settings = ["PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGQUIT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90"]
    launch = "-m torch.distributed.run --nnodes 3 --node_rank 2 --nproc_per_node 4 --master_addr 10.0.0.1"
    train = "--master_port 12345 train.py --cfg=configs/groupmixformer_tiny.yaml --data-path=/data --output=out"
    assert dry_run(*released.split()) == [
        *["env", "-C", str(checkout.root), *settings, "CUDA_VISIBLE_DEVICES=0,1,2,3", sys.executable],
        *f"{launch} {train} --tag=t --batch-size=64".split(),
    ]


def test_command_of_a_single_node(dry_run):
    command = dry_run()
    assert "--standalone" in command and "--master_port" not in command
    data_and_output = ["--data-path=./datasets/imagenet", "--output=./output"]
    train = command[command.index("train.py") :]
    assert train == ["train.py", "--cfg=configs/groupmixformer_small.yaml", *data_and_output]
    command = dry_run("--main_port", "12345")
    assert "--standalone" not in command and command[command.index("--master_port") + 1] == "12345"


def test_hyphens_are_as_good_as_underscores(dry_run):
    words = "--machine_num 2 --node_rank 1 --main_port 5 --ip a --data_path d"
    assert dry_run(*words.split()) == dry_run(*words.replace("_", "-").split())


def test_no_argument_is_taken_for_a_command(dry_run):
    command = dry_run("--tag", "; rm -rf x", "--data_path=$(touch x)", "--output", "a b", "--", *METACHARACTERS)
    # torchrun expands the arguments of its workers like this.
    arguments = [Template(argument).safe_substitute(local_rank="0") for argument in command]
    assert arguments[-len(METACHARACTERS) :] == METACHARACTERS
    assert {"--tag=; rm -rf x", "--data-path=$(touch x)", "--output=a b"} <= set(arguments)


def test_what_the_user_has_set_stays(dry_run, monkeypatch):
    for name in TORCHRUN_SETTINGS:
        monkeypatch.setenv(name, "7")
    assert dry_run()[3] == sys.executable


@pytest.mark.parametrize(
    ("flag", "environment", "rank"),
    [
        (2, {"SLURM_NODEID": "1"}, 2),
        (None, {"SLURM_NODEID": "1", "SLURM_PROCID": "3", "NODE_RANK": "0"}, 1),
        (None, {"NODE_RANK": "0", "PET_NODE_RANK": "1"}, 0),
        (None, {"PET_NODE_RANK": "1", "GROUP_RANK": "2"}, 1),
        (None, {"GROUP_RANK": "2", "MACHINE_RANK": "1"}, 2),
        (None, {"MACHINE_RANK": "1", "NODE_RANK": ""}, 1),
    ],
)
def test_node_rank(flag, environment, rank):
    assert multi_machine_start.resolve_node_rank(flag, 3, environment) == rank


def test_the_address_and_port_of_node_0_may_come_from_the_environment(dry_run, monkeypatch):
    nodes = ["--machine_num", "2", "--node_rank", "1"]
    for name, value in (("PET_MASTER_ADDR", "10.0.0.9"), ("PET_MASTER_PORT", "3"), ("MASTER_ADDR", "10.0.0.1")):
        monkeypatch.setenv(name, value)

    def meets_at(*flags):
        command = dry_run(*nodes, *flags)
        return command[command.index("--master_addr") + 1], command[command.index("--master_port") + 1]

    assert meets_at() == ("10.0.0.1", "3")
    monkeypatch.setenv("MASTER_PORT", "12345")
    assert meets_at() == ("10.0.0.1", "12345")
    assert meets_at("--ip", "a", "--main_port", "5") == ("a", "5")
    assert "--standalone" in dry_run(), "a single node may be a part of that job"


def test_a_dry_run_names_what_is_not_on_this_machine(checkout, capsys, no_rank):
    def missing(*arguments):
        assert multi_machine_start.main(["--code_path", str(checkout.root), "--np", "1", "--dry_run", *arguments]) == 0
        return [line.split(" (relative")[0] for line in capsys.readouterr().err.splitlines()]

    (checkout.root / "here").mkdir()
    begin = "multi_machine_start.py: "
    assert missing() == [f"{begin}--data_path: not on this machine: ./datasets/imagenet"]
    assert missing("--data_path", "here") == []
    assert missing("--data_path", "there", "--", "--data-path=here", "--tag", "--resume", "here") == []
    weights = ["--pretrained", "a.pth", "--opts", "MODEL.RESUME", "b.pth", "DATA.DATA_PATH", "here"]
    named = ["--pretrained: not on this machine: a.pth", "--resume: not on this machine: b.pth"]
    assert missing("--", *weights) == [begin + line for line in named]


def test_a_single_node_is_node_0_wherever_it_runs():
    assert multi_machine_start.resolve_node_rank(None, 1, {"SLURM_NODEID": "5"}) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--np 0", ["--np", "at least 1", "'0'"]),
        ("--np -2", ["--np", "at least 1", "'-2'"]),
        ("--machine_num 0", ["--machine_num", "'0'"]),
        ("--main_port 70000", ["--main_port", "from 1 to 65535", "'70000'"]),
        ("--batchsize x", ["--batchsize", "'x'"]),
        ("--retries -1", ["--retries", "at least 0"]),
        ("--config absent.yaml", ["--config", "no such file", "absent.yaml"]),
        ("--code_path absent", ["--code_path", "no such folder", "absent"]),
        ("--code_path .", ["--code_path", "no train.py"]),
        ("--vis_gpu 0,1 --np 3", ["--vis_gpu", "2 GPUs", "--np 3"]),
        ("--machine_num 2 --node_rank 0", ["--ip: needed", "MASTER_ADDR"]),
        ("--machine_num 2 --ip a", ["--node_rank", "SLURM_NODEID", "NODE_RANK"]),
        ("--machine_num 2 --ip a --node_rank 2", ["--node_rank", "out of range", "0 to 1"]),
        ("--node_rank 1", ["--node_rank", "out of range"]),
        ("--machine_num 2 --node_rank 0 --ip=", ["--ip"]),
        ("--cfg=a.yaml", ["unknown argument --cfg; "]),
        ("--machine 2", ["--machine", "unknown argument"]),
        ("--opts A 1", ["--opts", "after --"]),
        ("stray", ["unknown argument stray"]),
    ],
)
def test_wrong_arguments_are_named(refusal, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    line = refusal(*arguments.split())
    assert line.startswith("multi_machine_start.py: ")
    for word in words:
        assert word in line


def test_wrong_environment_is_named(refusal, monkeypatch):
    several = ["--machine_num", "2", "--ip", "a", "--np", "1"]
    monkeypatch.setenv("NODE_RANK", "2")
    assert "NODE_RANK: 2 is out of range" in refusal(*several)
    monkeypatch.setenv("NODE_RANK", "first")
    assert "NODE_RANK: must be a whole number from 0 to 1, not 'first'" in refusal(*several)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert "--ntasks-per-node=1" in refusal(*several)
    monkeypatch.delenv("SLURM_LOCALID")
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "0")
    assert "MASTER_PORT: must be a whole number from 1 to 65535, not '0'" in refusal(*several)


# ------------------------------------------------------------------------- supervision, with a function for torchrun


@pytest.fixture
def supervise(monkeypatch, tmp_path):
    """Runs the launcher in this process; returns its exit code and its lines.

    Each start of torchrun lasts so many seconds and ends with a code. Before that it leaves reports as `leave_report`
    does, for each of them (local rank, line, code, time).
    """
    clock = SimpleNamespace(now=0.0)
    lines = []
    monkeypatch.setattr(multi_machine_start, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(multi_machine_start, "log", lines.append)
    monkeypatch.delenv("PET_LOG_DIR", raising=False)

    def run(starts, *flags, worker_started=True):
        starts = list(starts)

        def run_once(command, code_path, environment, *rest):
            seconds, code, *reports = starts.pop(0)
            clock.now += seconds
            if worker_started:
                attempt = Path(environment["PET_LOG_DIR"], "none_x", "attempt_0")
                attempt.mkdir(parents=True)
                for local_rank, *report in reports:
                    write_report(monkeypatch, attempt, local_rank, *report)
            return code, None

        monkeypatch.setattr(multi_machine_start, "run_once", run_once)
        code = multi_machine_start.main(["--code_path", str(ROOT), "--np", "2", "--retry_wait", "0", *flags])
        return code, lines, len(starts)

    return run


def write_report(monkeypatch, attempt, local_rank, line, code=None, written_at=1.0):
    file = attempt / str(local_rank) / "error.json"
    file.parent.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        patch.setattr(failures, "time", SimpleNamespace(time=lambda: written_at))
        failures.leave_report(line, code)
    return file


@pytest.mark.parametrize(("retries", "codes", "code"), [(0, [0], 0), (0, [1], 1), (2, [1, 1, 0], 0), (2, [1, 1, 9], 9)])
def test_retries(supervise, no_rank, retries, codes, code):
    result, lines, left = supervise([(1, number) for number in codes], "--retries", str(retries))
    assert (result, left) == (code, 0)
    assert sum("starting it again" in line for line in lines) == len(codes) - 1
    assert (retries > 0 and code > 0) == lines[-1].endswith("; no retries left")


@pytest.mark.parametrize(
    ("code", "end"), [(75, "start it again to continue"), (2, "cause; fix this before restarting")]
)
def test_a_saved_run_and_a_mistake_are_not_retried(supervise, no_rank, code, end):
    result, lines, left = supervise([(1, 1, (0, "cause", code)), (1, 0)], "--retries", "3")
    assert (result, left) == (code, 1) and lines[-1].endswith(end)


def test_the_last_line_repeats_the_first_failure(supervise, no_rank):
    reports = [(0, "process 1 was lost", None, 1764.5), (1, "no space", None, 1764.25), (2, "lost too", None, 1765)]
    result, lines, _ = supervise([(1, 1, *reports)])
    assert (result, lines[-1]) == (1, "node 0: torchrun ended with code 1: no space")


def test_each_start_has_its_own_cause(supervise, no_rank):
    _, lines, _ = supervise([(1, 1, (0, "first cause")), (1, 1)], "--retries", "1")
    assert "first cause" in lines[-2] and "first cause" not in lines[-1]


@pytest.mark.parametrize(("lasted", "starts"), [(3599, 3), (3600, 5)])
def test_a_long_run_renews_the_retries(supervise, no_rank, lasted, starts):
    """Three starts that last so long before they fail, then some that fail at once: retries count faults in a row."""
    *_, left = supervise([(lasted, 1)] * 3 + [(1, 1)] * 7, "--retries", "2")
    assert 10 - left == starts


def test_a_meeting_that_fails_names_address_and_port(supervise, no_rank):
    _, lines, _ = supervise([(1, 1)], "--main_port", "1234", worker_started=False)
    assert "at 127.0.0.1:1234, or node 0 cannot use that port; " in lines[-1]


def test_the_report_of_a_worker(monkeypatch, tmp_path):
    """The launcher reads the last attempt of torchrun's own restarts, and torchrun can read the file as well."""
    run = tmp_path / "none_x"
    for number, line in enumerate(["first attempt", "last attempt"]):
        file = write_report(monkeypatch, run / f"attempt_{number}", 0, line, 75)
        os.utime(run / f"attempt_{number}", (number, number))
    (run / "attempt_1" / "1").mkdir()
    (run / "attempt_1" / "1" / "error.json").write_text('{"message"')  # another program's, on a full disk
    assert multi_machine_start.read_report(tmp_path) == ("last attempt", 75)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=75, error_file=str(file))
    assert failure.message["extraInfo"]["py_callstack"] == "last attempt"
    assert json.loads(file.read_text()) == failure.error_file_data
