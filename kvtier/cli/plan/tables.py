"""A plan as people read it."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvtier.cli.plan.figures import Figure
from kvtier.cli.plan.forecast import Forecast
from kvtier.cli.plan.surroundings import Surroundings
from kvtier.costs.break_even import Split
from kvtier.hf.model_sheet import ModelSheet
from kvtier.report.text import duration_text

_TITLES = {
    "kv_bytes_per_token": "K and V of a token",
    "window_bytes": "sliding windows",
    "state_bytes": "states",
    "unknown_state_bytes": "other states",
    "parameters": "parameters",
    "weight_bytes": "weights",
    "operations_per_token": "operations a token",
}


def print_plan(console: Console, model: str, sheet: ModelSheet, where: Surroundings, found: Forecast) -> None:
    """Print the figures of the model and the machine, what fits, and the predictions."""
    dtype = str(sheet.dtype).removeprefix("torch.")
    console.print(f"[bold]{escape(model)}[/] ({sheet.model_type}, {dtype}) on {escape(where.name)}", highlight=False)
    if sheet.not_reusable is not None:
        console.print(
            f"[yellow]kvtier reuses nothing with this model:[/] {escape(sheet.not_reusable)}", highlight=False
        )
    console.print(_figures(sheet, where, found))
    console.print(_fits(found))
    console.print(_predictions(where, found))
    for tier, tokens in found.break_even_tokens.items():
        text = f"loading is no slower from prompts of {tokens:,} tokens on" if tokens else "loading is always slower"
        console.print(f"from {tier}: {text}", highlight=False)
    shared = (
        "both: cores that copy do not compute, so the seconds of the two parts add up."
        if where.shares_cores
        else "both: the front is computed while the rest is loaded from the back; they meet where both take as long."
    )
    longest = sheet.longest_tokens
    if longest is not None and found.predictions and found.predictions[-1].tokens > longest:
        console.print(f"[yellow]The model is made for {longest:,} tokens at most.[/]", highlight=False)
    text = (
        f"Seconds, break-even points and bandwidths are derived: all but the last token of a prompt are known. {shared}"
    )
    console.print(f"[dim]{text}[/]", highlight=False)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)


def _figures(sheet: ModelSheet, where: Surroundings, found: Forecast) -> Table:
    table = _table("\nFigures")
    table.add_column("")
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("origin", no_wrap=True)
    table.add_column("how")

    def add(title: str, figure: Figure) -> None:
        table.add_row(title, figure.text, figure.origin, escape(figure.how))

    for name, figure in found.figures.items():
        add(_TITLES[name], figure)
    add("computing", where.operations)
    if where.pair_operations != where.operations:
        add("attention", where.pair_operations)
    add("reading weights", where.memory)
    for tier, figure in where.rates.items():
        add(f"loading from {tier}", figure)
    for tier, figure in where.latencies.items():
        add(f"wait for {tier}", figure)
    return table


def _fits(found: Forecast) -> Table:
    table = _table("\nWhat fits")
    table.add_column("tier")
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("of a budget of")
    for tier, figure in found.fits.items():
        table.add_row(tier, figure.text if figure.value is not None else "any number", escape(figure.how))
    return table


def _predictions(where: Surroundings, found: Forecast) -> Table:
    table = _table("\nTime to the first token (derived)")
    for heading in ("prompt", "K and V", "cold"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tier in where.rates:
        table.add_column(tier, justify="right", no_wrap=True)
        table.add_column("both (computed)", justify="right", no_wrap=True)
    table.add_column("break-even", justify="right", no_wrap=True)
    for each in found.predictions:
        cells = [
            f"{each.tokens:,}",
            Figure(each.prefix_bytes, "bytes", "derived", "").text,
            duration_text(each.cold_seconds),
        ]
        for tier in where.rates:
            cells += [duration_text(each.load_seconds[tier]), _split(each.both[tier], each.tokens)]
        even = Figure(each.break_even_bytes_per_second, "bytes/s", "derived", "")
        table.add_row(*cells, even.text)
    return table


def _split(split: Split, tokens: int) -> str:
    return f"{duration_text(split.seconds)} ({split.computed_tokens / tokens:.0%})"
