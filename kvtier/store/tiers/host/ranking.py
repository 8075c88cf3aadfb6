"""Ranking in RAM: the numbers of an eviction policy, ghosts of evicted blocks, and queues of evictable blocks.

``tiers/disk/catalog/ranking.py`` does the same for files.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection
from dataclasses import replace

from kvtier.store.block import Block
from kvtier.store.eviction.base import (
    EvictionPolicy,
    SavedSeconds,
    Standing,
    Usage,
    fresh_state,
    nothing_known,
    queue_among,
)

Leaf = tuple[float, int, str]
"""Priority, number of the put, key. Of equal priorities, the earliest put is evicted first."""

MOST_STALE = 64
"""A queue keeps this many stale entries more than it has leaves, at most."""


class RamValuation:
    """Ranks the blocks of one RAM tier. Every call takes constant time. Not thread-safe.

    Attributes:
        state: the state of the policy for all blocks together.
        ghosts: the usage of recently evicted blocks, by key, the oldest first.
    """

    def __init__(self, policy: EvictionPolicy, saved_seconds: SavedSeconds = nothing_known) -> None:
        self._policy = policy
        self._saved_seconds = saved_seconds
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
        return self._ranked(block, usage)

    def tick(self) -> None:
        """Begin the next turn."""
        self.state = self.state.tick()

    def used(self, block: Block, usage: Usage) -> tuple[Usage, Standing]:
        """Rank a block that this turn used."""
        return self._ranked(block, usage.used(self.state.clock))

    def _ranked(self, block: Block, usage: Usage) -> tuple[Usage, Standing]:
        saved = self._saved_seconds(block.id.root, usage.tokens, usage.depth_tokens, usage.nbytes)
        usage = replace(usage, saved_seconds=saved)
        standing = self._policy.standing(usage, self.state)
        return replace(usage, note=standing.note), standing

    def evicted(self, key: str, usage: Usage, most_ghosts: int) -> None:
        """Learn from an eviction, and keep the block as one of at most ``most_ghosts`` ghosts."""
        self.state = self._policy.evicted(usage, self.state)
        self.ghosts[key] = usage
        while len(self.ghosts) > most_ghosts:
            self.ghosts.popitem(last=False)


class Queue:
    """Leaves of one queue, the lowest first. Every call takes O(log n) steps, amortised.

    A removed entry stays in the heap as stale until it comes first. The heap is rebuilt before stale entries outnumber
    leaves by more than ``MOST_STALE``.
    """

    def __init__(self) -> None:
        self._heap: list[Leaf] = []
        self._leaves: dict[str, Leaf] = {}

    def add(self, leaf: Leaf) -> None:
        """Add a leaf; it replaces a leaf with the same key."""
        self._leaves[leaf[2]] = leaf
        heapq.heappush(self._heap, leaf)
        self._bound()

    def drop(self, key: str) -> None:
        """Remove a leaf; unknown keys are ignored."""
        if self._leaves.pop(key, None) is not None:
            self._bound()

    def first(self) -> Leaf | None:
        """Return the lowest leaf; None when there is none."""
        while self._heap and self._leaves.get(self._heap[0][2]) is not self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def _bound(self) -> None:
        if len(self._heap) > 2 * len(self._leaves) + MOST_STALE:
            self._heap = list(self._leaves.values())
            heapq.heapify(self._heap)

    def __len__(self) -> int:
        """Return the number of entries, stale ones included."""
        return len(self._heap)


class Leaves:
    """All leaves of a tier, in the queues of an eviction policy.

    A search sets aside a first leaf that must stay, so that the next search does not meet it again. The leaf returns to
    its queue when its last lease ends, or when the pinned blocks change. Not thread-safe, except for ``ended``.

    Args:
        is_leased: whether a block is leased.
        ended: keys of blocks whose last lease has ended. Any thread may add one, once the block is no longer leased.
        pinned: returns the keys of blocks that must stay; a new object whenever the keys change.
    """

    def __init__(
        self, is_leased: Callable[[str], bool], ended: set[str], pinned: Callable[[], Collection[str]]
    ) -> None:
        self._is_leased = is_leased
        self._ended = ended
        self._pinned = pinned
        self._pinned_before: Collection[str] = ()
        self._queues: defaultdict[int, Queue] = defaultdict(Queue)
        self._leased_aside: dict[str, tuple[Queue, Leaf]] = {}
        self._pinned_aside: dict[str, tuple[Queue, Leaf]] = {}

    def put(self, key: str, standing: Standing, number: int) -> None:
        """Add a leaf, or give it another standing."""
        self._return_ended()  # all leaves pass here, so ``ended`` stays bounded
        self.drop(key)
        self._queues[standing.queue].add((standing.priority, number, key))

    def drop(self, key: str) -> None:
        """Remove a block that is gone, or no longer a leaf; unknown keys are ignored."""
        for queue in self._queues.values():
            queue.drop(key)
        for aside in (self._leased_aside, self._pinned_aside):
            aside.pop(key, None)

    def least_valued(self, lead: Callable[[int], float], keep: str) -> str | None:
        """Return the key of the leaf to evict first; None when there is none.

        Args:
            lead: returns the number to add to the priorities of a queue.
            keep: the key of a block that must stay.
        """
        self._return_ended()
        pinned = self._pinned()
        if pinned is not self._pinned_before:
            while self._pinned_aside:
                queue, leaf = self._pinned_aside.popitem()[1]
                queue.add(leaf)
            self._pinned_before = pinned
        found = []
        for number, queue in self._queues.items():
            first = self._first(queue, keep, pinned)
            if first is not None:
                found.append((first[0] + lead(number), *first[1:]))
        return min(found)[2] if found else None

    def _first(self, queue: Queue, keep: str, pinned: Collection[str]) -> Leaf | None:
        kept = None
        while (first := queue.first()) is not None:
            key = first[2]
            if key == keep:
                kept = first
            elif key in pinned:
                self._pinned_aside[key] = queue, first
            elif self._is_leased(key):
                self._leased_aside[key] = queue, first
            else:
                break
            queue.drop(key)
        if kept is not None:
            queue.add(kept)
        return first

    def _return_ended(self) -> None:
        while self._ended:
            aside = self._leased_aside.pop(self._ended.pop(), None)
            if aside is not None:
                aside[0].add(aside[1])
