"""How a program ends: exit codes, and the exceptions whose message is meant for the user."""

import re
from pathlib import Path

from .text import printable

CHECKOUT = Path(__file__).resolve().parents[1]
# What a stopped and saved run exits with (EX_TEMPFAIL of sysexits.h): start the same command again to continue.
EXIT_STOPPED = 75
EXIT_MISTAKE = 2  # a mistake of the user, found before training: starting the same command again does not help


class UserError(ValueError):
    """Something that the user can mend: a wrong key, a missing folder, an unreadable file.

    The message is one line that names what is wrong and what would be right. `train.py`, `test.py` and the commands
    print it without a traceback and exit with status 2.
    """

    def one_line(self) -> str:
        """The message alone, also where a loader's worker has wrapped it into its traceback."""
        lines = [line for line in str(self).strip().splitlines() if line.strip()]
        return printable(re.sub(r"^[\w.]*UserError: ", "", lines[-1].strip())) if lines else "unknown error"


class Fault(UserError):
    """Not a mistake in the command: processes that do not meet, and whatever ends a run that has begun to train.

    Starting the same command again may help; multi_machine_start.py does that.
    """


class CompilerStopped(Fault):
    """A signal asked this run to stop, and ended the compiler too: the state is not that of a whole update."""


class StopRequested(Exception):
    """All processes agreed to stop here; the state is that of a whole update."""


def existing_file(name: str) -> str:
    """A file of this checkout, such as 'configs/x.yaml', as its path from the current folder; '' where there is none.

    For messages that suggest it: the program may have been started anywhere.
    """
    path = CHECKOUT / name
    if not path.is_file():
        return ""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def one_line(error: BaseException) -> str:
    """What an exception says, in one line: the system's words alone for an OSError, whose path the caller names."""
    return " ".join(_message(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of it, at most 200 characters: torch, exporters and unpicklers go on for pages."""
    return (_message(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _message(error: BaseException) -> str:
    """Pillow names what it was given, which for bytes is an object and its address."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return re.sub(r" <[\w.]+ object at 0x[0-9a-f]+>", "", message)
