"""What a store holds and has done, as one immutable snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


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
        pinned_blocks: of those, the last ones of pinned names: they and all before them are never evicted.
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
            from some token on), ``shorter`` (what is known ends before), ``damaged``, ``gone``.
        committed_tokens: tokens that were new.
        queued_writes: blocks waiting to be written to disk.
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
    queued_writes: int = 0
    errors: Mapping[str, int] = field(default_factory=_nothing)
    paused: str | None = None
    names: int = 0
