"""Results of the turns of ``kvtier demo``, and how they are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvtier.cli.store.output import print_facts, print_line

_HEADINGS = ("prompt", "device", "RAM", "disk", "computed", "plain", "kvtier", "faster", "tokens")
_WIDTH_OF_TABLE = 80


@dataclass(frozen=True, slots=True)
class TurnResult:
    """One turn on a TieredCache, as the new process reports it to its parent."""

    sequence: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    cached_by_tier: Mapping[str, int]
    first_token_seconds: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a turn, and plain transformers on the same prompt."""

    title: str
    result: TurnResult
    cold_seconds: float
    equal: bool


def print_results(console: Console, rows: Sequence[Row]) -> None:
    """Print a table, or in a narrow terminal a list for each turn."""
    title = "Tokens of each prompt by where they came from; seconds to the first token"
    if console.width < _WIDTH_OF_TABLE:
        print_line(console, title)
        for row in rows:
            print_line(console, "")
            print_line(console, row.title, style="bold")
            print_facts(console, list(zip(_HEADINGS, _cells(row), strict=True)))
        return
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=0)  # so that it fits into 80 columns
    table.add_column("turn", no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading == "tokens" else "right", no_wrap=True)
    for row in rows:
        *figures, tokens = _cells(row)
        table.add_row(row.title, *figures, Text(tokens, style="" if row.equal else "bold red"))
    console.print(table, soft_wrap=False)


def _cells(row: Row) -> tuple[str, ...]:
    """Return what stands below each of the headings."""
    result = row.result
    return (
        str(result.prompt_tokens),
        *(str(result.cached_by_tier.get(tier, 0)) for tier in ("device", "host", "disk")),
        str(result.computed_tokens),
        f"{row.cold_seconds:.2f}",
        f"{result.first_token_seconds:.2f}",
        # Without reuse there is no gain: the two times beside it show the overhead, and the noise.
        f"{row.cold_seconds / result.first_token_seconds:.1f}×" if result.cached_tokens else "–",
        "equal" if row.equal else "differ",
    )
