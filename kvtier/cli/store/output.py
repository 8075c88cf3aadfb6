"""Output of the commands: tables and lines for people, JSON for programs.

Columns that do not fit into the terminal are left out and named, not wrapped. JSON has stable keys, units in their
names, and times as Unix seconds.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvtier.errors import ConfigurationError
from kvtier.store.names import NamedPrefix
from kvtier.units import parse_bytes

_SPAN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d|w)\s*")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def span(seconds: float) -> str:
    """Return a duration in its largest whole unit, rounded down: ``45 s``, ``12 min``, ``3 h``, ``20 d``."""
    for unit, factor in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= factor:
            return f"{int(seconds // factor)} {unit}"
    return f"{max(0, int(seconds))} s"


def moment(unix_seconds: float) -> str:
    """Return a time in the local time zone: ``2026-01-31 09:05:00``."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))


def parse_span(text: str, option: str) -> float:
    """Return the seconds in ``text``, e.g. ``30d``, ``12h``, ``1.5 h``.

    Raises:
        ConfigurationError: ``text`` is not a duration above 0; the message names ``option``.
    """
    match = _SPAN.fullmatch(text)
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not seconds:
        raise ConfigurationError(
            f"{option}={text!r:.80} is not a duration; write a number above 0 and s, min, h, d or w, e.g. 30d or 12h."
        )
    return seconds


def parse_size(text: str, option: str) -> int:
    """Return the bytes in ``text``, e.g. ``10GiB``; 0 is allowed.

    Raises:
        ConfigurationError: ``text`` is not a byte count; the message names ``option``.
    """
    return 0 if text.strip() == "0" else parse_bytes(text, option)


_GAP = 2
_NARROWEST = 16  # a long name is folded down to this width before columns are left out
_WIDTH_OF_A_FILE = 200  # without a terminal


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        title: its heading.
        justify: alignment of its cells.
        dispensable: 0 if it must be shown; the larger, the sooner it is left out.
        folds: whether its cells may wrap to the next line.
    """

    title: str
    justify: Literal["left", "right"] = "right"
    dispensable: int = 0
    folds: bool = False


def plain(text: object) -> str:
    """Return ``text`` in one line without control characters: it may come from an untrusted file."""
    return "".join(each if each.isprintable() else "\ufffd" for each in str(text))


def make_console() -> Console:
    """Return the console of standard output, as wide as the terminal, or wide without a terminal."""
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


def print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Print facts, one line each."""
    width = max(len(title) for title, _ in facts)
    for title, text in facts:
        console.print(Text.assemble((f"{title:<{width}}", "bold"), "  ", plain(text)), soft_wrap=True)


def print_json(record: Mapping[str, Any]) -> None:
    """Print one object to standard output."""
    sys.stdout.write(json.dumps(record, indent=1) + "\n")


def print_result(record: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print ``record`` for programs, or one line for people."""
    if as_json:
        print_json(record)
    else:
        print_line(make_console(), text)


def name_record(named: NamedPrefix) -> dict[str, Any]:
    """Return a named prefix for programs."""
    return {
        "name": named.name,
        "root": named.root,
        "tokens": named.tokens,
        "kept_tokens": named.kept_tokens,
        "bytes": named.nbytes,
        "own_bytes": named.own_bytes,
        "created_unix_seconds": named.created_at,
        "used_unix_seconds": named.used_at,
        "expires_unix_seconds": named.expires_at,
        "hits": named.hits,
        "pinned": named.pinned,
    }
