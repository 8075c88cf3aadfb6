"""Pictures of reports, predictions and benchmark results. matplotlib draws them: ``pip install 'kvtier[plots]'``.

Every function takes ``axes`` to draw into, by default those of a new pyplot figure, and returns them:
``plot_turns(cache.history).figure.savefig("turns.png")``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from statistics import median
from typing import Any

from kvtier.errors import ConfigurationError
from kvtier.report import TurnReport
from kvtier.report.html import COMPUTED_COLOUR, LOWER_TIER_COLOUR, TIER_COLOURS

_KVTIER, _COLD = "#00796b", "0.6"
HOW_TO_DRAW = "matplotlib draws pictures: pip install 'kvtier[plots]'"


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot_turns(reports: Iterable[TurnReport], axes: Any = None) -> Any:
    """Draw a bar for each turn: how many of its prompt tokens came from which tier, and how many were computed.

    Colours are those of reports in notebooks. The legend is to the right of the axes, where it covers no bar: a figure
    with ``layout="constrained"`` makes room.

    Args:
        reports: such as ``cache.history``.
        axes: of matplotlib.

    Returns:
        The axes.

    Raises:
        ConfigurationError: there is no report, or matplotlib is not installed.
    """
    shown = _some(reports, "reports")
    axes = _axes(axes)
    numbers = range(1, len(shown) + 1)
    tiers = list(dict.fromkeys([*TIER_COLOURS, *(tier for report in shown for tier in report.cached_by_tier)]))
    heights = {tier: [report.cached_by_tier.get(tier, 0) for report in shown] for tier in tiers}
    heights["computed"] = [report.computed_tokens for report in shown]
    bottoms = [0] * len(shown)
    for name, tokens in heights.items():
        if not any(tokens):
            continue
        color = COMPUTED_COLOUR if name == "computed" else TIER_COLOURS.get(name, LOWER_TIER_COLOUR)
        axes.bar(numbers, tokens, bottom=bottoms, label=name, color=color)
        bottoms = [below + height for below, height in zip(bottoms, tokens, strict=True)]
    axes.set_xlabel("turn")
    axes.set_ylabel("prompt tokens")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if any(bottoms):
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, reverse=True)
    return axes


def plot_first_token(reports: Iterable[TurnReport], axes: Any = None) -> Any:
    """Draw the seconds to the first token of each turn against the length of its prompt, beside those of a cold one.

    Turns without reuse, or whose first token was not timed, are left out.

    Args:
        reports: such as ``cache.history``.
        axes: of matplotlib.

    Returns:
        The axes.

    Raises:
        ConfigurationError: no report has a time, or matplotlib is not installed.
    """
    shown = _some((report for report in reports if report.first_token_seconds), "reports with a first_token_seconds")
    axes = _axes(axes)
    cold = sorted((report.prompt_tokens, report.cold_seconds) for report in shown if report.cold_seconds)
    if cold:
        axes.plot(*zip(*cold, strict=True), color=_COLD, linestyle="--", marker=".", label="cold, expected")
    times = [(report.prompt_tokens, report.first_token_seconds) for report in shown]
    axes.scatter(*zip(*times, strict=True), color=_KVTIER, label="this turn", zorder=3)
    axes.set_ylim(bottom=0)
    return _labelled(axes, "prompt tokens")


def plot_seconds(times: Mapping[str, Sequence[float]], baseline: str | None = None, axes: Any = None) -> Any:
    """Draw a bar for each way to the first token: the median of its seconds, with the least and the most.

    Args:
        times: way → seconds, one for each round. Ways of kvtier have "kvtier" or "Tiered" in their name.
        baseline: the way that the others are compared with; how many times faster they are stands beside their bars.
        axes: of matplotlib.

    Returns:
        The axes.

    Raises:
        ConfigurationError: there is no way, or the baseline is none of them, or matplotlib is not installed.
    """
    ways = _some(times, "times")[::-1]
    if baseline is not None and baseline not in times:
        raise ConfigurationError(f"baseline={baseline!r:.80} is none of the ways {ways}.")
    axes = _axes(axes)
    medians = [median(times[way]) for way in ways]
    least = [middle - min(times[way]) for way, middle in zip(ways, medians, strict=True)]
    most = [max(times[way]) - middle for way, middle in zip(ways, medians, strict=True)]
    colors = [_KVTIER if "kvtier" in way or "Tiered" in way else _COLD for way in ways]
    bars = axes.barh(ways, medians, xerr=[least, most], color=colors, capsize=3)
    slow = median(times[baseline]) if baseline is not None else 0.0
    labels = [_seconds(each) + (f" ({slow / each:.0f}×)" if slow else "") for each in medians]
    axes.bar_label(bars, labels, padding=5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(min(medians) / 3, max(medians) * 8)
    axes.set_xlabel("seconds to the first token (median, least and most)")
    return axes


def plot_lengths(
    lines: Mapping[str, Iterable[tuple[float, float]]], axes: Any = None, x_label: str = "known tokens"
) -> Any:
    """Draw seconds to the first token against a length or a bandwidth, a line for each way.

    Both scales are logarithmic.

    Args:
        lines: way → pairs of a length and seconds.
        axes: of matplotlib.
        x_label: what the lengths are.

    Returns:
        The axes.

    Raises:
        ConfigurationError: there is no line, or matplotlib is not installed.
    """
    ways = _some(lines, "lines")
    axes = _axes(axes)
    for way in ways:
        points = sorted(lines[way])
        is_plain = not ("kvtier" in way or "Tiered" in way)
        axes.plot(*zip(*points, strict=True), marker=".", label=way, linestyle="--" if is_plain else "-")
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_major_formatter("{x:g}")
    return _labelled(axes, x_label)


def plot_break_even(plan: Mapping[str, Any], axes: Any = None) -> Any:
    """Draw what ``kvtier plan --json`` predicts: computing a prompt, and loading it from each tier, by its length.

    Loading is worth it where its line lies below the one of computing.

    Args:
        plan: the JSON object of ``kvtier plan MODEL --json``; more ``--tokens`` give smoother lines.
        axes: of matplotlib.

    Returns:
        The axes.

    Raises:
        ConfigurationError: ``plan`` is not such an object, or matplotlib is not installed.
    """
    try:
        rows = [(row["tokens"], row["cold_seconds"], row["load_seconds"]) for row in plan["predictions"]]
    except (KeyError, TypeError) as error:
        raise ConfigurationError("plan must be the object that `kvtier plan MODEL --json` prints.") from error
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for tokens, cold, load in rows:
        lines["computed"].append((tokens, cold))
        for tier, seconds in load.items():
            lines[f"kvtier, from {tier}"].append((tokens, seconds))
    return plot_lengths(lines, axes, "prompt tokens, all but the last one known")


def benchmark_lines(result: Mapping[str, Any], x: str, **where: Any) -> dict[str, list[tuple[float, float]]]:
    """Return the lines that a result of ``make bench`` has for ``plot_lengths``.

    Args:
        result: the JSON object of a file of ``benchmarks/results``.
        x: the fact of its cases that tells the length, e.g. ``known_tokens``.
        where: other facts, and the values that a case must have to count.
    """
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for case in result["cases"]:
        facts = case["facts"]
        if x in facts and all(facts.get(key) == value for key, value in where.items()):
            for row in case["rows"]:
                lines[row["name"]].append((facts[x], row["spread"]["median"]))
    return dict(lines)


def _axes(axes: Any) -> Any:
    if axes is not None:
        return axes
    if not can_draw():
        raise ConfigurationError(f"{HOW_TO_DRAW}.")
    from matplotlib import pyplot

    return pyplot.subplots(layout="constrained")[1]


def _labelled(axes: Any, x_label: str) -> Any:
    axes.set_xlabel(x_label)
    axes.set_ylabel("seconds to the first token")
    axes.legend()
    return axes


def _some(values: Iterable[Any], what: str) -> list[Any]:
    found = list(values)
    if not found:
        raise ConfigurationError(f"there is nothing to draw: {what} is empty.")
    return found


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
