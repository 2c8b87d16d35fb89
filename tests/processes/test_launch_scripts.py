"""The launch scripts, in a made-up checkout: stubs stand in for Python and SLURM. Nothing is installed."""

import re
import shlex
import shutil
import subprocess

import pytest
from stub_checkout import (
    METACHARACTERS,
    ROOT,
    TIMEOUT_SECONDS,
    VARIANTS,
    Checkout,
    assert_one_line,
    write_executable,
)

SCRIPTS = sorted((ROOT / "launch_scripts").glob("*.sh"))


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


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
        if script.name != "common.sh":
            result = checkout.run(f"launch_scripts/{script.name}", "--help", cwd=checkout.root.parent, SETUP="exit 1")
            assert result.returncode == 0, result.stderr
            assert f" launch_scripts/{script.name}" in result.stdout
            assert "set -euo" not in result.stdout and "\n#" not in result.stdout
    assert checkout.calls() == []


# ---------------------------------------------------------------------------------------------------------------------
# SETUP and PYTHON
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["run_train", "run_eval", "run_cal_flops", "quickstart", "run_tests"])
def test_setup_comes_first_and_python_may_have_arguments(checkout, tmp_path, script):
    """As for modules and a container, in a folder with a space. SETUP is not held to `set -eu`, and may set others."""
    write_executable(tmp_path / "modules" / "box", '#!/usr/bin/env bash\nshift 2\nexec "$@"\n')
    setup = f'false; : $undefined; PATH="{tmp_path}/modules:$PATH" VARIANT=tiny'
    python = f"box exec 'an image.sif' '{checkout.python}'"
    settings = dict(SETUP=setup, PYTHON=python, NO_VENV="1", STUB_GPUS="2")
    result = checkout.run(f"launch_scripts/{script}.sh", cwd=tmp_path, **settings)
    assert result.returncode == 0, result.stderr
    assert {call.python for call in checkout.all_calls()} == {str(checkout.python)}
    first, *_ = checkout.calls()
    assert first[0] == "-m" or any("groupmixformer_tiny" in word for word in first)


def test_a_setup_that_fails_is_named(checkout):
    assert_one_line(checkout.run("launch_scripts/run_train.sh", SETUP="module load cuda 2>&-"), "SETUP: ", "code 127")
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
    folder = checkout.all_calls()[-1].cwd
    assert folder == str(checkout.root)
    assert checkout.calls() == [started("3", program, "configs/groupmixformer_small.yaml", "./datasets/imagenet")]


@pytest.mark.parametrize(("script", "program"), RUNS)
def test_run_with_the_released_two_arguments(checkout, tmp_path, script, program):
    other = tmp_path / "other code"
    shutil.copytree(checkout.root, other)
    (other / "configs" / "groupmixformer_mine.yaml").touch()
    result = checkout.run(script, "some root", "other code", cwd=tmp_path, GPUS="2", VARIANT="mine")
    assert result.returncode == 0, result.stderr
    assert checkout.all_calls()[-1].cwd == str(other)
    data_path = f"{tmp_path}/some root/data/ILSVRC/Data/CLS-LOC"
    assert checkout.calls() == [started("2", program, "configs/groupmixformer_mine.yaml", data_path)]


@pytest.mark.parametrize(("script", "program"), RUNS)
def test_the_root_may_hold_prepared_data(checkout, tmp_path, script, program):
    """Kaggle's val/ is flat: what tools.prepare makes of it, where train.py and test.py say, is taken instead."""
    (tmp_path / "root" / "data" / "imagenet" / "val").mkdir(parents=True)
    assert checkout.run(script, "root", cwd=tmp_path, GPUS="2").returncode == 0
    data_path = f"{tmp_path}/root/data/imagenet"
    assert checkout.calls() == [started("2", program, "configs/groupmixformer_small.yaml", data_path)]


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


def test_an_evaluation_under_nohup_keeps_running(checkout):
    """By default torchrun handles SIGHUP, although it was ignored."""
    says = '#!/usr/bin/env bash\necho "signals ${PET_SIGNALS_TO_HANDLE-of torchrun}"\n'
    python = write_executable(checkout.log.parent / "bin" / "says", says)
    command = ["bash", str(checkout.root / "launch_scripts" / "run_eval.sh")]
    environment = checkout.environment(PYTHON=str(python), GPUS="2")
    for before, signals in (["nohup"], "SIGTERM,SIGINT,SIGQUIT"), (["env", "--default-signal=HUP"], "of torchrun"):
        result = subprocess.run([*before, *command], env=environment, capture_output=True, text=True)
        assert result.stdout == f"signals {signals}\n", result.stderr


