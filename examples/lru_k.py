"""LRU-K as an eviction policy: the block goes first whose K-th last use is longest ago.

O'Neil, O'Neil and Weikum, "The LRU-K page replacement algorithm for database disk buffering", SIGMOD 1993. A prompt
that was used often stays, even while many prompts pass by that are used once.

    from kvtier import PrefixStore, TieredCache
    cache = TieredCache(PrefixStore("~/.cache/kvtier", policy=LruK(2)))

A test subclasses ``kvtier.testing.PolicyChecks`` to see that both tiers follow it.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvtier.store.eviction import PolicyState, Standing, Usage

_SELDOM, _OFTEN = 0, 1


class LruK:
    """Blocks with fewer than ``k`` uses go first, by their last use; then the others, by their ``k``-th last use.

    The note of a block holds how often it was used, and when lately: a block that returns after its eviction was not
    used by that.
    """

    queues = 2
    initial: Mapping[str, float] = {}

    def __init__(self, k: int = 2) -> None:
        self.name = f"lru-{k}/1"
        self._k = k

    def is_sound(self, state: PolicyState) -> bool:
        """Return True: there is nothing to check."""
        return True

    def standing(self, usage: Usage, state: PolicyState) -> Standing:
        """Rank a block by its ``k``-th last use."""
        uses, *turns = map(int, usage.note.split()) if usage.note else (0,)
        if usage.uses > uses:
            turns = [*turns, usage.last_use][-self._k :]
        note = " ".join(map(str, [usage.uses, *turns]))
        if len(turns) < self._k:
            return Standing(_SELDOM, float(usage.last_use), note)
        return Standing(_OFTEN, float(turns[0]), note)

    def lead(self, queue: int, state: PolicyState) -> float:
        """Return more than any turn for blocks with ``k`` uses: they outstay all others."""
        return state.clock + 1.0 if queue == _OFTEN else 0.0

    def evicted(self, usage: Usage, state: PolicyState) -> PolicyState:
        """Change nothing."""
        return state

    def returned(self, ghost: Usage, state: PolicyState) -> PolicyState:
        """Change nothing."""
        return state
