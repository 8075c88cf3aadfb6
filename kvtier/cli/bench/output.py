"""Results as a table, as JSON and as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvtier.cli.bench.machine import Machine
from kvtier.cli.bench.measure import Measured, Row
from kvtier.cli.bench.places import COLD
from kvtier.plots import can_draw, plot_seconds
from kvtier.report.text import duration_text


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
    console.print(
        f"[bold]{escape(subject.model)}[/] ({subject.model_type}, {subject.dtype}) on {escape(machine.device)}: "
        f"{escape(machine.cpu)}, {machine.cores} cores, {machine.threads} threads",
        highlight=False,
    )
    console.print(_table(subject, found))
    text = (
        f"The prompt is {subject.text}. Seconds are medians from the call of generate(), or of opening the store, to "
        f"the first of {subject.new_tokens} new tokens; files are in the page cache. Tokens and logits are compared "
        "with plain transformers that is fed the same calls, and with the prompt computed in one pass, beside a "
        "control without kvtier: plain transformers that computes the prompt in two passes, against one."
    )
    console.print(f"[dim]{escape(text)}[/]", highlight=False)
    for note in found.notes:
        console.print(f"[yellow]{escape(note)}[/]", highlight=False)
    if any(row.is_wrong for row in found.rows):
        console.print("[bold red]Bits differ from plain transformers for the same calls. This is a bug in kvtier.[/]")


def _table(subject: Subject, found: Measured) -> Table:
    table = Table(
        title=f"Time to the first token of {subject.prompt_tokens:,} tokens, {subject.known_tokens:,} of them known",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for heading in ("median", "min – max", "faster", "reused"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("same calls")
    table.add_column("against cold")
    table.add_column("control")
    cold = found.row(COLD).median_seconds
    for row in found.rows:
        wrong = "[bold red]{}[/]" if row.is_wrong else "{}"
        table.add_row(
            row.place,
            duration_text(row.median_seconds),
            f"{duration_text(min(row.seconds))} – {duration_text(max(row.seconds))}",
            f"{cold / row.median_seconds:.1f}×",
            _reused(row),
            wrong.format(row.same_calls.text) if row.same_calls is not None else "–",
            row.against_cold.text if row.against_cold is not None else "–",
            found.control.text if row.place != COLD else "–",
        )
    return table


def _reused(row: Row) -> str:
    parts = [f"{tokens:,} {tier}" for tier, tokens in row.cached_by_tier.items() if tokens]
    return ", ".join(parts) or "–"


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
