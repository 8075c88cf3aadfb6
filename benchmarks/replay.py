"""A store without tensors: replays a trace under a policy and counts what it would have found.

A request finds the longest beginning of its chain that is there. Then the rest is put, block after block, each making
room by letting leaves go, never its own parent; when nothing else can go, the rest is not kept. At its end the turn has
used all of its blocks that are there. The tiers of a store do the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.trace import ROOT, Trace

Place = tuple[int, float]
"""The queue in which a block waits for its end, and its order there: the lowest is the first."""
_Heap = list[tuple[float, int, int]]


class Contender:
    """Decides which leaf goes first. Learns of every block by its number.

    Attributes:
        name: what tables call it.
        queues: how many there are.
        clock: turns so far.
    """

    name = ""
    queues = 1

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.clock = 0

    def put(self, block: int) -> Place:
        """Return where a block waits that was not there."""
        raise NotImplementedError

    def turn_ends(self) -> None:
        """Note that the blocks of the turn are about to be used."""
        self.clock += 1

    def used(self, block: int) -> Place:
        """Return where a block waits that the turn used; called for a block that this turn has put, too."""
        raise NotImplementedError

    def pick(self, firsts: Sequence[float | None]) -> int:
        """Return the queue whose first leaf is to go; ``firsts`` has their orders, None where there is no leaf."""
        return 0

    def goes(self, block: int, queue: int) -> Place | None:
        """Let a block go, or return where it waits instead."""
        return None


@dataclass(frozen=True, slots=True)
class Found:
    """Which shares of all that was asked for were there: of blocks, of tokens, of operations to compute them."""

    blocks: float
    tokens: float
    operations: float


class Replay:
    """What a contender keeps within ``capacity`` bytes."""

    def __init__(self, trace: Trace, contender: Contender, capacity: float) -> None:
        self.present: dict[int, Place] = {}
        self.children: dict[int, int] = {}
        self.nbytes = 0
        self._trace = trace
        self._contender = contender
        self._capacity = capacity
        self._heaps: list[_Heap] = [[] for _ in range(contender.queues)]
        self._order = 0

    def run(self) -> Found:
        """Replay all requests."""
        trace = self._trace
        asked, found = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        for chain in trace.requests:
            known = self.turn(chain)
            for counts, blocks in ((asked, chain), (found, chain[:known])):
                counts[0] += len(blocks)
                counts[1] += sum(trace.tokens[block] for block in blocks)
                counts[2] += sum(trace.operations[block] for block in blocks)
        return Found(*(f / a for f, a in zip(found, asked, strict=True)))

    def turn(self, chain: Sequence[int]) -> int:
        """Replay one request; return how many of its blocks were there."""
        known = next((at for at, block in enumerate(chain) if block not in self.present), len(chain))
        kept = known
        for block in chain[known:]:
            if not self._make_room(self._trace.sizes[block], self._trace.parents[block]):
                break
            self._put(block)
            kept += 1
        self._contender.turn_ends()
        for block in chain[:kept]:
            place = self._contender.used(block)
            if place != self.present[block]:
                self.present[block] = place
                self._queue(block)
        return known

    def _put(self, block: int) -> None:
        self.present[block] = self._contender.put(block)
        self.nbytes += self._trace.sizes[block]
        parent = self._trace.parents[block]
        if parent != ROOT:
            self.children[parent] = self.children.get(parent, 0) + 1
        self._queue(block)

    def _queue(self, block: int) -> None:
        """List a leaf where it waits. Where it was listed before, it is passed over."""
        if not self.children.get(block):
            queue, order = self.present[block]
            self._order += 1
            heapq.heappush(self._heaps[queue], (order, self._order, block))

    def _make_room(self, nbytes: int, keep: int) -> bool:
        while self.nbytes + nbytes > self._capacity:
            firsts = [self._first(queue, keep) for queue in range(len(self._heaps))]
            orders = [None if first is None else self.present[first][1] for first in firsts]
            if not any(order is not None for order in orders):
                return False
            queue = self._contender.pick(orders)
            victim = firsts[queue]
            assert victim is not None, f"{self._contender.name} picked an empty queue"
            self._pop(queue, victim)
        return True

    def _first(self, queue: int, keep: int) -> int | None:
        """Return the first leaf of a queue that is not ``keep``."""
        heap, aside, found = self._heaps[queue], None, None
        while heap and found is None:
            order, _, block = heap[0]
            if self.present.get(block) != (queue, order) or self.children.get(block):
                heapq.heappop(heap)  # it waits elsewhere, is no leaf, or is gone
            elif block == keep:
                aside = heapq.heappop(heap)
            else:
                found = block
        if aside is not None:
            heapq.heappush(heap, aside)
        return found

    def _pop(self, queue: int, block: int) -> None:
        elsewhere = self._contender.goes(block, queue)
        if elsewhere is not None:
            self.present[block] = elsewhere
            self._queue(block)
            return
        del self.present[block]
        self.nbytes -= self._trace.sizes[block]
        parent = self._trace.parents[block]
        if parent != ROOT:
            self.children[parent] -= 1
            if parent in self.present:
                self._queue(parent)
