"""Tables and lines for people. What does not fit into the terminal is left out and named, never wrapped into a mess."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_GAP = 2
_NARROWEST = 16  # a long name is folded down to this width before columns are left out
_WIDTH_OF_A_FILE = 200  # where no terminal says how wide it is


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        title: its heading.
        justify: where its cells stand.
        dispensable: 0 if it must be there; the larger, the sooner it is left out.
        folds: whether its cells may go on in the next line.
    """

    title: str
    justify: Literal["left", "right"] = "right"
    dispensable: int = 0
    folds: bool = False


def plain(text: object) -> str:
    """Return ``text`` in one line that cannot steer a terminal: it may come from a file that anyone wrote."""
    return "".join(each if each.isprintable() else "\ufffd" for each in str(text))


def make_console() -> Console:
    """Return what prints to standard output, as wide as the terminal, or wide where there is none."""
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, width=_WIDTH_OF_A_FILE if wide else None)


def print_table(console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, without the most dispensable columns where the width is too small."""
    widths = [_width(column, [row[i] for row in rows]) for i, column in enumerate(columns)]
    shown = list(range(len(columns)))
    while sum(widths[i] + _GAP for i in shown) - _GAP > console.width:
        last = max(shown, key=lambda i: columns[i].dispensable)
        if not columns[last].dispensable:
            break
        shown.remove(last)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for i in shown:
        column = columns[i]
        table.add_column(column.title, justify=column.justify, no_wrap=not column.folds, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(row[i])) for i in shown))
    console.print(table)
    left_out = [column.title for i, column in enumerate(columns) if i not in shown]
    if left_out:
        print_line(console, f"Too narrow for: {', '.join(left_out)}. They are in --json.", style="dim")


def _width(column: Column, cells: Iterable[str]) -> int:
    widest = max(cell_len(text) for text in (column.title, *cells))
    return max(cell_len(column.title), min(widest, _NARROWEST)) if column.folds else widest


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print one line as it is."""
    console.print(Text(plain(text), style=style), soft_wrap=True)


def print_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Print what is known of one thing: a line each."""
    known = list(facts)
    width = max(len(title) for title, _ in known)
    for title, text in known:
        console.print(Text.assemble((f"{title:<{width}}", "bold"), "  ", plain(text)), soft_wrap=True)
