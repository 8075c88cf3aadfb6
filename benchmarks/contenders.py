"""Policies to compare with: classic ones, and the optimum, which knows the future."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.replay import Contender, Place
from benchmarks.trace import Trace
from kvtier.store.eviction.base import EvictionPolicy, Usage, fresh_state


class Library(Contender):
    """A policy of kvtier, fed as the tiers feed it. Ghosts are no more than there are blocks.

    ``weighs``: whether it is told what blocks save, as after some turns of their models.
    """

    def __init__(self, trace: Trace, policy: EvictionPolicy, name: str, *, weighs: bool = True) -> None:
        super().__init__(trace)
        self._saved_seconds = trace.saved_seconds if weighs else [0.0] * len(trace.parents)
        self.name = name
        self.queues = policy.queues
        self.state = fresh_state(policy)
        self.ghosts: dict[int, Usage] = {}
        self._policy = policy
        self._blocks: dict[int, Usage] = {}

    def put(self, block: int) -> Place:
        """See ``Contender``."""
        trace, ghost = self.trace, self.ghosts.pop(block, None)
        usage = Usage(
            0,
            self.state.clock,
            trace.tokens[block],
            trace.depths[block],
            trace.sizes[block],
            saved_seconds=self._saved_seconds[block],
        )
        if ghost is not None:
            self.state = self._policy.returned(ghost, self.state)
            usage = replace(usage, uses=ghost.uses, note=ghost.note)
        return self._place(block, usage)

    def turn_ends(self) -> None:
        """See ``Contender``."""
        self.state = self.state.tick()

    def used(self, block: int) -> Place:
        """See ``Contender``."""
        return self._place(block, self._blocks[block].used(self.state.clock))

    def _place(self, block: int, usage: Usage) -> Place:
        standing = self._policy.standing(usage, self.state)
        self._blocks[block] = replace(usage, note=standing.note)
        return standing.queue, standing.priority

    def pick(self, firsts: Sequence[float | None]) -> int:
        """See ``Contender``."""
        values = [
            (first + self._policy.lead(queue, self.state), queue)
            for queue, first in enumerate(firsts)
            if first is not None
        ]
        return min(values)[1]

    def goes(self, block: int, queue: int) -> Place | None:
        """See ``Contender``."""
        usage = self._blocks.pop(block)
        self.state = self._policy.evicted(usage, self.state)
        self.ghosts[block] = usage
        while len(self.ghosts) > max(len(self._blocks), 1):
            del self.ghosts[next(iter(self.ghosts))]
        return None


class Optimum(Contender):
    """Knows the future: the leaf goes whose next use is farthest away.

    No block is used before the one it follows. So the block whose next use is farthest is a leaf, or as far as one, and
    going by leaves costs nothing: this is Belady's rule. For blocks of one size, no policy that keeps what it is given
    finds more blocks. Where sizes or costs differ it is a good guess, no bound.
    """

    name = "optimum"

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        upcoming: dict[int, float] = {}
        self._next: list[dict[int, float]] = []
        for at in range(len(trace.requests) - 1, -1, -1):
            self._next.append({block: upcoming.get(block, math.inf) for block in trace.requests[at]})
            upcoming.update(dict.fromkeys(trace.requests[at], float(at)))
        self._next.reverse()

    def put(self, block: int) -> Place:
        """See ``Contender``."""
        return 0, -self._next[self.clock][block]

    def used(self, block: int) -> Place:
        """See ``Contender``."""
        return 0, -self._next[self.clock - 1][block]


class Frequency(Contender):
    """LFU: the block goes that fewest turns used since it came; of several, the one that waited longest."""

    name = "LFU"
    _FAR = 2.0**32

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self._uses: dict[int, int] = {}

    def put(self, block: int) -> Place:
        """See ``Contender``."""
        self._uses[block] = 0
        return 0, self.clock

    def used(self, block: int) -> Place:
        """See ``Contender``."""
        self._uses[block] += 1
        return 0, self._uses[block] * self._FAR + self.clock


class GreedyDual(Contender):
    """GDSF: uses times cost over size, plus the value of what went last (Cherkasova, 1998). Knows the true costs."""

    name = "GDSF"

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self._inflation = 0.0
        self._uses: dict[int, int] = {}
        self._mean = sum(trace.operations) / sum(trace.sizes)

    def _place(self, block: int) -> Place:
        density = self.trace.operations[block] / self.trace.sizes[block] / self._mean
        return 0, self._inflation + self._uses[block] * density

    def put(self, block: int) -> Place:
        """See ``Contender``."""
        self._uses[block] = 0
        return self._place(block)

    def used(self, block: int) -> Place:
        """See ``Contender``."""
        self._uses[block] += 1
        return self._place(block)

    def pick(self, firsts: Sequence[float | None]) -> int:
        """See ``Contender``."""
        self._inflation = max(self._inflation, firsts[0] or 0.0)
        return 0


class Balance(Contender):
    """ARC: blocks used once and blocks used again, their shares moved by ghosts of either (Megiddo and Modha, 2003)."""

    name = "ARC"
    queues = 2

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self._queue_of: dict[int, int] = {}
        self._counts = [0, 0]
        self._ghosts: tuple[dict[int, None], dict[int, None]] = ({}, {})
        self._target = 0.0  # blocks that were used once
        self._new: set[int] = set()

    def put(self, block: int) -> Place:
        """See ``Contender``."""
        once, again = self._ghosts
        queue = int(block in once or block in again)
        if block in once:
            self._target = min(sum(self._counts), self._target + max(1.0, len(again) / len(once)))
            del once[block]
        elif block in again:
            self._target = max(0.0, self._target - max(1.0, len(once) / len(again)))
            del again[block]
        self._new.add(block)
        return self._place(block, queue)

    def _place(self, block: int, queue: int) -> Place:
        before = self._queue_of.get(block)
        if before is not None:
            self._counts[before] -= 1
        self._counts[queue] += 1
        self._queue_of[block] = queue
        return queue, self.clock

    def used(self, block: int) -> Place:
        """See ``Contender``."""
        if block in self._new:
            self._new.discard(block)
            return self._place(block, self._queue_of[block])
        return self._place(block, 1)

    def pick(self, firsts: Sequence[float | None]) -> int:
        """See ``Contender``."""
        queue = 0 if self._counts[0] > self._target else 1
        return queue if firsts[queue] is not None else 1 - queue

    def goes(self, block: int, queue: int) -> Place | None:
        """See ``Contender``."""
        capacity = sum(self._counts)
        self._new.discard(block)
        del self._queue_of[block]
        self._counts[queue] -= 1
        self._ghosts[queue][block] = None
        for ghosts in self._ghosts:
            while len(ghosts) > capacity:
                del ghosts[next(iter(ghosts))]
        return None


class ThreeQueues(Contender):
    """S3-FIFO: a tenth for new blocks, the rest for those used again, which go round (Yang and others, 2023)."""

    name = "S3-FIFO"
    queues = 2
    _MOST = 3

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self._places: dict[int, Place] = {}
        self._uses: dict[int, int] = {}
        self._small = 0
        self._ghosts: dict[int, None] = {}
        self._new: set[int] = set()

    def put(self, block: int) -> Place:
        """See ``Contender``."""
        queue = 0
        if block in self._ghosts:
            del self._ghosts[block]
            queue = 1
        self._small += queue == 0
        self._uses[block] = 0
        self._new.add(block)
        self._places[block] = queue, self.clock
        return self._places[block]

    def used(self, block: int) -> Place:
        """See ``Contender``."""
        if block in self._new:
            self._new.discard(block)
        else:
            self._uses[block] = min(self._MOST, self._uses[block] + 1)
        return self._places[block]

    def pick(self, firsts: Sequence[float | None]) -> int:
        """See ``Contender``."""
        queue = 0 if 10 * self._small > len(self._places) else 1
        return queue if firsts[queue] is not None else 1 - queue

    def goes(self, block: int, queue: int) -> Place | None:
        """See ``Contender``."""
        self._small -= queue == 0
        if self._uses[block] > 0:
            self._uses[block] = 0 if queue == 0 else self._uses[block] - 1
            self._places[block] = 1, self.clock
            return self._places[block]
        if queue == 0:
            self._ghosts[block] = None
            while len(self._ghosts) > len(self._places):
                del self._ghosts[next(iter(self._ghosts))]
        del self._places[block], self._uses[block]
        self._new.discard(block)
        return None