def test_run_prefers_the_checkouts_environment(checkout):
    python = write_executable(checkout.root / ".venv" / "bin" / "python", checkout.python.read_text())
    assert checkout.run("launch_scripts/run_train.sh", PYTHON="", GPUS="1").returncode == 0
    assert checkout.all_calls()[-1].python == str(python)


def test_run_explains_what_is_wrong(checkout):
    script = "launch_scripts/run_train.sh"
    assert_one_line(checkout.run(script, GPUS="1", VARIANT="huge"), "huge", " ".join(VARIANTS))
    assert_one_line(checkout.run(script, GPUS="1", CFG="absent.yaml"), "absent.yaml")
    assert_one_line(checkout.run(script, GPUS="0"), "GPUS")
    setup = checkout.root / "launch_scripts" / "setup_env.sh"
    advice = checkout.run(script).stderr.partition("cannot import torch; run bash ")[2].partition(", or set PYTHON")[0]
    assert shlex.split(advice) == [str(setup)]
    assert_one_line(checkout.run(script, PYTHON="/absent/python"), "/absent/python", "no such program; run bash ")
    assert_one_line(checkout.run(script, PYTHON="' python"), "no such program")
    setup.unlink()  # what a message suggests is there
    assert_one_line(checkout.run(script, PYTHON="/absent/python"), "no such program; set PYTHON")
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

    # The lists name one another.
    (checkout.root / "requirements-extras.txt").write_text("onnx\n")
    assert checkout.run(SETUP, "dev").returncode == 0
    assert checkout.calls() == [install(checkout, "requirements.txt"), install(checkout, "requirements-dev.txt")]

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
    *_, run_folder, tensorboard, page = result.stdout.splitlines()
    assert run_folder == f"Run folder: {folder}"
    assert page == "Next: pictures of your own, docs/fine-tuning.md" and (ROOT / "docs/fine-tuning.md").is_file()
    assert shlex.split(tensorboard)[-2:] == ["--logdir", folder]


def test_quickstart_into_another_folder(checkout, tmp_path):
    result = checkout.run("launch_scripts/quickstart.sh", NO_VENV="1", OUTPUT=str(tmp_path), TAG="b", DATA_PATH="d")
    assert result.returncode == 0, result.stderr
    weights = f"{tmp_path}/groupmixformer_digits/b/ckpt_best.pth"
    expected = ["--data-path", "d", "--output", str(tmp_path), "--tag", "b", "--resume", weights]
    assert checkout.calls()[-1][-8:] == expected


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_quickstart_of_another_task(checkout, tmp_path, task):
    result = checkout.run("launch_scripts/quickstart.sh", task, "--tag", "b", cwd=tmp_path, NO_VENV="1")
    assert result.returncode == 0, result.stderr
    flags = ["--cfg", f"configs/{task}/digits.yaml", "--data-path", f"datasets/digit_scenes/{task}"]
    flags += ["--output", "output", "--tag", "quickstart", "--tag", "b"]
    assert checkout.calls() == [
        ["-m", "tools.scenes", "--output", "datasets/digit_scenes"],
        ["train.py", *flags],
        ["test.py", *flags, "--resume", f"output/{task}_digits/quickstart/ckpt_best.pth"],
    ]


@pytest.mark.parametrize("script", ["launch_scripts/run_tests.sh", ".ci/run"])
def test_lint_comes_before_the_tests(checkout, tmp_path, script):
    result = checkout.run(script, cwd=tmp_path, NO_VENV="1")
    assert result.returncode == 0, result.stderr
    *lint, tests = checkout.calls()
    assert lint == [["-m", "ruff", "check", "."], ["-m", "ruff", "format", "--check", "."]]
    assert tests[:2] == ["-m", "pytest"]


def test_run_tests_passes_arguments_on(checkout):
    assert checkout.run("launch_scripts/run_tests.sh", "-k", "a or b", NO_VENV="1").returncode == 0
    assert checkout.calls()[-1][-2:] == ["-k", "a or b"]
