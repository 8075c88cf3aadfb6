"""Reports as HTML for notebooks: a bar by tier, without scripts or resources from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

TIER_COLOURS = {"device": "#2a9d8f", "host": "#4c8bf5", "disk": "#9b6dd6"}
LOWER_TIER_COLOUR, COMPUTED_COLOUR = "#d08770", "#8c8c8c"
"""Colours of tokens by where they came from, here and in ``kvtier.plots``. Read on white and on black."""
_TEXT = "font-size:0.9em;line-height:1.5"
_BAR = "display:flex;height:0.9em;max-width:40em;border-radius:3px;overflow:hidden;margin:0.3em 0"


def bar_html(title: str, cached_by_tier: Mapping[str, int], computed_tokens: int, rows: Mapping[str, str]) -> str:
    """Return a title, a bar with a part for each tier and for computed tokens, its legend, and a table.

    Text has the colour of the page, which may be light or dark.

    Args:
        title: one line.
        cached_by_tier: reused tokens by tier.
        computed_tokens: the other tokens.
        rows: the lines of the table, names and values.
    """
    parts = [(tier, n, TIER_COLOURS.get(tier, LOWER_TIER_COLOUR)) for tier, n in cached_by_tier.items()]
    parts = [part for part in (*parts, ("computed", computed_tokens, COMPUTED_COLOUR)) if part[1] > 0]
    bar = "".join(
        f'<div style="flex:{tokens} 0 0;background:{colour}" title="{escape(name)}: {tokens:,} tokens"></div>'
        for name, tokens, colour in parts
    )
    legend = " ".join(
        f'<span style="white-space:nowrap;margin-right:1em"><span style="color:{colour}">&#9632;</span> '
        f"{escape(name)} {tokens:,}</span>"
        for name, tokens, colour in parts
    )
    cell = '<td style="text-align:left;padding:0 1em 0 0;line-height:1.5;background:none">'
    lines = "".join(
        f'<tr style="background:none">{cell}{escape(name)}</td>{cell}{escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    table = f'<table style="border:none;background:none">{lines}</table>' if lines else ""
    whole = f'<div style="{_BAR}">{bar}</div><div>{legend}</div>' if parts else ""
    return f'<div style="{_TEXT}"><div>{escape(title)}</div>{whole}{table}</div>'
