"""slurm_train.sh, in a made-up checkout: stubs stand in for Python and SLURM."""

import json
import os
import shutil
import signal
import sys

import pytest
from stub_checkout import METACHARACTERS, ROOT, TIMEOUT_SECONDS, Checkout, started_processes, write_executable


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


SRUN = f"""#!{sys.executable}
import json, os, signal, sys
print(json.dumps(sys.argv[1:]), flush=True)
if "STUB_SIGNALS" in os.environ:
    signal.alarm({2 * TIMEOUT_SECONDS})
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    print("ready", flush=True)
    while True:
        signal.pause()
sys.exit(int(os.environ.get("STUB_SRUN_CODE", "0")))
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf '%s\\n' node-a node-b; else echo "scontrol $*"; fi
"""


@pytest.fixture
def slurm(checkout, tmp_path):
    """Starts slurm_train.sh as SLURM does: from a copy elsewhere, in the folder that sbatch was called in."""
    path = tmp_path / "slurm"
    write_executable(path / "srun", SRUN)
    write_executable(path / "scontrol", SCONTROL)
    # The script looks every second whether the step has ended.
    write_executable(path / "sleep", f"#!/usr/bin/env bash\nexec {shutil.which('sleep')} 0.05\n")
    script = shutil.copy(ROOT / "launch_scripts" / "slurm_train.sh", path / "slurm_script")

    def start(*arguments, **environment):
        job = {"SLURM_JOB_ID": "31234", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
        job |= {"SLURM_SUBMIT_DIR": str(checkout.root), "SLURM_CPUS_PER_TASK": "64"}
        environment = checkout.environment(PATH=f"{path}:{os.environ['PATH']}", **{**job, **environment})
        return spawn(["bash", script, *arguments], cwd=tmp_path, env=environment)

    with started_processes() as spawn:
        yield start


def test_slurm_starts_one_launcher_on_each_node(checkout, slurm):
    process = slurm("--", *METACHARACTERS, VARIANT="base", BATCH_SIZE="64", TAG="t", GPUS="4")
    output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, errors
    (argv,) = map(json.loads, output.splitlines())
    launcher = argv.index(str(checkout.python))
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=64"} <= set(argv[:launcher])
    launch = "multi_machine_start.py --machine_num 2 --np 4 --ip node-a --main_port 16234 --retries 3"
    train = "--config configs/groupmixformer_base.yaml --data_path ./datasets/imagenet --output ./output"
    assert argv[launcher + 1 :] == [*f"{launch} {train} --batchsize 64 --tag t --".split(), *METACHARACTERS]


def test_each_task_of_an_array_has_a_run_of_its_own(slurm):
    """SLURM gives the last task the number of the whole array: with that, all tasks would be requeued."""
    array = {"SLURM_ARRAY_JOB_ID": "31234", "SLURM_ARRAY_TASK_ID": "2", "STUB_SRUN_CODE": "75"}
    setup = "EXTRA+=(--opts SEED $SLURM_ARRAY_TASK_ID)"
    for tag, expected in (("", "array_2"), ("seeds", "seeds_2")):
        output, _ = slurm(**array, TAG=tag, SETUP=setup).communicate(timeout=TIMEOUT_SECONDS)
        argv = json.loads(output.splitlines()[0])
        assert argv[argv.index("--tag") + 1 :] == [expected, "--", "--opts", "SEED", "2"]
        assert output.splitlines()[-1] == "scontrol requeue 31234_2"


def test_slurm_gives_the_nodes_what_setup_has_set(slurm):
    """`sbatch --export=NAMES` would otherwise limit what srun passes on."""
    output, _ = slurm(PYTHON=f"{shutil.which('env')} X=1 python", SETUP="true").communicate(timeout=TIMEOUT_SECONDS)
    argv = json.loads(output.splitlines()[0])
    assert "--export=ALL" in argv
    assert argv[argv.index("X=1") - 1 :][:4] == [shutil.which("env"), "X=1", "python", "multi_machine_start.py"]


def test_the_slurm_script_has_lines_for_partition_and_account():
    lines = (ROOT / "launch_scripts" / "slurm_train.sh").read_text().splitlines()
    assert {"##SBATCH --partition=<name>", "##SBATCH --account=<name>"} <= set(lines)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (1, False)])
def test_slurm_requeues_what_was_saved(slurm, code, requeued):
    process = slurm(STUB_SRUN_CODE=str(code))
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == code
    assert ("scontrol requeue 31234" in output) is requeued


@pytest.mark.parametrize(("signals", "requeued"), [(["SIGUSR1"], True), (["SIGTERM", "SIGUSR1"], False)])
def test_slurm_passes_the_warning_on(slurm, signals, requeued):
    """USR1 reaches the step and the job comes back; a job that SLURM ends with TERM is left to SLURM."""
    process = slurm(STUB_SIGNALS="1")
    process.stdout.readline()
    assert process.stdout.readline() == "ready\n"
    for name in signals:
        process.send_signal(signal.Signals[name])
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75
    assert ("scontrol requeue 31234" in output) is requeued


def test_slurm_explains_where_to_submit(slurm, tmp_path):
    process = slurm(SLURM_SUBMIT_DIR=str(tmp_path))
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1 and "CODE_PATH" in errors
