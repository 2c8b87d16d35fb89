"""Text that every terminal, log and picture takes. A file's name may hold bytes that are no text."""

import os
import sys


def printable(text: str) -> str:
    """One line of valid Unicode: control characters, and bytes that are no text, as escapes (`caf\\udce9`)."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def in_picture(text: str) -> str:
    """A name as matplotlib draws it letter by letter; `$` would begin mathematics."""
    return printable(text).replace("$", r"\$")


def escape_output() -> None:
    """From now on standard output and error escape the characters that their encoding does not have (`gr\\xf6\\xdfe`).

    A stream that was closed before this process began goes nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
        elif hasattr(getattr(sys, name), "reconfigure"):  # a notebook's has not
            getattr(sys, name).reconfigure(errors="backslashreplace")
