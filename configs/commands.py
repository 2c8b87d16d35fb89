"""What the commands `python -m <package>.<name>` share: their command line, and how a mistake ends them."""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from .arguments import OneLineParser
from .errors import UserError
from .text import escape_output

Main = Callable[[Sequence[str] | None], int | None]


class CommandParser(OneLineParser):
    """A parser that shows a module's docstring as it stands, and raises UserError, one line, for wrong use.

    Args:
        name: the module, such as 'tools.check'.
        description: its docstring.
    """

    def __init__(self, name: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m {name}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message if "see --help" in message or "did you mean" in message else f"{message}; see --help")


def command(name: str) -> Callable[[Main], Callable[..., int]]:
    """Decorate a command's `main(argv)`: UserError becomes one line on standard error and exit status 2.

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

        return run

    return decorate
