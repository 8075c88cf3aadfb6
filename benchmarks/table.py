"""A result as people read it."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.measure import Spread
from benchmarks.result import Case, Result, Unit


def print_result(console: Console, result: Result) -> None:
    """Print every case as a table, then targets, notes, and answers that are wrong."""
    console.print(f"\n[bold]{result.benchmark}[/]: {escape(result.purpose.strip())}")
    for case in result.cases:
        console.print(_table(case))
    for target in result.targets:
        verdict = "[green]met[/]" if target.met else "[bold yellow]missed[/]"
        figure = f"{target.measured:.3g} {target.unit} (target: {target.sense} {target.bound:g} {target.unit})"
        console.print(f"{verdict}  {escape(target.statement)}: {figure}", highlight=False)
    for note in result.notes:
        console.print(f"[dim]{escape(note)}[/]", highlight=False)
    for wrong in result.wrong:
        console.print(f"[bold red]wrong answer[/]  {escape(wrong)}", highlight=False)


def _table(case: Case) -> Table:
    table = Table(title=case.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(no_wrap=True)
    for heading in ("median", "min – max"):
        table.add_column(heading, justify="right", no_wrap=True)
    if case.baseline is not None:
        table.add_column("faster" if case.ratio_kind == "speedup" else "× baseline", justify="right", no_wrap=True)
        table.add_column("min – max", justify="right", no_wrap=True)
    if case.reference is not None:
        table.add_column("tokens")
    for row in case.rows:
        cells = [row.name, format_value(row.spread.median, case.unit), _range(row.spread, case.unit)]
        if row.ratio is not None:
            cells += [f"{row.ratio.median:.2f}×", f"{row.ratio.minimum:.2f} – {row.ratio.maximum:.2f}"]
        if case.reference is not None:
            cells.append(f"[bold red]{row.answer}[/]" if row.wrong else row.answer)
        table.add_row(*cells)
    return table


def _range(spread: Spread, unit: Unit) -> str:
    return f"{format_value(spread.minimum, unit)} – {format_value(spread.maximum, unit)}"


def format_value(value: float, unit: Unit) -> str:
    """Return a figure with three digits and a unit that suits it."""
    if unit == "bytes":
        return f"{value / 1e6:.0f} MB"
    if unit == "share":
        return f"{value:.2%}"
    return f"{value * 1000:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
