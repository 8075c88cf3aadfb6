"""Results as a table, as JSON and as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from kvtier.cli.bench.machine import Machine
from kvtier.cli.bench.measure import Measured, Row
from kvtier.cli.bench.places import COLD
from kvtier.cli.store.output import Column, print_line, print_table
from kvtier.plots import can_draw, plot_seconds

_COLUMNS = (
    Column("", "left", folds=True),
    Column("median"),
    Column("min – max", dispensable=4),
    Column("faster", dispensable=1),
    Column("reused", dispensable=5),
    Column("same calls", "left", dispensable=2, folds=True),
    Column("against cold", "left", dispensable=3, folds=True),
    Column("control", "left", dispensable=3, folds=True),
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured: a model, and the lengths of its prompts."""

    model: str
    model_type: str
    dtype: str
    prompt_tokens: int
    known_tokens: int
    new_tokens: int
    text: str


def print_measured(console: Console, subject: Subject, machine: Machine, found: Measured) -> None:
    """Print the times, the comparisons and the notes."""
    title = Text.assemble(
        (subject.model, "bold"),
        f" ({subject.model_type}, {subject.dtype}) on {machine.device}: {machine.cpu}, {machine.cores} cores, "
        f"{machine.threads} threads",
        overflow="fold",
    )
    console.print(title)
    print_line(console, "")
    known = f"Time to the first token of {subject.prompt_tokens:,} tokens, {subject.known_tokens:,} of them known"
    print_line(console, known, style="italic")
    print_table(console, _COLUMNS, _rows(found))
    text = (
        f"The prompt is {subject.text}. Seconds are medians from the call of generate(), or of opening the store, to "
        f"the first of {subject.new_tokens} new tokens; files are in the page cache. Tokens and logits are compared "
        "with plain transformers that is fed the same calls, and with the prompt computed in one pass, beside a "
        "control without kvtier: plain transformers that computes the prompt in two passes, against one."
    )
    print_line(console, text, style="dim")
    for note in found.notes:
        print_line(console, note, style="yellow")
    if wrong := ", ".join(row.place for row in found.rows if row.is_wrong):
        text = f"This is a bug in kvtier: bits differ from plain transformers for the same calls ({wrong})."
        print_line(console, text, style="bold red")


def _rows(found: Measured) -> list[tuple[str, ...]]:
    cold = found.row(COLD).median_seconds
    return [
        (
            row.place,
            _seconds(row.median_seconds),
            f"{_seconds(min(row.seconds))} – {_seconds(max(row.seconds))}",
            f"{cold / row.median_seconds:.1f}×",
            _reused(row),
            row.same_calls.text if row.same_calls is not None else "–",
            row.against_cold.text if row.against_cold is not None else "–",
            found.control.text if row.place != COLD else "–",
        )
        for row in found.rows
    ]


def _reused(row: Row) -> str:
    parts = [f"{tokens:,} {tier}" for tier, tokens in row.cached_by_tier.items() if tokens]
    return ", ".join(parts) or "–"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def as_json(subject: Subject, machine: Machine, found: Measured) -> dict[str, Any]:
    """Return all results for programs."""
    cold = found.row(COLD).median_seconds
    rows = []
    for row in found.rows:
        fields = {
            **asdict(row),
            "median_seconds": row.median_seconds,
            "times_faster_than_cold": cold / row.median_seconds,
            "is_wrong": row.is_wrong,
        }
        rows.append(fields)
    return {
        "ok": not any(row.is_wrong for row in found.rows),
        "machine": asdict(machine),
        "subject": asdict(subject),
        "rows": rows,
        "control_two_passes_against_one": asdict(found.control),
        "notes": list(found.notes),
    }


def draw(subject: Subject, machine: Machine, found: Measured, path: Path) -> bool:
    """Draw the times into a PNG file; return False, and do nothing, where matplotlib is not installed."""
    if not can_draw():
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.9 + 0.5 * len(found.rows)), layout="constrained")
    FigureCanvasAgg(figure)  # without a window system
    axes = plot_seconds({row.place: row.seconds for row in found.rows}, COLD, figure.subplots())
    axes.set_title(
        f"{subject.model_type}, {subject.prompt_tokens:,} tokens, {subject.known_tokens:,} known, {machine.device}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    return True
