"""The launch scripts and multi_machine_start.py, in a made-up checkout: stubs stand in for Python, torchrun and SLURM.

Nothing is installed and torch is not imported, except by the one test marked launch. Tests that need a process to be
ready read a line from it.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch_scripts").glob("*.sh"))
VARIANTS = ["base", "digits", "large", "miny", "small", "tiny"]
METACHARACTERS = ["; rm -rf x", "$(touch x)", "`touch x`", "a b", "*", "$HOME", "$$", "${local_rank}", "--", ""]
TIMEOUT_SECONDS = 60

# Stands in for the Python that the scripts start: notes how it was called, and does of its work what the scripts need.
STUB = """
import json, os, shutil, sys
from pathlib import Path
wrapper, *argv = sys.argv[1:]
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps({"python": wrapper, "argv": argv, "cwd": os.getcwd()}) + "\\n")
call = " ".join(argv)
if "print(*sys.version_info" in call:
    print(os.environ.get("STUB_VERSION", "3 11"))
elif "import torch" in call:
    print(os.environ["STUB_GPUS"]) if "STUB_GPUS" in os.environ else sys.exit(1)
elif "import venv" in call:
    sys.exit("STUB_WITHOUT_VENV" in os.environ)
elif argv[:2] == ["-m", "venv"]:
    Path(argv[-1], "bin").mkdir(parents=True, exist_ok=True)
    shutil.copy(wrapper, Path(argv[-1], "bin", "python"))
elif argv[:3] == ["-m", "pip", "install"]:
    sys.exit(int(os.environ.get("STUB_PIP_CODE", "0")))
elif argv[0] in ("-c", "-"):
    code = argv[1] if argv[0] == "-c" else sys.stdin.read()
    sys.argv = ["-c", *argv[2 if argv[0] == "-c" else 1:]]
    sys.version_info = tuple(map(int, os.environ.get("STUB_VERSION", "3 11").split()))
    exec(code)
"""


def write_executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Checkout:
    """A copy of the launchers with empty configs, train.py and test.py, and a stub for Python."""

    def __init__(self, folder: Path):
        self.root = folder / "a checkout"
        self.log = folder / "calls.jsonl"
        shutil.copytree(ROOT / "launch_scripts", self.root / "launch_scripts")
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        shutil.copy(ROOT / "multi_machine_start.py", self.root)
        (self.root / "configs").mkdir()
        for variant in VARIANTS:
            (self.root / "configs" / f"groupmixformer_{variant}.yaml").touch()
        for name in ("train.py", "test.py"):
            (self.root / name).touch()
        (self.root / "requirements.txt").write_text("# needed\npytest>=1\n")
        (self.root / "requirements-dev.txt").write_text("pytest\n")
        stub = folder / "stub.py"
        stub.write_text(STUB)
        command = shlex.join([sys.executable, "-I", str(stub)])
        self.python = write_executable(
            folder / "bin" / "python-stub", f'#!/usr/bin/env bash\nexec {command} "$0" "$@"\n'
        )

    def environment(self, **extra: str) -> dict[str, str]:
        # From scratch: a PYTHON, GPUS or SLURM variable of the caller would change what is tested.
        own = {"PATH": os.environ["PATH"], "HOME": str(self.log.parent), "STUB_LOG": str(self.log)}
        return {**own, "TMPDIR": str(self.log.parent), "PYTHON": str(self.python), **extra}

    def run(self, script: str, *arguments: str, cwd: Path | None = None, **environment: str):
        return subprocess.run(
            ["bash", str(self.root / script), *arguments],
            cwd=cwd or self.root,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )

    def calls(self) -> list[list[str]]:
        """The arguments of each start of Python so far, but for the scripts' own small questions; forgets them."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        argvs = [json.loads(line)["argv"] for line in lines]
        return [argv for argv in argvs if argv[0] not in ("-c", "-") and argv != ["-m", "pip", "--version"]]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def assert_one_line(result, *words: str):
    """It failed, and said so in one line that holds these words."""
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# All scripts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_script_is_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=TIMEOUT_SECONDS)


@pytest.mark.parametrize(
    "file", [*SCRIPTS, ROOT / ".ci" / "run", ROOT / "multi_machine_start.py"], ids=lambda path: path.name
)
def test_script_kills_nothing_by_name(file):
    assert not re.search(r"\bkillall\b|\bpkill\b|\bkill\s+-(9|KILL|SIGKILL)\b|\bfuser\b", file.read_text())


