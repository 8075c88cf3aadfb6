"""What was measured, drawn from ``benchmarks/results`` by ``kvtier.plots``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from docs.pictures.canvas import DARK_INK, DARK_PAPER
from kvtier.plots import benchmark_lines, plot_lengths, plot_seconds

_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
_SETTINGS: Mapping[str, Any] = {
    "svg.fonttype": "none",  # words stay words
    "svg.hashsalt": "kvtier",  # the same names in every run
    "font.family": "sans-serif",
    "path.simplify": False,
}
_PLAIN_STYLE = '<style type="text/css">*{stroke-linejoin: round; stroke-linecap: butt}</style>'
# matplotlib writes colours into each element: paper and ink are exchanged by what it writes.
_DARK_STYLE = f"""<style type="text/css">
  @media (prefers-color-scheme: dark) {{
    text {{ fill: {DARK_INK} }}
    [style*="fill: #ffffff"] {{ fill: {DARK_PAPER} !important }}
    [style*="stroke: #000000"] {{ stroke: {DARK_INK} !important }}
  }}
</style>"""
_WAYS = {
    "DynamicCache, cold": "plain transformers, cold",
    "DynamicCache, same object": "plain transformers, same object",
    "TieredCache, same object": "kvtier, same object",
    "TieredCache, from RAM": "kvtier, from RAM",
    "TieredCache, from disk, raw": "kvtier, from files",
    "TieredCache, new process, raw": "kvtier, from files, new process",
}


def first_token() -> str:
    """Draw seconds to the first token of the longest prompt of ``ttft.json``, a bar for each way."""
    cases = _result("ttft")["cases"]
    case = max(cases, key=lambda each: each["facts"]["known_tokens"])
    times = {_WAYS[row["name"]]: row["samples"] for row in case["rows"] if row["name"] in _WAYS}

    def draw(axes: Any) -> None:
        plot_seconds(times, axes=axes)
        facts = case["facts"]
        axes.set_title(
            f"{facts['prompt_tokens']:,} prompt tokens, {facts['known_tokens']:,} of them known", fontsize=11
        )

    return _drawn(draw, (8.0, 3.4))


def break_even() -> str:
    """Draw seconds to the first token by the bandwidth of a link, for the longest prefix of ``break_even.json``."""
    result = _result("break_even")
    longest = max(case["facts"]["prefix_tokens"] for case in result["cases"])
    found = benchmark_lines(result, "bytes_per_second", prefix_tokens=longest, latency_seconds=0.0)
    lines = {way: [(x / 1e6, seconds) for x, seconds in points] for way, points in found.items()}

    def draw(axes: Any) -> None:
        plot_lengths(lines, axes, "MB/s of the link that the store is behind").get_legend().set_loc("lower left")
        axes.set_title(
            f"a known prefix of {longest:,} tokens: computed, loaded, or what is expected sooner", fontsize=11
        )

    return _drawn(draw, (8.0, 4.0))


def _result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((_RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _drawn(draw: Any, size: tuple[float, float]) -> str:
    import matplotlib.style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", dict(_SETTINGS)]):  # whatever the settings of the reader are
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        written = StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    picture = written.getvalue()
    if _PLAIN_STYLE not in picture:
        raise ValueError(f"matplotlib no longer writes {_PLAIN_STYLE}, which the dark colours are put behind.")
    lines = picture.replace(_PLAIN_STYLE, f"{_PLAIN_STYLE}\n{_DARK_STYLE}").splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"
