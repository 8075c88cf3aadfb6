"""What one turn reused and why: the values behind ``TieredCache.last_turn``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token at which a prompt left what was known."""

    index: int
    expected: int
    seen: int


@dataclass(frozen=True, slots=True)
class RowReport:
    """One row of a batch: its tokens without padding, and how many of them were reused."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int = 0
    divergence: Divergence | None = None


def _no_tiers() -> Mapping[str, int]:
    return MappingProxyType({"window": 0, "host": 0, "disk": 0})


@dataclass(frozen=True, slots=True)
class TurnReport:
    """One turn, summed over its rows.

    Attributes:
        prompt_tokens: tokens of all prompts, padding left out.
        cached_tokens: of those, the tokens whose K and V were reused.
        computed_tokens: of those, the tokens the model had to compute.
        generated_tokens: new tokens, up to each row's end of sequence; 0 until the turn is committed.
        cached_by_tier: ``cached_tokens`` by where they came from: ``window``, ``host``, ``disk``.
        restored_bytes: bytes of K and V copied from the store into the windows.
        restore_seconds: time this turn spent matching, waiting for pages and copying them.
        miss_reason: why not more was reused; None when all that can be was.
        divergence: the first token at which row 0 left the best known prefix.
        rows: the same, row by row.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    cached_by_tier: Mapping[str, int] = field(default_factory=_no_tiers)
    restored_bytes: int = 0
    restore_seconds: float = 0.0
    miss_reason: str | None = None
    divergence: Divergence | None = None
    rows: tuple[RowReport, ...] = ()
