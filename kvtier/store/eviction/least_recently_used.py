"""LeastRecentlyUsed: evicts the block that was not used for longest."""

from __future__ import annotations

from collections.abc import Mapping

from kvtier.store.eviction.base import PolicyState, Standing, Usage


class LeastRecentlyUsed:
    """Orders blocks by their last use. It learns nothing."""

    name = "least-recently-used/2"
    queues = 1
    initial: Mapping[str, float] = {}

    def is_sound(self, state: PolicyState) -> bool:
        """Return True: there is nothing to check."""
        return True

    def standing(self, usage: Usage, state: PolicyState) -> Standing:
        """Rank a block by the turn that used it."""
        return Standing(0, float(state.clock))

    def lead(self, queue: int, state: PolicyState) -> float:
        """Return 0: there is one queue only."""
        return 0.0

    def evicted(self, usage: Usage, state: PolicyState) -> PolicyState:
        """Change nothing."""
        return state

    def returned(self, ghost: Usage, state: PolicyState) -> PolicyState:
        """Change nothing."""
        return state
