"""Names of prefixes: what a person called a conversation, and which chain that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NamedPrefix:
    """A prefix or conversation that has a name.

    Attributes:
        name: what it is called.
        root: what else decides its K and V.
        tokens: how many tokens it has.
        kept_tokens: of those, how many the store still has; all of them while it is pinned.
        nbytes: bytes on disk (in RAM for a store without folder) of its blocks, shared ones included.
        own_bytes: of those, what no other sequence uses: ``forget`` would free them.
        tokens_by_tier: ``kept_tokens`` by the fastest tier that has them: ``host``, ``disk``.
        created_at: Unix time at which it was named.
        used_at: Unix time of its last use.
        hits: how often its last kept block was reused.
        pinned: whether it is never evicted.
        expires_at: Unix time at which it is forgotten unless used before; None for never.
    """

    name: str
    root: str
    tokens: int
    kept_tokens: int
    nbytes: int
    own_bytes: int
    tokens_by_tier: Mapping[str, int]
    created_at: float
    used_at: float
    hits: int
    pinned: bool
    expires_at: float | None
