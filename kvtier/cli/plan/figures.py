"""Figure: one number of a plan, with its origin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvtier.report.text import duration_text

Origin = Literal["measured here", "derived", "data sheet", "assumed", "given"]
"""Where a figure comes from: a probe on this machine, a formula, a data sheet, a common value, or an option."""

Unit = Literal["bytes", "bytes/s", "operations/s", "operations", "parameters", "tokens", "s"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, its unit, and how it was found.

    Attributes:
        value: the number; None where it is not known.
        unit: its unit.
        origin: where it comes from.
        how: the formula, the probe or the source, in a few words.
    """

    value: float | None
    unit: Unit
    origin: Origin
    how: str

    @property
    def text(self) -> str:
        """The number as people read it."""
        return "–" if self.value is None else readable(self.value, self.unit)

    def as_json(self) -> dict[str, Any]:
        """Return the figure for programs."""
        return {"value": self.value, "unit": self.unit, "origin": self.origin, "how": self.how}


def readable(value: float, unit: Unit) -> str:
    """Return a number with about three digits and a prefix that suits it."""
    if unit == "tokens":
        return f"{value:,.0f}"
    if unit == "s":
        return duration_text(value)
    if unit == "bytes" and value < 10_000_000:
        return f"{value / 1024:.4g} KiB"
    short = {"bytes": "B", "bytes/s": "B/s", "operations/s": "op/s", "operations": "op"}.get(unit, "")
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{short}"
    return f"{value:.3g} {short}".rstrip()
