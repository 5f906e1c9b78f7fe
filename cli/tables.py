"""Tables that break no word and no number: where the columns are too many for the screen, each row is a record."""

from __future__ import annotations

import re
import sys
from itertools import groupby

import click
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from pcn_deploy.cli.text import PIPE, for_stdout, screen, wrapped

MOST_LINES = 3
"""A cell that would be higher than so many lines makes records of its table."""

_STEP = "  "
_WORD = re.compile(r"\s*\S+")


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on stdout: with lines around its cells where that fits the screen, else as records.

    A record is the first cell on a line of its own, with the name of its column, and the others below it as `column:
    cell`. Rows whose first cell is empty belong to the row before. Of two columns the first names the second.

    Args:
        title: What stands above it.
        columns: Their names; those that hold numbers alone align right.
        rows: A cell for each column.
    """
    click.secho(for_stdout(title), bold=True)
    _print(columns, rows, screen(sys.stdout) or PIPE, "")


def _print(columns: list[str], rows: list[list[str]], screen_width: int, indent: str) -> None:
    widths = column_widths(columns, rows, screen_width - len(indent))
    if widths is None:
        _print_records(columns, rows, screen_width, indent)
        return
    table = Table(header_style="bold")
    for index, (column, width) in enumerate(zip(columns, widths, strict=True)):
        numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", width=width)
    for row in rows:
        table.add_row(*row)
    Console(width=screen_width, markup=False, highlight=False).print(
        Padding(table, (0, 0, 0, len(indent)), expand=False)
    )


def column_widths(columns: list[str], rows: list[list[str]], available: int) -> list[int] | None:
    """Widths of the columns in which every word is whole; None if they do not fit into so many characters.

    What is left over once every word fits goes to the narrowest columns first, until their cells need one line.
    """
    cells = [[column, *(row[index] for row in rows)] for index, column in enumerate(columns)]
    least = [max(_longest_word(text) for text in column) for column in cells]
    natural = [max(cell_len(text) for text in column) for column in cells]
    room = available - 3 * len(columns) - 1
    if sum(least) > room:
        return None

    def capped(cap: int) -> list[int]:
        return [max(words, min(whole, cap)) for words, whole in zip(least, natural, strict=True)]

    cap = max(natural, default=0)
    while sum(capped(cap)) > room:
        cap -= 1
    widths = capped(cap)
    lines = (
        wrapped(text, max(width, 1)).count("\n") + 1
        for column, width in zip(cells, widths, strict=True)
        for text in column
    )
    return None if max(lines, default=0) > MOST_LINES else widths


def _longest_word(text: str) -> int:
    """Of a cell, its indent taken with the first word."""
    words = _WORD.findall(text)
    return max([cell_len(words[0]), *(cell_len(word.strip()) for word in words[1:])]) if words else 0


def _print_records(columns: list[str], rows: list[list[str]], screen_width: int, indent: str) -> None:
    if len(columns) < 3:
        for row in rows:
            click.echo(wrapped(f"{indent}{': '.join(row)}", screen_width))
        return
    number = 0

    def group(row: list[str]) -> int:
        nonlocal number
        number += bool(row[0])
        return number

    for _, members in groupby(rows, group):
        first, *others = members
        below = indent + first[0][: len(first[0]) - len(first[0].lstrip())]
        if first[0]:
            click.echo(wrapped(f"{below}{columns[0]}: {first[0].strip()}", screen_width))
        if others:
            _print(columns[1:], [row[1:] for row in (first, *others)], screen_width, below + _STEP)
        else:
            pairs = [f"{name}: {cell.strip()}" for name, cell in zip(columns[1:], first[1:], strict=True)]
            click.echo(_packed([pair for pair in pairs if not pair.endswith(": ")], screen_width, below + _STEP))


def _packed(pairs: list[str], screen_width: int, indent: str) -> str:
    """As many pairs on a line as fit, with semicolons between them."""
    lines: list[str] = []
    for index, pair in enumerate(pairs):
        text = f"{pair};" if index < len(pairs) - 1 else pair
        if lines and cell_len(f"{lines[-1]} {text}") <= screen_width:
            lines[-1] += f" {text}"
        else:
            lines.append(indent + text)
    return wrapped("\n".join(lines), screen_width)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return text == "-"
    return True