def test_help_is_the_comment_at_the_top(checkout):
    for script in SCRIPTS:
        if script.name not in ("common.sh", "slurm_train.sh"):
            result = checkout.run(f"launch_scripts/{script.name}", "--help")
            assert result.returncode == 0, result.stderr
            assert f"bash launch_scripts/{script.name}" in result.stdout
            assert "set -euo" not in result.stdout
    assert checkout.calls() == []


# ---------------------------------------------------------------------------------------------------------------------
# run_train.sh, run_eval.sh
# ---------------------------------------------------------------------------------------------------------------------

RUNS = [("launch_scripts/run_train.sh", "train.py"), ("launch_scripts/run_eval.sh", "test.py")]


def started(processes: str, script: str, config: str, data_path: str, output: str = "./output") -> list[str]:
    """Training goes through the launcher, which ends with 75 once the run has saved; evaluation has no such end.

    One process that evaluates runs by itself: torchrun would print a traceback below the cause of a failure.
    """
    if script == "train.py":
        launch = ["multi_machine_start.py", "--machine_num", "1", "--np", processes, "--config", config]
        return [*launch, "--data_path", data_path, "--output", output, "--"]
    launch = [] if processes == "1" else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    return [*launch, script, "--cfg", config, "--data-path", data_path, "--output", output]


@pytest.mark.parametrize(("script", "program"), RUNS)
def test_run_without_arguments(checkout, tmp_path, script, program):
    assert checkout.run(script, cwd=tmp_path, STUB_GPUS="3").returncode == 0
    folder = json.loads(checkout.log.read_text().splitlines()[-1])["cwd"]
    assert folder == str(checkout.root)
    assert checkout.calls() == [started("3", program, "configs/groupmixformer_small.yaml", "./datasets/imagenet")]


@pytest.mark.parametrize(("script", "program"), RUNS)
def test_run_with_the_released_two_arguments(checkout, tmp_path, script, program):
    other = tmp_path / "other code"
    shutil.copytree(checkout.root, other)
    (other / "configs" / "groupmixformer_mine.yaml").touch()
    result = checkout.run(script, "some root", "other code", cwd=tmp_path, GPUS="2", VARIANT="mine")
    assert result.returncode == 0, result.stderr
    assert json.loads(checkout.log.read_text().splitlines()[-1])["cwd"] == str(other)
    data_path = f"{tmp_path}/some root/data/ILSVRC/Data/CLS-LOC"
    assert checkout.calls() == [started("2", program, "configs/groupmixformer_mine.yaml", data_path)]


@pytest.mark.parametrize(("script", "program"), RUNS)
def test_run_takes_its_settings_from_the_environment(checkout, script, program):
    (checkout.root / "my.yaml").touch()
    settings = {
        "CFG": "my.yaml",
        "DATA_PATH": "/my data",
        "OUTPUT": "runs",
        "GPUS": "1",
        "BATCH_SIZE": "64",
        "TAG": "a b",
    }
    result = checkout.run(script, "--", *METACHARACTERS, **settings)
    assert result.returncode == 0, result.stderr
    expected = started("1", program, "my.yaml", "/my data", "runs")
    assert checkout.calls() == [[*expected, "--batch-size", "64", "--tag", "a b", *METACHARACTERS]]


def test_one_process_that_evaluates_is_in_no_group_of_another_launcher(checkout):
    variables = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    python = write_executable(
        checkout.log.parent / "bin" / "says", '#!/usr/bin/env bash\necho "${RANK-}${LOCAL_RANK-}${WORLD_SIZE-}"\n'
    )
    result = checkout.run("launch_scripts/run_eval.sh", PYTHON=str(python), GPUS="1", **variables)
    assert (result.returncode, result.stdout) == (0, "\n"), result.stderr


def test_run_of_training_ends_with_75_once_it_has_saved(launch, checkout):
    """Not with torchrun's 1; and what the launcher is given reaches torchrun."""
    process = launch(SAY_WHICH_SIGNAL, script="launch_scripts/run_train.sh", GPUS="2", SAVED="1")
    assert process.stdout.readline().startswith("ready")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert output == "SIGTERM\n" and process.returncode == 75, errors
    assert "--standalone train.py --cfg=configs/groupmixformer_small.yaml" in errors


