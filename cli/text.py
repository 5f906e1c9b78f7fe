"""Sentences as wide as the screen: no word or number is broken. In a pipe each stays on its line, for grep."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import TextIO

PIPE = 120
"""Width of tables where there is no screen."""


def screen(stream: TextIO) -> int | None:
    """Columns of the screen behind a stream; None where there is none, and COLUMNS does not ask for a width."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return shutil.get_terminal_size().columns if stream.isatty() else None


def wrapped(text: str, columns: int | None) -> str:
    """A text in lines of at most so many columns; a word that is longer has a line of its own, unbroken.

    Args:
        text: What to wrap; its own lines stay lines, and what follows in one keeps its indent.
        columns: Width of the screen; None leaves the text as it is.
    """
    if columns is None:
        return text
    return "\n".join("\n".join(_lines(line, columns)) for line in text.split("\n"))


def _lines(line: str, columns: int) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [
        ""
    ]


def for_stdout(text: str) -> str:
    """A text as wide as the screen behind stdout."""
    return wrapped(text, screen(sys.stdout))


def for_stderr(text: str) -> str:
    """A text as wide as the screen behind stderr."""
    return wrapped(text, screen(sys.stderr))
