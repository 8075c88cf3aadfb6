"""Ranking in RAM: the numbers of an eviction policy, and ghosts of evicted blocks.

``tiers/disk/catalog/ranking.py`` does the same for files.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from kvtier.store.block import Block
from kvtier.store.eviction.base import EvictionPolicy, Standing, Usage, fresh_state, queue_among


class RamValuation:
    """Ranks the blocks of one RAM tier. Every call takes constant time. Not thread-safe.

    Attributes:
        state: the state of the policy for all blocks together.
        ghosts: the usage of recently evicted blocks, by key, the oldest first.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self.state = fresh_state(policy)
        self.ghosts: OrderedDict[str, Usage] = OrderedDict()

    def lead(self, queue: int) -> float:
        """Return the number to add to the priorities of ``queue`` now."""
        return self._policy.lead(queue_among(self._policy, queue), self.state)

    def entered(self, block: Block, nbytes: int) -> tuple[Usage, Standing]:
        """Rank a block that is put now."""
        usage = Usage(0, self.state.clock, len(block.id.tokens), block.depth_tokens, nbytes)
        ghost = self.ghosts.pop(block.id.key, None)
        if ghost is not None:
            self.state = self._policy.returned(ghost, self.state)
            usage = replace(ghost, last_use=self.state.clock, nbytes=nbytes)
        return self._ranked(usage)

    def tick(self) -> None:
        """Begin the next turn."""
        self.state = self.state.tick()

    def used(self, usage: Usage) -> tuple[Usage, Standing]:
        """Rank a block that this turn used."""
        return self._ranked(usage.used(self.state.clock))

    def _ranked(self, usage: Usage) -> tuple[Usage, Standing]:
        standing = self._policy.standing(usage, self.state)
        return replace(usage, note=standing.note), standing

    def evicted(self, key: str, usage: Usage, most_ghosts: int) -> None:
        """Learn from an eviction, and keep the block as one of at most ``most_ghosts`` ghosts."""
        self.state = self._policy.evicted(usage, self.state)
        self.ghosts[key] = usage
        while len(self.ghosts) > most_ghosts:
            self.ghosts.popitem(last=False)