def test_run_prefers_the_checkouts_environment(checkout):
    python = write_executable(checkout.root / ".venv" / "bin" / "python", checkout.python.read_text())
    assert checkout.run("launch_scripts/run_train.sh", PYTHON="", GPUS="1").returncode == 0
    assert json.loads(checkout.log.read_text())["python"] == str(python)


def test_run_explains_what_is_wrong(checkout):
    script = "launch_scripts/run_train.sh"
    assert_one_line(checkout.run(script, GPUS="1", VARIANT="huge"), "huge", " ".join(VARIANTS))
    assert_one_line(checkout.run(script, GPUS="1", CFG="absent.yaml"), "absent.yaml")
    assert_one_line(checkout.run(script, GPUS="0"), "GPUS")
    assert_one_line(checkout.run(script), "cannot import torch", "setup_env.sh")
    assert_one_line(checkout.run(script, PYTHON="/absent/python"), "/absent/python")
    assert_one_line(checkout.run(script, "--tag", "x"), "--tag", "after --")
    assert_one_line(checkout.run(script, "a", ".", "c"), "too many arguments")
    assert_one_line(checkout.run(script, "a", "configs", GPUS="1"), "no train.py")
    assert checkout.calls() == []


# ---------------------------------------------------------------------------------------------------------------------
# run_cal_flops.sh, test_throughput.sh
# ---------------------------------------------------------------------------------------------------------------------

MEASUREMENTS = [("launch_scripts/run_cal_flops.sh", "--flops"), ("launch_scripts/test_throughput.sh", "--throughput")]


@pytest.mark.parametrize(("script", "flag"), MEASUREMENTS)
def test_measurement(checkout, tmp_path, script, flag):
    def measured(*arguments, **environment):
        result = checkout.run(script, *arguments, cwd=tmp_path, **environment)
        assert result.returncode == 0, result.stderr
        calls = checkout.calls()
        assert all(call[:2] == ["test.py", "--cfg"] and call[3] == flag for call in calls)
        return [(call[2], *call[4:]) for call in calls]

    assert measured() == [("configs/groupmixformer_small.yaml",)]
    assert measured("tiny", "--", "a b") == [("configs/groupmixformer_tiny.yaml", "a b")]
    assert measured(VARIANT="base") == [("configs/groupmixformer_base.yaml",)]
    assert measured("large", VARIANT="base", CFG="x.yaml") == [("configs/groupmixformer_large.yaml",)]
    published = ["miny", "tiny", "small", "base", "large"]
    assert measured("all") == [(f"configs/groupmixformer_{variant}.yaml",) for variant in published]
    assert_one_line(checkout.run(script, "huge"), "huge", " ".join(VARIANTS))


# ---------------------------------------------------------------------------------------------------------------------
# setup_env.sh, quickstart.sh, run_tests.sh
# ---------------------------------------------------------------------------------------------------------------------

SETUP = "launch_scripts/setup_env.sh"


def make_venv(checkout) -> list[str]:
    return ["-m", "venv", "--clear", f"{checkout.root}/.venv"]


def install(checkout, file: str) -> list[str]:
    return ["-m", "pip", "install", "--disable-pip-version-check", "-r", f"{checkout.root}/{file}"]


