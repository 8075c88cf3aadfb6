"""Ranking in the catalog: the numbers of an eviction policy, kept in the rows of blocks.

The policy is pure; here is what it is fed from and where its numbers go: columns of ``blocks``, the rows of ``ghosts``
(what was evicted lately), and the one text that is its state for all processes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.store.chain import BlockId
from kvtier.store.eviction.base import LONGEST_CLOCK, EvictionPolicy, PolicyState, Usage
from kvtier.store.tiers.block_states import State
from kvtier.store.tiers.disk.catalog.connection import LONG_SECONDS, Statements

_MIN_GHOSTS = 1024
_GHOSTS_AT_ONCE = 16  # after many blocks were forgotten at once, ghosts follow bit by bit


@dataclass(frozen=True, slots=True)
class Place:
    """What names the file of a block, and what it takes."""

    key: str
    root: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Valued:
    """A block, and what the policy knows of it."""

    place: Place
    parent: str
    usage: Usage
    priority: float


class Valuation:
    """The policy of one catalog."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy

    def session(self, connection: Statements) -> Session:
        """Return what values blocks within the transaction that ``connection`` has open."""
        return Session(self._policy, connection)


class Session:
    """Values blocks within one transaction. ``end`` writes down what the policy has learnt."""

    def __init__(self, policy: EvictionPolicy, connection: Statements) -> None:
        self._policy = policy
        self._connection = connection
        (self._text,) = connection.execute("SELECT policy FROM total").fetchone()
        self._state = self._read_state()
        # Of each queue, the priority and key of the last leaf that the index gave, and leaves that it has not, a heap.
        self._passed: list[tuple[float, bytes]] = [(-math.inf, b"")] * 2
        self._exposed: tuple[list[_Leaf], list[_Leaf]] = ([], [])

    def _read_state(self) -> PolicyState:
        """Return what the policy has learnt; where that cannot be read, a fresh state that no block is younger than."""
        state = PolicyState.from_text(self._text, self._policy.name)
        if state is None:
            with self._connection.limited(LONG_SECONDS):
                (last_use,) = self._connection.execute("SELECT COALESCE(MAX(last_use), -1) FROM blocks").fetchone()
            state = PolicyState(clock=min(last_use + 1, LONGEST_CLOCK))
        return state

    def end(self) -> None:
        """Write down the state, if it is another one."""
        text = self._state.to_text(self._policy.name)
        if text != self._text:
            self._connection.execute("UPDATE total SET policy = ?", (text,))
            self._text = text

    def entered(self, block: BlockId, depth_tokens: int, nbytes: int) -> tuple[Usage, float]:
        """Return what is known of a block that is put now, and its priority."""
        key = bytes.fromhex(block.key)
        ghost = self._connection.execute("SELECT uses, last_use FROM ghosts WHERE key = ?", (key,)).fetchone()
        usage = Usage(0, self._state.clock, len(block.tokens), depth_tokens, nbytes)
        if ghost is not None:
            usage = Usage(ghost[0], ghost[1], len(block.tokens), depth_tokens, nbytes)
            self._state = self._policy.returned(usage, self._state)
            self._connection.execute("DELETE FROM ghosts WHERE key = ?", (key,))
        return usage, self._policy.priority(usage, self._state)

    def used(self, keys: Sequence[str], now: float) -> None:
        """Note that a turn used the blocks ``keys`` at Unix time ``now``."""
        self._state = self._state.tick()
        for key in keys:
            row = self._connection.execute(
                "SELECT uses, last_use, tokens, depth, bytes FROM blocks WHERE key = ?", (bytes.fromhex(key),)
            ).fetchone()
            if row is None:
                continue
            usage = Usage(*row).used(self._state)
            self._connection.execute(
                "UPDATE blocks SET uses = ?, last_use = ?, priority = ?, used_at = ? WHERE key = ?",
                (usage.uses, usage.last_use, self._policy.priority(usage, self._state), now, bytes.fromhex(key)),
            )

    def least(self) -> Valued | None:
        """Return the leaf of the lowest value of those that this session has not returned: the first of two queues.

        A block becomes a leaf when ``evicted`` is told of the last that follows it.
        """
        lead = self._policy.lead(self._state)
        heads = [(row[0] + came_back * lead, came_back, row) for came_back in (0, 1) if (row := self._head(came_back))]
        if not heads:
            return None
        _, came_back, row = min(heads, key=lambda each: each[0])
        priority, key, parent, root, nbytes, uses, last_use, tokens, depth = row
        exposed = self._exposed[came_back]
        if exposed and exposed[0] is row:
            heapq.heappop(exposed)
        else:
            self._passed[came_back] = (priority, key)
        return Valued(
            Place(key.hex(), root.hex(), nbytes), parent.hex(), Usage(uses, last_use, tokens, depth, nbytes), priority
        )

    def _head(self, came_back: int) -> _Leaf | None:
        """Return the first leaf of a queue that was not returned yet: one that came late, or the next in the index."""
        heads: list[_Leaf] = self._exposed[came_back][:1]
        heads += self._connection.execute(
            f"SELECT {_LEAF} FROM blocks INDEXED BY leaves WHERE {_IS_LEAF} AND (uses > 1) = ? "
            "AND (priority, key) > (?, ?) ORDER BY priority, key LIMIT 1",
            (came_back, *self._passed[came_back]),
        )
        return min(heads, default=None)

    def evicted(self, valued: Valued) -> None:
        """Learn from an eviction, and remember the block as a ghost; of those, no more than there are blocks."""
        self._state = self._policy.evicted(valued.usage, valued.priority, self._state)
        self._connection.execute(
            "INSERT INTO ghosts VALUES (?, ?, ?) "
            "ON CONFLICT (key) DO UPDATE SET uses = excluded.uses, last_use = excluded.last_use",
            (bytes.fromhex(valued.place.key), valued.usage.uses, self._state.clock),
        )
        ghosts, blocks = self._connection.execute("SELECT ghosts, blocks FROM total").fetchone()
        too_many = ghosts - max(_MIN_GHOSTS, blocks)
        if too_many > 0:
            self._connection.execute(
                "DELETE FROM ghosts WHERE key IN (SELECT key FROM ghosts ORDER BY last_use LIMIT ?)",
                (min(too_many, _GHOSTS_AT_ONCE),),
            )
        self._expose(bytes.fromhex(valued.parent))

    def _expose(self, key: bytes) -> None:
        """See to it that a block is found that has become a leaf in a part of its queue that was passed already."""
        row = self._connection.execute(f"SELECT {_LEAF} FROM blocks WHERE {_IS_LEAF} AND key = ?", (key,)).fetchone()
        if row is not None:
            came_back = int(row[5] > 1)
            if row[:2] <= self._passed[came_back]:
                heapq.heappush(self._exposed[came_back], row)


_Leaf = tuple[float, bytes, bytes, bytes, int, int, int, int, int]
_LEAF = "priority, key, parent, root, bytes, uses, last_use, tokens, depth"
_IS_LEAF = f"state = {State.READY:d} AND children = 0 AND pins = 0"
