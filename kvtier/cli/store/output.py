"""Output of the commands: tables and lines for people, JSON for programs.

Columns that do not fit into the terminal are left out and named, not wrapped. JSON has stable keys, units in their
names, and times as Unix seconds.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvtier.units import parse_bytes


def span(seconds: float) -> str:
    """Return a duration in its largest whole unit, rounded down: ``45 s``, ``12 min``, ``3 h``, ``20 d``."""
    for unit, factor in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= factor:
            return f"{int(seconds // factor)} {unit}"
    return f"{max(0, int(seconds))} s"


def moment(unix_seconds: float) -> str:
    """Return a time in the local time zone: ``2026-01-31 09:05:00``."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))


def parse_size(text: str, option: str) -> int:
    """Return the bytes in ``text``, e.g. ``10GiB``; 0 is allowed.

    Raises:
        ConfigurationError: ``text`` is not a byte count; the message names ``option``.
    """
    return 0 if text.strip() == "0" else parse_bytes(text, option)


_GAP = 2
_NARROWEST = 16  # a long name is folded, and a text cut, down to this width before columns are left out
_WIDEST_TEXT = 80
_WIDTH_OF_A_FILE = 200  # without a terminal


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        title: its heading.
        justify: alignment of its cells.
        dispensable: 0 if it must be shown; the larger, the sooner it is left out.
        folds: whether its cells may wrap to the next line.
        fills: whether its cells take the width that is left, and are cut at their beginning where that is too small. A
            column that fills and has only empty cells is left out.
    """

    title: str
    justify: Literal["left", "right"] = "right"
    dispensable: int = 0
    folds: bool = False
    fills: bool = False


# Python calls all spaces but one unprintable, and the two signs that join or part letters in Persian, Hindi and emoji.
_JOINERS = "\u200c\u200d"


def is_shown(character: str) -> bool:
    """Return whether a terminal may get ``character``: it controls nothing, and changes no direction of writing."""
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def plain(text: object) -> str:
    """Return ``text`` in one line without control characters: it may come from an untrusted file."""
    return "".join(each if is_shown(each) else "\ufffd" for each in str(text))


def make_console(*, stderr: bool = False) -> Console:
    """Return the console of standard output, or error.

    It is as wide as the terminal, or as ``COLUMNS`` says, and wraps longer lines at words. Without a terminal it is
    wide, and a line stays one line: other programs read it.
    """
    has_width = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return Console(
        stderr=stderr, highlight=False, width=None if has_width else _WIDTH_OF_A_FILE, soft_wrap=not has_width
    )


def print_table(console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, without the most dispensable columns where the width is too small."""
    lines = [[plain(cell) for cell in row] for row in rows]
    widths = [_width(column, [row[i] for row in lines]) for i, column in enumerate(columns)]
    shown = [i for i, column in enumerate(columns) if not column.fills or any(row[i] for row in lines)]
    without_text = [i for i in range(len(columns)) if i not in shown]
    while sum(widths[i] + _GAP for i in shown) - _GAP > console.width:
        last = max(shown, key=lambda i: columns[i].dispensable)
        if not columns[last].dispensable:
            break
        shown.remove(last)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    others = [i for i in shown if not columns[i].fills]
    unfolded = (max(map(cell_len, (columns[i].title, *(row[i] for row in lines)))) for i in others)
    natural = console.width - sum(width + _GAP for width in unfolded)
    left = natural if natural >= _NARROWEST else console.width - sum(widths[i] + _GAP for i in others)
    for i in shown:
        column = columns[i]
        if column.fills:
            for row in lines:
                row[i] = _cut_front(row[i], min(left, _WIDEST_TEXT))
        table.add_column(column.title, justify=column.justify, no_wrap=not column.folds, overflow="fold")
    for row in lines:
        table.add_row(*(Text(row[i]) for i in shown))
    console.print(table, soft_wrap=False)
    left_out = [column.title for i, column in enumerate(columns) if i not in (*shown, *without_text)]
    if left_out:
        print_line(console, f"Too narrow for: {', '.join(left_out)}. They are in --json.", style="dim")


def _width(column: Column, cells: Iterable[str]) -> int:
    widest = max(cell_len(text) for text in (column.title, *cells))
    return max(cell_len(column.title), min(widest, _NARROWEST)) if column.folds or column.fills else widest


def _cut_front(text: str, width: int) -> str:
    """Return the end of ``text`` that fits into ``width`` cells, after an ellipsis if it is not all."""
    if cell_len(text) <= width:
        return text
    begin = max(0, len(text) - width + 1)
    while cell_len(text[begin:]) > width - 1:
        begin += 1
    return f"…{text[begin:].lstrip()}"


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print one line, wrapped at words if the console wraps."""
    console.print(Text(plain(text), style=style, overflow="fold"))


def print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Print facts, one line each. Where the console wraps, the next lines of a text begin below its first one."""
    width = max(len(title) for title, _ in facts)
    for title, text in facts:
        print_below(console, [Text(f"{title:<{width}}", style="bold")], text)


def print_below(console: Console, headings: Sequence[Text], text: str) -> None:
    """Print headings, and ``text`` beside them, which keeps to the right of them where the console wraps."""
    words = Text(plain(text), overflow="fold")
    left = sum(heading.cell_len + _GAP for heading in headings)
    if console.soft_wrap or console.width - left < _NARROWEST:
        console.print(Text(" " * _GAP).join([*headings, words]))
        return
    for n, line in enumerate(words.wrap(console, console.width - left) or [Text()]):
        first = Text(" " * _GAP).join([*headings, Text()]) if n == 0 else Text(" " * left)
        console.print(first + line, soft_wrap=True)


def print_json(record: Mapping[str, Any]) -> None:
    """Print one object to standard output."""
    sys.stdout.write(json.dumps(record, indent=1) + "\n")


class Format(str, Enum):
    """How a listing is printed."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"


def print_records(records: Sequence[Mapping[str, Any]], fields: Sequence[str], output: Format) -> None:
    """Print records to standard output, one a line: as JSON objects, or as CSV after a heading."""
    if output is Format.JSONL:
        sys.stdout.writelines(json.dumps(record) + "\n" for record in records)
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(fields)
    for record in records:
        writer.writerow([_csv_cell(record[field]) for field in fields])


def _csv_cell(value: Any) -> Any:
    if isinstance(value, list):
        return plain(" ".join(map(str, value)))
    return "" if value is None else value if isinstance(value, (int, float)) else plain(value)


def print_result(record: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print ``record`` for programs, or one line for people."""
    if as_json:
        print_json(record)
    else:
        print_line(make_console(), text)