def test_setup_installs_once(checkout, tmp_path):
    result = checkout.run(SETUP, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"Ready: {checkout.root}/.venv/bin/python"
    assert checkout.calls() == [make_venv(checkout), install(checkout, "requirements.txt")]

    assert checkout.run(SETUP).returncode == 0
    assert checkout.calls() == []

    assert checkout.run(SETUP, "dev").returncode == 0
    assert checkout.calls() == [install(checkout, "requirements-dev.txt")]

    (checkout.root / "requirements.txt").write_text("pytest\nruff\n")
    assert checkout.run(SETUP).returncode == 0
    assert checkout.calls() == [install(checkout, "requirements.txt")]

    # Another Python below the same environment does not see what was installed for the old one.
    assert checkout.run(SETUP, STUB_VERSION="3 12").returncode == 0
    assert checkout.calls() == [install(checkout, "requirements.txt")]


def test_setup_redoes_an_interrupted_install(checkout):
    (checkout.root / ".venv" / "bin").mkdir(parents=True)  # as an interrupted `python -m venv` leaves it
    result = checkout.run(SETUP, STUB_PIP_CODE="1")
    assert_one_line(result, "requirements.txt", "run it again")
    assert checkout.calls() == [make_venv(checkout), install(checkout, "requirements.txt")]
    assert checkout.run(SETUP).returncode == 0
    assert checkout.calls() == [install(checkout, "requirements.txt")]


def test_setup_finds_a_newer_python(checkout, tmp_path):
    old = f'#!/usr/bin/env bash\nSTUB_VERSION="3 8" exec "{checkout.python}" "$@"\n'
    write_executable(tmp_path / "path" / "python3", old)
    path = f"{tmp_path}/path:/usr/bin:/bin"
    write_executable(tmp_path / "path" / "python3.19", checkout.python.read_text())
    result = checkout.run(SETUP, PYTHON="", PATH=path)
    assert result.returncode == 0, result.stderr
    assert "python3.19" in result.stdout


def test_setup_explains_what_is_missing(checkout, tmp_path):
    assert_one_line(checkout.run(SETUP, STUB_VERSION="3 9"), "Python 3.9, too old", "3.10 or newer")
    assert_one_line(checkout.run(SETUP, STUB_WITHOUT_VENV="1"), "ensurepip", "NO_VENV=1")
    assert_one_line(checkout.run(SETUP, PYTHON="/absent/python"), "/absent/python", "3.10 or newer")
    assert_one_line(checkout.run(SETUP, "develop"), "develop")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "env", "dirname", "basename", "sed"):
        (tools / tool).symlink_to(shutil.which(tool))
    assert_one_line(checkout.run(SETUP, PYTHON="", PATH=str(tools)), "no python3 found", "3.10 or newer")
    assert not (checkout.root / ".venv").exists()


def test_setup_leaves_a_working_environment_of_the_user(checkout):
    python = write_executable(checkout.root / ".venv" / "bin" / "python", checkout.python.read_text())
    assert checkout.run(SETUP).returncode == 0
    assert checkout.calls() == [install(checkout, "requirements.txt")]
    assert_one_line(checkout.run(SETUP, STUB_VERSION="3 8"), "too old", "remove it")
    assert python.exists()


