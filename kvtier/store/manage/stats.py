"""What a store holds and has done, as one immutable snapshot."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kvtier.store.tiers.disk.names import Names
from kvtier.store.tiers.disk.tier import DiskTier
from kvtier.store.tiers.host.tier import HostTier


def _nothing() -> Mapping[str, int]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier.

    Attributes:
        tier: ``host`` or ``disk``.
        nbytes: bytes that its blocks take: tensors in RAM; on disk whole allocation units, blocks being written and
            blocks that could not be deleted yet included.
        budget_bytes: what ``nbytes`` never exceeds.
        blocks: blocks that can be found.
        pinned_blocks: of those, what is never evicted.
        leased_blocks: blocks that this process is reading right now.
        hits: blocks restored from here. Like all counts below: by this process, since the store was opened.
        evictions: blocks that went to make room.
        expirations: blocks that went because nothing used them for ``ttl``.
    """

    tier: str
    nbytes: int = 0
    budget_bytes: int = 0
    blocks: int = 0
    pinned_blocks: int = 0
    leased_blocks: int = 0
    hits: int = 0
    evictions: int = 0
    expirations: int = 0


@dataclass(frozen=True, slots=True)
class StoreStats:
    """One store. Counts are those of this process since it opened the store.

    Attributes:
        path: the folder; None for a store in RAM.
        tiers: RAM first, then disk.
        lookups: prompts (or rows of one) that were matched.
        lookup_tokens: their tokens.
        hit_tokens: of those, tokens that were found.
        misses: lookups that found less than all, by reason: ``unknown`` (nothing begins so), ``diverged`` (other ids
            from some token on), ``shorter`` (what is known ends before), ``damaged``, ``gone``;
            and blocks that could not be read: ``unavailable``.
        committed_tokens: tokens that were new.
        written_bytes: bytes of block files that were written.
        queued_writes: blocks waiting to be written to disk, or for their conversation to rest.
        errors: failures that cost a recompute, by what failed: ``write``, ``read``, ``catalog``, ``delete``.
        paused: why nothing is written to disk at the moment; None when writing goes on.
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


def snapshot(
    path: str | None,
    host: HostTier,
    disk: DiskTier | None,
    names: Names,
    pinned: frozenset[str],
    tally: Mapping[str, int],
    queued_writes: int,
) -> StoreStats:
    """Return the numbers of a store.

    Args:
        path: its folder.
        host: the RAM tier.
        disk: the file tier, if there is one.
        names: its names.
        pinned: blocks that are pinned in RAM.
        tally: what the store itself has counted: ``lookups``, ``hits.<tier>``, ``misses.<reason>`` …
        queued_writes: blocks waiting to be written.
    """
    tiers = [
        TierStats(
            "host",
            nbytes=host.nbytes,
            budget_bytes=host.budget_bytes,
            blocks=len(host),
            pinned_blocks=sum(key in host for key in pinned),
            leased_blocks=len(host.leases),
            hits=tally.get("hits.host", 0),
            evictions=host.counts["evictions"],
            expirations=host.counts["expirations"],
        )
    ]
    if disk is not None:
        blocks, pinned_blocks = disk.ask(disk.catalog.counts, (0, 0))
        tiers.append(
            TierStats(
                "disk",
                nbytes=disk.nbytes,
                budget_bytes=disk.settings.budget_bytes,
                blocks=blocks,
                pinned_blocks=pinned_blocks,
                leased_blocks=len(disk.leases),
                hits=tally.get("hits.disk", 0),
                evictions=disk.counts["evictions"],
                expirations=disk.counts["expirations"],
            )
        )
    try:
        name_count = len(names)
    except sqlite3.Error:  # the tier has warned of it by now
        name_count = 0
    return StoreStats(
        path=path,
        tiers=tuple(tiers),
        lookups=tally.get("lookups", 0),
        lookup_tokens=tally.get("lookup_tokens", 0),
        hit_tokens=tally.get("hit_tokens", 0),
        misses=_by_reason(tally, "misses."),
        committed_tokens=tally.get("committed_tokens", 0),
        written_bytes=disk.counts["written_bytes"] if disk is not None else 0,
        queued_writes=queued_writes,
        errors=_by_reason(disk.counts if disk is not None else {}, "errors."),
        paused=disk.paused if disk is not None else None,
        names=name_count,
    )


def _by_reason(counts: Mapping[str, int], prefix: str) -> Mapping[str, int]:
    found = sorted(counts.items())
    return MappingProxyType({what.removeprefix(prefix): n for what, n in found if what.startswith(prefix)})
