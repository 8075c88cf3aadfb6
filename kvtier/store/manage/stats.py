"""Statistics of a store, and its bytes by root, as immutable values."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from kvtier.store.block import Entry
from kvtier.store.tiers.base import TierStats
from kvtier.store.tiers.stack import TierStack
from kvtier.units import size


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
        not_worth_writing: new blocks that stayed in RAM, because no turn gains by loading them from disk.
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
    not_worth_writing: int = 0

    def __repr__(self) -> str:
        """Return the place, the bytes of each tier, and how many tokens were found."""
        tiers = ", ".join(f"{each.tier} {size(each.nbytes)} in {each.blocks:,} blocks" for each in self.tiers)
        found = f"{self.hit_tokens:,} of {self.lookup_tokens:,} tokens found"
        state = ", writing is paused" if self.paused else ""
        return f"<StoreStats of {self.path or 'RAM'}: {tiers}; {found}{state}>"


def store_stats(path: Path | None, tiers: TierStack, tally: Mapping[str, int], queued_writes: int) -> StoreStats:
    """Return the numbers of a store; ``tally`` counts ``lookups``, ``hits.<tier>``, ``misses.<reason>`` and so on."""
    tier_stats = tiers.stats(tally)
    try:
        name_count = len(tiers.names)
    except sqlite3.Error:  # the tier has warned of it by now
        name_count = 0
    return StoreStats(
        path=str(path) if path is not None else None,
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
        not_worth_writing=tally.get("not_worth_writing", 0),
    )


def _by_reason(counts: Mapping[str, int], prefix: str) -> Mapping[str, int]:
    found = sorted(counts.items())
    return MappingProxyType({what.removeprefix(prefix): n for what, n in found if what.startswith(prefix)})


@dataclass(frozen=True, slots=True)
class RootUsage:
    """The bytes of one root: a model, with everything else that decides K and V.

    Attributes:
        root: the root.
        blocks: its blocks.
        nbytes: their bytes.
        named_bytes: of those, bytes of blocks that at least one name uses.
    """

    root: str
    blocks: int
    nbytes: int
    named_bytes: int


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """The bytes of all blocks.

    Attributes:
        roots: usage by root, the largest first.
        unnamed_chains: how many sequences have no name.
    """

    roots: tuple[RootUsage, ...]
    unnamed_chains: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(root.nbytes for root in self.roots)

    @property
    def unnamed_bytes(self) -> int:
        """Bytes of blocks that no name uses."""
        return self.nbytes - sum(root.named_bytes for root in self.roots)


def measure(entries: Iterable[Entry], named: Container[str]) -> StoreUsage:
    """Add up ``entries``, all blocks of a store; ``named`` has the keys of all blocks that names use."""
    blocks: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    named_bytes: Counter[str] = Counter()
    ends: set[str] = set()
    parents: set[str] = set()
    for entry in entries:
        parents.add(entry.parent)
        if not entry.is_window and entry.key not in named:
            ends.add(entry.key)
        blocks[entry.root] += 1
        nbytes[entry.root] += entry.nbytes
        if entry.key in named:
            named_bytes[entry.root] += entry.nbytes
    roots = (RootUsage(root, blocks[root], nbytes[root], named_bytes[root]) for root in blocks)
    return StoreUsage(tuple(sorted(roots, key=lambda root: (-root.nbytes, root.root))), len(ends - parents))