def test_setup_without_venv_uses_the_interpreter_as_it_is(checkout):
    result = checkout.run(SETUP, NO_VENV="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"Ready: {checkout.python}\n"
    (checkout.root / "requirements.txt").write_text("pytest\nno-such-package-1 >= 2\nno_such_package_2\n")
    assert_one_line(checkout.run(SETUP, NO_VENV="1"), "lacks: no-such-package-1 no_such_package_2 ", "-m pip install")
    assert checkout.calls() == []
    assert not (checkout.root / ".venv").exists()


def test_quickstart(checkout, tmp_path):
    result = checkout.run("launch_scripts/quickstart.sh", "--opts", "TRAIN.EPOCHS", "1", cwd=tmp_path, NO_VENV="1")
    assert result.returncode == 0, result.stderr
    flags = ["--cfg", "configs/groupmixformer_digits.yaml", "--data-path", "datasets/digits", "--output", "output"]
    flags += ["--tag", "quickstart", "--opts", "TRAIN.EPOCHS", "1"]
    assert checkout.calls() == [
        ["-m", "tools.digits", "--output", "datasets/digits"],
        ["train.py", *flags],
        ["test.py", *flags, "--resume", "output/groupmixformer_digits/quickstart/ckpt_best.pth"],
    ]
    folder = f"{checkout.root}/output/groupmixformer_digits/quickstart"
    *_, run_folder, tensorboard = result.stdout.splitlines()
    assert run_folder == f"Run folder: {folder}"
    assert shlex.split(tensorboard)[-2:] == ["--logdir", folder]


def test_quickstart_into_another_folder(checkout, tmp_path):
    result = checkout.run("launch_scripts/quickstart.sh", NO_VENV="1", OUTPUT=str(tmp_path), TAG="b", DATA_PATH="d")
    assert result.returncode == 0, result.stderr
    weights = f"{tmp_path}/groupmixformer_digits/b/ckpt_best.pth"
    assert checkout.calls()[-1][-8:] == [
        "--data-path",
        "d",
        "--output",
        str(tmp_path),
        "--tag",
        "b",
        "--resume",
        weights,
    ]


def test_run_tests(checkout, tmp_path):
    lint = [["-m", "ruff", "check", "."], ["-m", "ruff", "format", "--check", "."]]
    for script, arguments, pytest_arguments in [
        ("launch_scripts/run_tests.sh", [], []),
        ("launch_scripts/run_tests.sh", ["-k", "a or b"], ["-k", "a or b"]),
        ("launch_scripts/run_tests.sh", ["--long", "-x"], ["-m", "", "-x"]),
        (".ci/run", [], ["-m", ""]),
    ]:
        result = checkout.run(script, *arguments, cwd=tmp_path, NO_VENV="1")
        assert result.returncode == 0, result.stderr
        assert checkout.calls() == [*lint, ["-m", "pytest", *pytest_arguments]]


# ---------------------------------------------------------------------------------------------------------------------
# slurm_train.sh
# ---------------------------------------------------------------------------------------------------------------------

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
    script = shutil.copy(ROOT / "launch_scripts" / "slurm_train.sh", path / "slurm_script")
    started = []

    def start(*arguments, **environment):
        job = {"SLURM_JOB_ID": "31234", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
        job |= {"SLURM_SUBMIT_DIR": str(checkout.root), "SLURM_CPUS_PER_TASK": "64"}
        environment = checkout.environment(PATH=f"{path}:{os.environ['PATH']}", **{**job, **environment})
        process = subprocess.Popen(
            ["bash", script, *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=TIMEOUT_SECONDS)


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


# ---------------------------------------------------------------------------------------------------------------------
# multi_machine_start.py: arguments
# ---------------------------------------------------------------------------------------------------------------------

spec = importlib.util.spec_from_file_location("multi_machine_start", ROOT / "multi_machine_start.py")
multi_machine_start = importlib.util.module_from_spec(spec)
spec.loader.exec_module(multi_machine_start)


@pytest.fixture
def no_rank(monkeypatch):
    for name in (*multi_machine_start.NODE_RANK_VARIABLES, "SLURM_LOCALID", *multi_machine_start.TORCHRUN_DEFAULTS):
        monkeypatch.delenv(name, raising=False)


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
        with pytest.raises(SystemExit) as ending:
            multi_machine_start.main(["--code_path", str(checkout.root), *arguments, "--dry_run"])
        assert ending.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def test_command_with_the_released_flags(checkout, dry_run):
    released = "--np 4 --ip 10.0.0.1 --main_port 12345 --machine_num 3 --vis_gpu 0,1,2,3 --tag t --output out"
    released += " --data_path /data --config configs/groupmixformer_tiny.yaml --batchsize 64 --node_rank 2"
    settings = ["PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90"]
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
    hyphens = dry_run("--machine-num", "2", "--node-rank", "1", "--main-port", "5", "--ip", "a", "--data-path", "d")
    assert hyphens == dry_run(
        "--machine_num", "2", "--node_rank", "1", "--main_port", "5", "--ip", "a", "--data_path", "d"
    )


def test_no_argument_is_taken_for_a_command(dry_run):
    from string import Template  # what torchrun expands the arguments of its workers with

    command = dry_run("--tag", "; rm -rf x", "--data_path=$(touch x)", "--output", "a b", "--", *METACHARACTERS)
    arguments = [Template(argument).safe_substitute(local_rank="0") for argument in command]
    assert arguments[-len(METACHARACTERS) :] == METACHARACTERS
    assert {"--tag=; rm -rf x", "--data-path=$(touch x)", "--output=a b"} <= set(arguments)


def test_what_the_user_has_set_stays(dry_run, monkeypatch):
    for name in multi_machine_start.TORCHRUN_DEFAULTS:
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


def test_a_single_node_is_node_0_wherever_it_runs():
    assert multi_machine_start.resolve_node_rank(None, 1, {"SLURM_NODEID": "5"}) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--np 0", ["--np", "at least 1", "'0'"]),
        ("--np -2", ["--np", "at least 1", "'-2'"]),
        ("--machine_num 0", ["--machine_num", "'0'"]),
        ("--batchsize x", ["--batchsize", "'x'"]),
        ("--retries -1", ["--retries", "at least 0"]),
        ("--main_port 65536", ["--main_port", "from 1 to 65535"]),
        ("--config absent.yaml", ["--config", "no such file", "absent.yaml"]),
        ("--code_path absent", ["--code_path", "no such folder", "absent"]),
        ("--code_path .", ["--code_path", "no train.py"]),
        ("--vis_gpu 0,1 --np 3", ["--vis_gpu", "2 GPUs", "--np 3"]),
        ("--vis_gpu 0,0", ["--vis_gpu", "different GPUs"]),
        ("--vis_gpu 0,,1", ["--vis_gpu", "'0,,1'"]),
        ("--machine_num 2 --node_rank 0", ["--ip"]),
        ("--machine_num 2 --ip a", ["--node_rank", "SLURM_NODEID", "NODE_RANK"]),
        ("--machine_num 2 --ip a --node_rank 2", ["--node_rank", "out of range", "0 to 1"]),
        ("--node_rank 1", ["--node_rank", "out of range"]),
        ("--ip=--x", ["--ip", "'--x'"]),
        ("--node_rang 1", ["--node_rang", "did you mean --node_rank?"]),
        ("--cfg=a.yaml", ["--cfg", "did you mean --config?"]),
        ("--machine 2", ["--machine", "unknown flag"]),
        ("--opts A 1", ["--opts", "after --"]),
        ("stray", ["unexpected argument 'stray'"]),
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


# ---------------------------------------------------------------------------------------------------------------------
# multi_machine_start.py: supervision
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def launch(checkout, tmp_path):
    """Starts the launcher with this code in the place of torchrun."""
    package = tmp_path / "stub" / "torch" / "distributed"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    started = []

    def start(torchrun_code: str | None, *arguments: str, script: str = "", **environment: str) -> subprocess.Popen:
        environment = checkout.environment(**environment)
        command = [sys.executable, str(checkout.root / "multi_machine_start.py"), "--np", "2", "--retry_wait", "0"]
        if script:
            command, environment["PYTHON"] = ["bash", str(checkout.root / script)], sys.executable
        if torchrun_code is not None:
            (package / "run.py").write_text(f"import os, signal, subprocess, sys\n{torchrun_code}")
            environment["PYTHONPATH"] = str(package.parents[1])
        process = subprocess.Popen(
            [*command, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=TIMEOUT_SECONDS)


# Fails until it has been started often enough.
COUNT_STARTS = """
starts = len(open("starts").read()) if os.path.exists("starts") else 0
open("starts", "a").write("x")
if starts < int(os.environ.get("FAILURES", "0")):
    sys.exit(1)
"""
# The alarm ends what a failing test would leave behind.
SAY_WHICH_SIGNAL = (
    f"signal.alarm({2 * TIMEOUT_SECONDS})"
    + """
def stop(signum, frame):
    os.write(1, signal.Signals(signum).name.encode() + bytes([10]))  # print may be what the signal interrupted
    if "SAVED" in os.environ:
        open(os.environ["LAUNCHER_EXIT_FILE"], "w").write("75")
    sys.exit(1)
for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
    signal.signal(signal.Signals[name], stop)
os.write(1, f"ready {os.getpid()}\\n".encode())  # print may write a line in pieces, between those of another process
while True:
    signal.pause()
"""
)


def starts(checkout) -> int:
    return len((checkout.root / "starts").read_text())


@pytest.mark.parametrize(("retries", "failures", "code"), [(0, 0, 0), (0, 1, 1), (2, 2, 0), (2, 3, 1)])
def test_retries(launch, checkout, retries, failures, code):
    process = launch(COUNT_STARTS, "--retries", str(retries), FAILURES=str(failures))
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == code, errors
    assert starts(checkout) == min(failures, retries) + 1


def test_a_saved_run_is_not_retried(launch, checkout):
    code = COUNT_STARTS + 'open(os.environ["LAUNCHER_EXIT_FILE"], "w").write("75")\nsys.exit(1)'
    process = launch(code, "--retries", "3")
    process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75
    assert starts(checkout) == 1


def test_a_mistake_is_not_retried(launch, checkout):
    code = COUNT_STARTS + 'open(os.environ["LAUNCHER_EXIT_FILE"], "w").write("2")\nsys.exit(1)'
    process = launch(code, "--retries", "3")
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 2
    assert starts(checkout) == 1 and errors.splitlines()[-1].endswith("; to be mended first")


@pytest.mark.parametrize(("lasted", "starts"), [(3599, 3), (3600, 5)])
def test_a_long_run_renews_the_retries(monkeypatch, tmp_path, lasted, starts):
    """Three runs that last so long before they fail, then some that fail at once: --retries are for faults in a row."""
    clock, attempts = SimpleNamespace(now=0.0), []

    def run_once(*rest):
        attempts.append(clock.now)
        assert len(attempts) < 10
        clock.now += lasted if len(attempts) <= 3 else 1
        return 1, None

    monkeypatch.setattr(multi_machine_start, "run_once", run_once)
    monkeypatch.setattr(multi_machine_start, "end_leftovers", lambda exit_file: None)
    monkeypatch.setattr(multi_machine_start, "time", SimpleNamespace(monotonic=lambda: clock.now))
    args = SimpleNamespace(node_rank=0, machine_num=1, retries=2, retry_wait=0, code_path=str(tmp_path), ip=None)
    args.main_port = args.rendezvous_timeout = None
    assert multi_machine_start.supervise(args, ["torchrun"], {}) == 1
    assert len(attempts) == starts


def test_torchrun_sees_its_environment(launch):
    names = ("CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "OMP_NUM_THREADS")
    code = f"print([os.environ.get(name) for name in {names}], os.getcwd())"
    process = launch(code, "--vis_gpu", "3,1", NCCL_DEBUG="INFO", OMP_NUM_THREADS="5")
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert output.startswith("['3,1', 'INFO', '5'] ") and output.endswith("a checkout\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("saved", [True, False])
def test_signals_are_forwarded_and_not_retried(launch, checkout, name, saved):
    process = launch(COUNT_STARTS + SAY_WHICH_SIGNAL, "--retries", "3", **({"SAVED": "1"} if saved else {}))
    assert process.stdout.readline().startswith("ready")
    process.send_signal(signal.Signals[name])
    output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert output == f"{name}\n", errors
    assert process.returncode == (75 if saved else 128 + signal.Signals[name])
    assert starts(checkout) == 1


def test_a_signal_ends_the_wait_before_a_retry(launch):
    process = launch(COUNT_STARTS, "--retries", "1", "--retry_wait", "3600", FAILURES="1")
    while "starting it again" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_torchrun_that_ignores_signals_is_killed(launch):
    code = 'signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint("ready", flush=True)\nwhile True: signal.pause()'
    margin = multi_machine_start.SHUTDOWN_MARGIN_SECONDS
    process = launch(code, TORCH_ELASTIC_SHUTDOWN_TIMEOUT=str(-margin))
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM


def test_ctrl_c_reaches_torchrun_through_the_launcher_only(launch):
    """A terminal signals a whole process group; torchrun would get SIGINT twice if it were in the launcher's."""
    process = launch("print(os.getpgid(0) == os.getpgid(os.getppid()))")
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert output == "False\n"


def test_torchrun_does_not_outlive_the_launcher(launch):
    process = launch(SAY_WHICH_SIGNAL)
    assert process.stdout.readline().startswith("ready")
    process.kill()
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)  # ends when torchrun has closed its end of the pipe
    assert output == "SIGTERM\n"


def test_workers_do_not_outlive_a_killed_torchrun(launch, checkout):
    """They have sessions of their own, as torchrun gives them, and hold the pipe: it ends when they are gone."""
    worker = f'import signal; signal.alarm({2 * TIMEOUT_SECONDS}); print("ready", flush=True); signal.pause()'
    code = f"""
workers = [subprocess.Popen([sys.executable, "-c", {worker!r}], start_new_session=True) for _ in range(2)]
print("torchrun", os.getpid(), flush=True)
signal.pause()
"""
    process = launch(COUNT_STARTS + code)
    lines = sorted(process.stdout.readline() for _ in range(3))
    os.kill(int(lines[-1].split()[1]), signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 128 + signal.SIGKILL


@pytest.mark.launch
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_reach_the_workers_of_the_real_torchrun(launch, checkout, name):
    (checkout.root / "train.py").write_text(f"import os, signal, sys\n{SAY_WHICH_SIGNAL}")
    process = launch(None, "--retries", "3", SAVED="1")
    for _ in range(2):
        assert process.stdout.readline().startswith("ready")
    process.send_signal(signal.Signals[name])
    output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75, errors
    assert output.count(name) == 2
