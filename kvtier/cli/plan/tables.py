"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from kvtier.cli.plan.figures import Figure, seconds
from kvtier.cli.plan.forecast import Forecast
from kvtier.cli.plan.surroundings import Surroundings
from kvtier.cli.store.output import Column, print_line, print_table
from kvtier.costs.break_even import Split
from kvtier.hf.model_sheet import ModelSheet

_TITLES = {
    "kv_bytes_per_token": "K and V of a token",
    "window_bytes": "sliding windows",
    "state_bytes": "states",
    "unknown_state_bytes": "other states",
    "parameters": "parameters",
    "weight_bytes": "weights",
    "operations_per_token": "operations a token",
}
_FIGURES = (
    Column("", "left"),
    Column("figure"),
    Column("origin", "left", dispensable=1),
    Column("how", "left", dispensable=2, folds=True),
)
_FITS = (Column("tier", "left"), Column("tokens"), Column("of a budget of", "left", folds=True))


def print_plan(console: Console, model: str, sheet: ModelSheet, where: Surroundings, found: Forecast) -> None:
    """Print the figures of the model and the machine, what fits, and the predictions."""
    dtype = str(sheet.dtype).removeprefix("torch.")
    title = Text.assemble((model, "bold"), f" ({sheet.model_type}, {dtype}) on {where.name}", overflow="fold")
    console.print(title)
    if sheet.not_reusable is not None:
        print_line(console, f"kvtier reuses nothing with this model: {sheet.not_reusable}", style="yellow")
    _print(console, "Figures", _FIGURES, _figures(where, found))
    fits = [
        (tier, figure.text if figure.value is not None else "any number", figure.how)
        for tier, figure in found.fits.items()
    ]
    _print(console, "What fits", _FITS, fits)
    _print(console, "Time to the first token (derived)", *_predictions(where, found))
    for tier, tokens in found.break_even_tokens.items():
        text = f"loading is no slower from prompts of {tokens:,} tokens on" if tokens else "loading is always slower"
        print_line(console, f"from {tier}: {text}")
    shared = (
        "both: cores that copy do not compute, so the seconds of the two parts add up."
        if where.shares_cores
        else "both: the front is computed while the rest is loaded from the back; they meet where both take as long."
    )
    longest = sheet.longest_tokens
    if longest is not None and found.predictions and found.predictions[-1].tokens > longest:
        print_line(console, f"The model is made for {longest:,} tokens at most.", style="yellow")
    text = (
        "Seconds, break-even points and bandwidths are derived: all but the last token of a prompt are known. "
        f"{shared} In brackets is the share of the prompt that is computed."
    )
    print_line(console, text, style="dim")


def _print(console: Console, title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    print_line(console, "")
    print_line(console, title, style="italic")
    print_table(console, columns, rows)


def _figures(where: Surroundings, found: Forecast) -> list[tuple[str, ...]]:
    figures = [(_TITLES[name], figure) for name, figure in found.figures.items()]
    figures.append(("computing", where.operations))
    if where.pair_operations != where.operations:
        figures.append(("attention", where.pair_operations))
    figures.append(("reading weights", where.memory))
    figures += [(f"loading from {tier}", figure) for tier, figure in where.rates.items()]
    figures += [(f"wait for {tier}", figure) for tier, figure in where.latencies.items()]
    return [(title, figure.text, figure.origin, figure.how) for title, figure in figures]


def _predictions(where: Surroundings, found: Forecast) -> tuple[list[Column], list[list[str]]]:
    columns = [Column("prompt"), Column("K and V", dispensable=3), Column("cold")]
    for tier in where.rates:
        columns += [Column(tier), Column(f"{tier} (both)", dispensable=1)]
    columns.append(Column("break-even", dispensable=2))
    rows = []
    for each in found.predictions:
        cells = [f"{each.tokens:,}", Figure(each.prefix_bytes, "bytes", "derived", "").text, seconds(each.cold_seconds)]
        for tier in where.rates:
            cells += [seconds(each.load_seconds[tier]), _split(each.both[tier], each.tokens)]
        rows.append([*cells, Figure(each.break_even_bytes_per_second, "bytes/s", "derived", "").text])
    return columns, rows


def _split(split: Split, tokens: int) -> str:
    return f"{seconds(split.seconds)} ({split.computed_tokens / tokens:.0%})"
