"""What the commands `python -m <package>.<name>` share: their command line, and how a mistake ends them."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .arguments import OneLineParser
from .errors import UserError
from .text import escape_output, printable

OUTPUT_FLAGS = ("--out", "--output", "--json")
Main = Callable[[Sequence[str] | None], int | None]


class CommandParser(OneLineParser):
    """A parser that shows a module's docstring as it stands, and raises UserError, one line, for wrong use.

    Its help has flags that are required first, and those that say where results go last.

    Args:
        name: the module, such as 'tools.check'.
        description: its docstring.
    """

    def __init__(self, name: str, description: str | None) -> None:
        super().__init__(prog=f"python -m {name}", description=description, add_help=False)
        self._required, self._options, self._output = map(self.add_argument_group, ("required", "options", "output"))
        self.add_argument("-h", "--help", action="help", help="show this help and exit")

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        if not names[0].startswith("-"):
            return super().add_argument(*names, **kwargs)
        results = self._output if names[0] in OUTPUT_FLAGS else self._options
        return (self._required if kwargs.get("required") else results).add_argument(*names, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(message if "see --help" in message or "did you mean" in message else f"{message}; see --help")


def command(name: str) -> Callable[[Main], Callable[..., int]]:
    """Decorate a command's `main(argv)`: UserError, or a file that the system refuses, becomes one line on standard
    error and exit status 2.

    What it prints is escaped where the terminal lacks a character.

    `main` gets the arguments without the program's name, or None for those of the process, and returns the exit status;
    None means 0.
    """

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            escape_output()
            try:
                return main(argv) or 0
            except UserError as error:
                print(f"{name}: error: {error.one_line()}", file=sys.stderr)
                return 2
            except OSError as error:
                if not error.filename or not error.strerror:
                    raise
                print(f"{name}: error: {printable(os.fsdecode(error.filename))}: {error.strerror}", file=sys.stderr)
                return 2

        return run

    return decorate
