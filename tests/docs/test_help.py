"""--help of every program: it names only flags that the program has, keeps its lines, and shows defaults."""

import argparse
import ast
import importlib
import itertools
import re
from pathlib import Path

import pytest
import runs

from configs import read_command
from configs.keys import KEYS
from tasks import keys_of

TOOLS = [p for p in sorted((runs.ROOT / "tools").rglob("*.py")) if '__name__ == "__main__"' in p.read_text()]
PROGRAMS = [runs.ROOT / f"{name}.py" for name in ("train", "test", "multi_machine_start")] + TOOLS
every_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: str(path.relative_to(runs.ROOT)))
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def docstring(program: Path) -> str:
    """Not by an import: `test` is a package of Python itself."""
    return ast.get_docstring(ast.parse(program.read_text()), clean=False)


@pytest.fixture
def shown_help(monkeypatch):
    """The parser of a program whose --help is asked for, and the text that it shows."""
    shown = []

    def keep(parser, file=None):
        shown[:] = [parser, parser.format_help()]

    def show(program):
        monkeypatch.setattr(argparse.ArgumentParser, "print_help", keep)
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as end:
            if program.stem in ("train", "test"):
                read_command(["--help"], keys_of, description=docstring(program))
            else:
                module = ".".join(program.relative_to(runs.ROOT).with_suffix("").parts)
                importlib.import_module(module).main(["--help"])
        assert end.value.code == 0
        return shown

    return show


@every_program
def test_help_names_only_flags_of_its_program(shown_help, program):
    parser, text = shown_help(program)
    text = re.sub(r"torchrun .*(?= train\.py)", "", text)  # torchrun's own
    assert set(FLAG.findall(text)) <= set(parser._option_string_actions)


@every_program
def test_help_keeps_its_lines_and_shows_defaults(shown_help, program):
    parser, text = shown_help(program)
    assert set(docstring(program).splitlines()) <= set(text.splitlines())
    helps = {action.dest: parser._get_formatter()._get_help_string(action) for action in parser._actions}
    keys = {**KEYS, **keys_of("classification")} if program.stem in ("train", "test", "visualize") else {}
    for action in parser._actions:
        assert helps[action.dest], action.dest
        default = keys[action.dest].default if action.dest in keys else action.default
        if action.nargs != 0 and default not in (None, "", [], argparse.SUPPRESS):
            assert "default" in helps[action.dest], action.dest
    if len(parser._actions) > 10:
        assert sum(bool(group._group_actions) for group in parser._action_groups) >= 3


# Flags that stand in the help of shell scripts, and are not for train.py or test.py.
OTHERS = {
    "--nv": "apptainer",
    **dict.fromkeys(("--nodes", "--export", "--array", "--partition", "--account"), "sbatch"),
}


@pytest.mark.parametrize("script", sorted((runs.ROOT / "launch_scripts").glob("*.sh")), ids=lambda path: path.stem)
def test_help_of_shell_scripts_names_flags_that_there_are(shown_help, script):
    parser, _ = shown_help(PROGRAMS[0])
    own = re.findall(r"(--\w+)\)", script.read_text())
    lines = script.read_text().splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = "\n".join(line for line in comment if "SBATCH --" not in line)
    assert set(FLAG.findall(text)) <= {*own, *OTHERS, *parser._option_string_actions}
