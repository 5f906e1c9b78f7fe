"""Sentences as wide as the screen: no word or number is broken. In a pipe each stays on its line, for grep."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from functools import partial
from typing import TextIO

PIPE = 120
"""Width of tables where there is no screen."""


_GOES_ON = " \\"


def screen(stream: TextIO) -> int | None:
    """Columns of the screen behind a stream; None where there is none, and COLUMNS does not ask for a width."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return shutil.get_terminal_size().columns if stream.isatty() else None


def wrapped(text: str, columns: int | None) -> str:
    """A text in lines of at most so many columns; a word that is longer has a line of its own, unbroken.

    Args:
        text: What to wrap; its own lines stay lines, and what follows in one keeps its indent. A line that is a command
            goes on behind a backslash, so that it can be copied.
        columns: Width of the screen; None leaves the text as it is.
    """
    if columns is None:
        return text
    lines = (_lines(_TOGETHER.sub(_BOUND, line), columns) for line in text.split("\n"))
    return "\n".join("\n".join(each) for each in lines).replace(_BOUND, " ")


_TOGETHER = re.compile(
    r"(?<=\d) (?=(?:dB|%|points|[KM]iB|ms|s)(?!\w))|(?<=\bpip) (?=install )|(?<=\bpcn-compile) (?=[a-z])"
)
"""Spaces at which no line ends: between a number and its unit, a command and its verb."""

_BOUND = "\0"


def _lines(line: str, columns: int) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    wrap = partial(textwrap.wrap, line, break_long_words=False, break_on_hyphens=False)
    if line.lstrip().startswith(f"pcn-compile{_BOUND}") and len(line) > columns:
        *first, last = wrap(columns - len(_GOES_ON), subsequent_indent=f"{indent}    ")
        return [*(f"{part}{_GOES_ON}" for part in first), last]
    return wrap(columns, subsequent_indent=indent) or [""]


def for_stdout(text: str) -> str:
    """A text as wide as the screen behind stdout."""
    return wrapped(text, screen(sys.stdout))


def for_stderr(text: str) -> str:
    """A text as wide as the screen behind stderr."""
    return wrapped(text, screen(sys.stderr))
