"""multi_machine_start.py as a process: signals, hang-ups and its own end, with a stub for torchrun or the real one."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from stub_checkout import TIMEOUT_SECONDS, Checkout, started_processes


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture
def launch(checkout, tmp_path):
    """Starts the launcher with this code in the place of torchrun."""
    package = tmp_path / "stub" / "torch" / "distributed"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()

    def start(torchrun_code: str | None, *arguments: str, script: str = "", before=(), **environment: str):
        environment = checkout.environment(**environment)
        command = [sys.executable, str(checkout.root / "multi_machine_start.py"), "--np", "2", "--retry_wait", "0"]
        if script:
            command, environment["PYTHON"] = ["bash", str(checkout.root / script)], sys.executable
        if torchrun_code is not None:
            (package / "run.py").write_text(f"import json, os, signal, sys\n{torchrun_code}")
            environment["PYTHONPATH"] = str(package.parents[1])
        return spawn([*before, *command, *arguments], env=environment)

    with started_processes() as spawn:
        yield start


# Says what it got, and reports as train.py does. The alarm ends what a failing test would leave behind.
SAY_WHICH_SIGNAL = (
    f"signal.alarm({2 * TIMEOUT_SECONDS})"
    + """
def stop(signum, frame):
    os.write(1, signal.Signals(signum).name.encode() + bytes([10]))  # print may be what the signal interrupted
    if "SAVED" in os.environ:
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if path is None:  # in the place of torchrun: report as its worker
            path = os.path.join(os.environ["PET_LOG_DIR"], "none_x", "attempt_0", "0", "error.json")
            os.makedirs(os.path.dirname(path))
        report = {"message": "saved", "errorCode": 75, "extraInfo": {"py_callstack": "saved", "timestamp": 1}}
        json.dump({"message": report}, open(path, "w"))
    os._exit(1)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, stop)
os.write(1, f"ready {os.getpid()}\\n".encode())  # print may write a line in pieces, between those of another process
while True:
    signal.pause()
"""
)


def test_torchrun_sees_its_environment(launch):
    """It has a process group of its own: a terminal's Ctrl-C would reach it twice in the launcher's."""
    names = ("CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "OMP_NUM_THREADS")
    code = f"print([os.environ.get(name) for name in {names}], os.getcwd(), os.getpgid(0) == os.getpgid(os.getppid()))"
    process = launch(code, "--vis_gpu", "3,1", NCCL_DEBUG="INFO", OMP_NUM_THREADS="5")
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert output.startswith("['3,1', 'INFO', '5'] ") and output.endswith("a checkout False\n")


@pytest.mark.parametrize(("name", "saved"), [("SIGTERM", False), ("SIGINT", True), ("SIGHUP", True), ("SIGUSR1", True)])
def test_signals_are_forwarded_and_not_retried(launch, name, saved):
    process = launch(SAY_WHICH_SIGNAL, "--retries", "3", **({"SAVED": "1"} if saved else {}))
    assert process.stdout.readline().startswith("ready")
    process.send_signal(signal.Signals[name])
    output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert output == f"{name}\n", errors
    assert process.returncode == (75 if saved else 128 + signal.Signals[name])


def test_a_script_of_training_ends_with_75_once_it_has_saved(launch):
    """Not with torchrun's 1; and torchrun gets the arguments of the launcher."""
    process = launch(SAY_WHICH_SIGNAL, script="launch_scripts/run_train.sh", GPUS="2", SAVED="1")
    assert process.stdout.readline().startswith("ready")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert output == "SIGTERM\n" and process.returncode == 75, errors
    assert "--standalone train.py --cfg=configs/groupmixformer_small.yaml" in errors


def test_a_signal_ends_the_wait_before_a_retry(launch):
    process = launch("sys.exit(1)", "--retries", "1", "--retry_wait", "3600")
    while "starting it again" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM


def test_torchrun_does_not_outlive_the_launcher(launch):
    process = launch(SAY_WHICH_SIGNAL)
    assert process.stdout.readline().startswith("ready")
    process.kill()
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)  # ends when torchrun has closed its end of the pipe
    assert output == "SIGTERM\n"


@pytest.mark.launch
def test_under_nohup_a_lost_connection_ends_nothing(launch, checkout):
    """torchrun handles SIGHUP by default, for itself and for its workers, which then no longer ignore it."""
    (checkout.root / "train.py").write_text(f"import json, os, signal\n{SAY_WHICH_SIGNAL}")
    process = launch(None, "--np", "1", SAVED="1", before=[shutil.which("nohup")])
    worker = int(process.stdout.readline().removeprefix("ready "))
    torchrun = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    for pid in (process.pid, torchrun, worker):
        os.kill(pid, signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert (process.returncode, output) == (75, "SIGTERM\n"), errors


@pytest.mark.launch
def test_a_signal_reaches_the_workers_of_the_real_torchrun(launch, checkout):
    """SIGUSR1, which kills a torchrun that is not told of it; the workers' 75 comes back."""
    (checkout.root / "train.py").write_text(f"import json, os, signal\n{SAY_WHICH_SIGNAL}")
    process = launch(None, "--retries", "3", SAVED="1")
    for _ in range(2):
        assert process.stdout.readline().startswith("ready")
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75, errors
    assert output.count("SIGUSR1") == 2
