"""A made-up checkout with the real launch scripts, and a stub for the Python that they start."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ["base", "digits", "large", "miny", "small", "tiny"]
METACHARACTERS = ["; rm -rf x", "$(touch x)", "`touch x`", "a b", "*", "$HOME", "$$", "${local_rank}", "--", ""]
TIMEOUT_SECONDS = 60

# Stands in for Python: logs each call, and does what the scripts need of it. It is bash because bash starts faster;
# Python itself runs only the pieces of code in the scripts.
STUB = r"""#!/usr/bin/env bash
{ printf '%s\x1f' "$0" "$PWD" "$@"; printf '\x1e'; } >>"$STUB_LOG"
case "$*" in
*"print(*sys.version_info"*) echo "${STUB_VERSION:-3 11}" ;;
*"import torch"*) [[ -n ${STUB_GPUS:-} ]] && echo "$STUB_GPUS" ;;
*"import venv"*) [[ -z ${STUB_WITHOUT_VENV:-} ]] ;;
"-m venv "*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
"-m pip install"*) exit "${STUB_PIP_CODE:-0}" ;;
-c* | -\ *) exec PYTHON_CODE "$@" ;;
esac
"""
# Runs a piece of code (the argument of -c, or standard input) in a Python of STUB_VERSION.
PYTHON_CODE = """
import os, sys
option, *arguments = sys.argv[1:]
code = arguments.pop(0) if option == "-c" else sys.stdin.read()
sys.argv = ["-c", *arguments]
sys.version_info = tuple(map(int, os.environ.get("STUB_VERSION", "3 11").split()))
exec(code)
"""


def write_executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@contextmanager
def started_processes() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts processes, whose output is text on pipes; those that are left at the end of the block are killed."""
    started = []

    def start(command: Sequence[str], **options) -> subprocess.Popen:
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(command, **pipes, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=TIMEOUT_SECONDS)


class Call(NamedTuple):
    """One start of the stub."""

    python: str
    cwd: str
    argv: list[str]


class Checkout:
    """A copy of the launchers with empty YAML files, train.py and test.py, and a stub for Python."""

    def __init__(self, folder: Path):
        self.root = folder / "a checkout"
        self.log = folder / "calls"
        shutil.copytree(ROOT / "launch_scripts", self.root / "launch_scripts")
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        shutil.copy(ROOT / "multi_machine_start.py", self.root)
        shutil.copytree(ROOT / "configs", self.root / "configs", ignore=shutil.ignore_patterns("*.yaml", "__pycache__"))
        for variant in VARIANTS:
            (self.root / "configs" / f"groupmixformer_{variant}.yaml").touch()
        for name in ("train.py", "test.py"):
            (self.root / name).touch()
        (self.root / "requirements.txt").write_text("# needed\npytest>=1\n")
        (self.root / "requirements-dev.txt").write_text("pytest\n")
        code = folder / "code.py"
        code.write_text(PYTHON_CODE)
        command = shlex.join([sys.executable, "-I", str(code)])
        self.python = write_executable(folder / "bin" / "python-stub", STUB.replace("PYTHON_CODE", command))

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

    def all_calls(self) -> list[Call]:
        records = self.log.read_text().split("\x1e")[:-1] if self.log.exists() else []
        calls = [record.split("\x1f")[:-1] for record in records]
        return [Call(python, cwd, argv) for python, cwd, *argv in calls]

    def calls(self) -> list[list[str]]:
        """The arguments of each call so far, except the scripts' own small questions; forgets them."""
        argvs = [call.argv for call in self.all_calls()]
        self.log.unlink(missing_ok=True)
        return [argv for argv in argvs if argv[0] not in ("-c", "-") and argv != ["-m", "pip", "--version"]]


def assert_one_line(result, *words: str):
    """The script failed, and said so in one line with these words."""
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr
