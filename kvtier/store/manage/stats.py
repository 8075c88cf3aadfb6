"""Statistics of a store, as one immutable value."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kvtier.store.tiers.base import TierStats
from kvtier.store.tiers.stack import TierStack


def _nothing() -> Mapping[str, int]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class StoreStats:
    """One store. Counts are those of this process since it opened the store.

    Attributes:
        path: the folder; None for a store in RAM.
        tiers: RAM first, then disk.
        lookups: prompts (or rows of one) that were matched.
        lookup_tokens: their tokens.
        hit_tokens: of those, tokens that were found.
        misses: lookups that found less than all, by reason: ``unknown`` (no stored prefix matches the start),
            ``diverged`` (other ids from some token on), ``shorter`` (the stored prefix ends before); and blocks that
            were ``damaged``, ``gone`` or ``unavailable`` (they could not be read).
        committed_tokens: newly stored tokens.
        written_bytes: bytes of block files that were written.
        queued_writes: blocks waiting to be written to disk, or for their conversation to rest.
        errors: failures that cost a recompute, by what failed: ``write``, ``read``, ``catalog``, ``delete``.
        paused: why disk writes are paused; None when they are not.
        names: how many names there are.
    """

    path: str | None
    tiers: tuple[TierStats, ...]
    lookups: int = 0
    lookup_tokens: int = 0
    hit_tokens: int = 0
    misses: Mapping[str, int] = field(default_factory=_nothing)
    committed_tokens: int = 0
    written_bytes: int = 0
    queued_writes: int = 0
    errors: Mapping[str, int] = field(default_factory=_nothing)
    paused: str | None = None
    names: int = 0


def store_stats(path: str | None, tiers: TierStack, tally: Mapping[str, int], queued_writes: int) -> StoreStats:
    """Return the numbers of a store.

    Args:
        path: its folder.
        tiers: its tiers.
        tally: the counts of the store itself: ``lookups``, ``hits.<tier>``, ``misses.<reason>`` …
        queued_writes: blocks waiting to be written.
    """
    tier_stats = tiers.stats(tally)
    try:
        name_count = len(tiers.names)
    except sqlite3.Error:  # the tier has warned of it by now
        name_count = 0
    return StoreStats(
        path=path,
        tiers=tier_stats,
        lookups=tally.get("lookups", 0),
        lookup_tokens=tally.get("lookup_tokens", 0),
        hit_tokens=tally.get("hit_tokens", 0),
        misses=_by_reason(tally, "misses."),
        committed_tokens=tally.get("committed_tokens", 0),
        written_bytes=tiers.counts.get("written_bytes", 0),
        queued_writes=queued_writes,
        errors=_by_reason(tiers.counts, "errors."),
        paused=tiers.paused,
        names=name_count,
    )


def _by_reason(counts: Mapping[str, int], prefix: str) -> Mapping[str, int]:
    found = sorted(counts.items())
    return MappingProxyType({what.removeprefix(prefix): n for what, n in found if what.startswith(prefix)})
