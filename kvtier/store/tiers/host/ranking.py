"""Ranking in RAM: the numbers that an eviction policy works with, and ghosts of evicted blocks.

``valuation`` is the same for the catalog of files.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from kvtier.store.block import Block
from kvtier.store.eviction.base import EvictionPolicy, PolicyState, Usage


class RamValuation:
    """Values the blocks of one RAM tier. Every call takes constant time. Not thread-safe.

    Attributes:
        state: what the policy remembers of all blocks together.
        ghosts: the usage of blocks that were evicted lately, by key, the oldest first.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self.state = PolicyState()
        self.ghosts: OrderedDict[str, Usage] = OrderedDict()

    @property
    def lead(self) -> float:
        """How much more leaves are worth now that came back."""
        return self._policy.lead(self.state)

    def entered(self, block: Block, nbytes: int) -> tuple[Usage, float]:
        """Return what is known of a block that is put now, and its priority."""
        usage = Usage(0, self.state.clock, len(block.id.tokens), block.depth_tokens, nbytes)
        ghost = self.ghosts.pop(block.id.key, None)
        if ghost is not None:
            self.state = self._policy.returned(ghost, self.state)
            usage = replace(ghost, last_use=self.state.clock, nbytes=nbytes)
        return usage, self._policy.priority(usage, self.state)

    def tick(self) -> None:
        """Begin the next turn."""
        self.state = self.state.tick()

    def used(self, usage: Usage) -> tuple[Usage, float]:
        """Return what is known of a block after this turn used it, and its priority."""
        usage = usage.used(self.state)
        return usage, self._policy.priority(usage, self.state)

    def evicted(self, key: str, usage: Usage, priority: float, most_ghosts: int) -> None:
        """Learn from an eviction, and remember the block as one of ``most_ghosts`` ghosts."""
        self.state = self._policy.evicted(usage, priority, self.state)
        self.ghosts[key] = usage
        while len(self.ghosts) > most_ghosts:
            self.ghosts.popitem(last=False)
