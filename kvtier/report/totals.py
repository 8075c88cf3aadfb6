"""Totals over the turns of a cache, and the log that adds them up."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from kvtier.report.html import bar_html
from kvtier.report.text import reused_text, seconds_text
from kvtier.report.turn import TurnReport

MOST_REPORTS = 1000


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all turns of a cache that have ended.

    Attributes:
        turns: turns that have ended.
        turns_without_reuse: of those, turns for which reuse was off, so that their prompts were not read.
        prompt_tokens: tokens of their prompts, without padding.
        cached_tokens: of those, the tokens whose K and V were reused.
        computed_tokens: of those, the tokens the model had to compute.
        generated_tokens: new tokens.
        cached_by_tier: ``cached_tokens`` by source tier.
        restored_bytes: bytes of K and V copied from the store into the buffers.
        restore_seconds: time spent matching, waiting for pages and copying them.
        first_token_seconds: time until the prompts were computed.
        saved_seconds: by how much that was less than what computing the prompts was expected to take, over the turns
            that reused tokens and whose cost was known; negative where reuse took longer.
        estimated_turns: how many turns ``saved_seconds`` is about.
    """

    turns: int = 0
    turns_without_reuse: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    cached_by_tier: Mapping[str, int] = field(
        default_factory=lambda: MappingProxyType({"device": 0, "host": 0, "disk": 0}), hash=False
    )
    restored_bytes: int = 0
    restore_seconds: float = 0.0
    first_token_seconds: float = 0.0
    saved_seconds: float = 0.0
    estimated_turns: int = 0

    def plus(self, report: TurnReport) -> Totals:
        """Return the sums with one more turn."""
        by_tier = Counter(self.cached_by_tier)
        by_tier.update(report.cached_by_tier)
        is_estimated = bool(report.cached_tokens and report.cold_seconds and report.first_token_seconds)
        saved = report.cold_seconds - report.first_token_seconds if is_estimated else 0.0
        return Totals(
            turns=self.turns + 1,
            turns_without_reuse=self.turns_without_reuse + (not report.prompt_tokens),
            prompt_tokens=self.prompt_tokens + report.prompt_tokens,
            cached_tokens=self.cached_tokens + report.cached_tokens,
            computed_tokens=self.computed_tokens + report.computed_tokens,
            generated_tokens=self.generated_tokens + report.generated_tokens,
            cached_by_tier=MappingProxyType(dict(by_tier)),
            restored_bytes=self.restored_bytes + report.restored_bytes,
            restore_seconds=self.restore_seconds + report.restore_seconds,
            first_token_seconds=self.first_token_seconds + report.first_token_seconds,
            saved_seconds=self.saved_seconds + saved,
            estimated_turns=self.estimated_turns + is_estimated,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "cached_by_tier": dict(self.cached_by_tier)}

    def __str__(self) -> str:
        """Return one line."""
        turns = f"{self.turns:,} turn{'s' * (self.turns != 1)}"
        parts = [f"{turns}: {reused_text(self.cached_tokens, self.prompt_tokens, self.cached_by_tier)}"]
        if self.first_token_seconds:
            parts.append(f"first tokens {seconds_text(self.first_token_seconds)}")
        if self.saved_seconds > 0:
            parts.append(f"about {seconds_text(self.saved_seconds)} saved")
        if self.turns_without_reuse:
            parts.append(f"reuse was off in {self.turns_without_reuse:,}")
        return "; ".join(parts)

    def _repr_html_(self) -> str:
        """Return the sums as a bar of where the prompts' tokens came from, for notebooks."""
        return bar_html(str(self), self.cached_by_tier, self.computed_tokens, {})

    def __reduce__(self) -> Any:
        """Return how to make equal totals: a read-only mapping cannot be pickled as it is."""
        return _again, (self.to_dict(),)


def _again(values: dict[str, Any]) -> Totals:
    return Totals(**{**values, "cached_by_tier": MappingProxyType(values["cached_by_tier"])})


class TurnLog:
    """The reports of the last turns that have ended, and the totals of all. Its memory is bounded."""

    def __init__(self, most: int = MOST_REPORTS) -> None:
        self._reports: deque[TurnReport] = deque(maxlen=most)
        self.totals = Totals()

    def add(self, report: TurnReport) -> None:
        """Add the report of a turn that has ended."""
        self._reports.append(report)
        self.totals = self.totals.plus(report)

    @property
    def reports(self) -> tuple[TurnReport, ...]:
        """The last reports, the oldest first."""
        return tuple(self._reports)
