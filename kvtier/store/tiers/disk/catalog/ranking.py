"""Ranking in the catalog: the numbers of an eviction policy, kept in the rows of blocks.

The policy is pure. This module reads its inputs and stores its numbers: in columns of ``blocks``, rows of ``ghosts``
(recently evicted blocks), and one text, which is its state for all processes.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvtier.store.chain import BlockId
from kvtier.store.eviction.base import (
    LONGEST_CLOCK,
    MOST_QUEUES,
    EvictionPolicy,
    PolicyState,
    SavedSeconds,
    Standing,
    Usage,
    fresh_state,
    nothing_known,
    queue_among,
    state_from_text,
    state_to_text,
)
from kvtier.store.tiers.block_states import State
from kvtier.store.tiers.disk.catalog.connection import LONG_SECONDS, Statements

_MIN_GHOSTS = 1024
_GHOSTS_AT_ONCE = 16  # after many blocks were forgotten at once, ghosts follow in steps


@dataclass(frozen=True, slots=True)
class Place:
    """Key and root of a block, which give its file, and its bytes."""

    key: str
    root: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Valued:
    """A block, with its data for the policy."""

    place: Place
    parent: str
    usage: Usage


class Session:
    """Ranks blocks within the open transaction of ``connection``. ``end`` stores the state of the policy."""

    def __init__(
        self, policy: EvictionPolicy, connection: Statements, saved_seconds: SavedSeconds = nothing_known
    ) -> None:
        self._policy = policy
        self._connection = connection
        self._saved_seconds = saved_seconds
        (self._text,) = connection.execute("SELECT policy FROM total").fetchone()
        self._state = self._read_state()
        # For each queue: priority and key of the last leaf from the index, and a heap of later leaves before it.
        self._passed: defaultdict[int, tuple[float, bytes]] = defaultdict(lambda: (-math.inf, b""))
        self._exposed: defaultdict[int, list[_Leaf]] = defaultdict(list)
        self._heads: dict[int, _Leaf | None] = {}  # the first leaves of queues, as far as nothing has changed them
        self._known_queues: list[int] | None = None

    def _read_state(self) -> PolicyState:
        """Return the stored state of the policy; if unreadable, a fresh one, later than every use of a block."""
        state = state_from_text(self._policy, self._text)
        if state is None:
            with self._connection.limited(LONG_SECONDS):
                (last_use,) = self._connection.execute("SELECT COALESCE(MAX(last_use), -1) FROM blocks").fetchone()
            state = fresh_state(self._policy, clock=min(last_use + 1, LONGEST_CLOCK))
        return state

    def end(self) -> None:
        """Store the state, if it has changed."""
        text = state_to_text(self._policy, self._state)
        if text != self._text:
            self._connection.execute("UPDATE total SET policy = ?", (text,))
            self._text = text

    def entered(self, block: BlockId, depth_tokens: int, nbytes: int) -> tuple[Usage, Standing]:
        """Rank a block that is put now."""
        key = bytes.fromhex(block.key)
        ghost = self._connection.execute("SELECT uses, last_use, note FROM ghosts WHERE key = ?", (key,)).fetchone()
        usage = self._weighed(block.root, Usage(0, self._state.clock, len(block.tokens), depth_tokens, nbytes))
        if ghost is not None:
            uses, last_use, note = ghost
            usage = replace(usage, uses=uses, last_use=last_use, note=note)
            self._state = self._policy.returned(usage, self._state)
            usage = replace(usage, last_use=self._state.clock)
            self._connection.execute("DELETE FROM ghosts WHERE key = ?", (key,))
        return usage, self._policy.standing(usage, self._state)

    def _weighed(self, root: str, usage: Usage) -> Usage:
        saved = self._saved_seconds(root, usage.tokens, usage.depth_tokens, usage.nbytes)
        return replace(usage, saved_seconds=saved)

    def used(self, keys: Sequence[str], now: float) -> None:
        """Note that a turn used the blocks ``keys`` at Unix time ``now``."""
        self._state = self._state.tick()
        for key in keys:
            row = self._connection.execute(
                "SELECT root, uses, last_use, tokens, depth, bytes, note FROM blocks WHERE key = ?",
                (bytes.fromhex(key),),
            ).fetchone()
            if row is None:
                continue
            root, *values = row
            usage = self._weighed(root.hex(), Usage(*values).used(self._state.clock))
            standing = self._policy.standing(usage, self._state)
            self._connection.execute(
                "UPDATE blocks SET uses = ?, last_use = ?, queue = ?, priority = ?, note = ?, used_at = ? "
                "WHERE key = ?",
                (usage.uses, usage.last_use, standing.queue, standing.priority, standing.note, now, bytes.fromhex(key)),
            )

    def least(self) -> Valued | None:
        """Return the leaf of the lowest value that this session has not returned yet: the first of some queue.

        A block becomes a leaf when ``evicted`` is called for its last child.
        """
        heads = []
        if self._known_queues is None:
            self._known_queues = self._queues()
        for queue in self._known_queues:
            if queue not in self._heads:
                self._heads[queue] = self._head(queue)
            if row := self._heads[queue]:
                lead = self._policy.lead(queue_among(self._policy, queue), self._state)
                heads.append((row[0] + lead, queue, row))
        if not heads:
            return None
        _, queue, row = min(heads, key=lambda each: each[0])
        del self._heads[queue]
        priority, key, parent, root, nbytes, uses, last_use, tokens, depth, note, _ = row
        exposed = self._exposed[queue]
        if exposed and exposed[0] is row:
            heapq.heappop(exposed)
        else:
            self._passed[queue] = (priority, key)
        usage = self._weighed(root.hex(), Usage(uses, last_use, tokens, depth, nbytes, note))
        return Valued(Place(key.hex(), root.hex(), nbytes), parent.hex(), usage)

    def _queues(self) -> list[int]:
        """Return the queues that have leaves, also queues of another policy."""
        found: list[int] = []
        while len(found) < MOST_QUEUES:
            row = self._connection.execute(
                f"SELECT queue FROM blocks INDEXED BY leaves WHERE {_IS_LEAF} AND queue > ? ORDER BY queue LIMIT 1",
                (found[-1] if found else -1,),
            ).fetchone()
            if row is None:
                break
            found.append(row[0])
        return found

    def _head(self, queue: int) -> _Leaf | None:
        """Return the first leaf of a queue that was not returned yet: a late leaf, or the next in the index."""
        heads: list[_Leaf] = self._exposed[queue][:1]
        heads += self._connection.execute(
            f"SELECT {_LEAF} FROM blocks INDEXED BY leaves WHERE {_IS_LEAF} AND queue = ? "
            "AND (priority, key) > (?, ?) ORDER BY priority, key LIMIT 1",
            (queue, *self._passed[queue]),
        )
        return min(heads, default=None)

    def evicted(self, valued: Valued) -> None:
        """Learn from an eviction, and keep the block as a ghost.

        Ghosts beyond the number of blocks (or ``_MIN_GHOSTS``, if that is larger) are deleted in steps, the oldest
        first.
        """
        self.would_be_evicted(valued)
        self._connection.execute(
            "INSERT INTO ghosts VALUES (?, ?, ?, ?) ON CONFLICT (key) "
            "DO UPDATE SET uses = excluded.uses, last_use = excluded.last_use, note = excluded.note",
            (bytes.fromhex(valued.place.key), valued.usage.uses, self._state.clock, valued.usage.note),
        )
        ghosts, blocks = self._connection.execute("SELECT ghosts, blocks FROM total").fetchone()
        too_many = ghosts - max(_MIN_GHOSTS, blocks)
        if too_many > 0:
            self._connection.execute(
                "DELETE FROM ghosts WHERE key IN (SELECT key FROM ghosts ORDER BY last_use LIMIT ?)",
                (min(too_many, _GHOSTS_AT_ONCE),),
            )

    def would_be_evicted(self, valued: Valued) -> None:
        """Do the part of ``evicted`` that decides which blocks follow: ghosts count for blocks that are put."""
        self._state = self._policy.evicted(valued.usage, self._state)
        self._expose(bytes.fromhex(valued.parent))

    def _expose(self, key: bytes) -> None:
        """Note a block that has become a leaf in the part of its queue that was read already."""
        row = self._connection.execute(f"SELECT {_LEAF} FROM blocks WHERE {_IS_LEAF} AND key = ?", (key,)).fetchone()
        if row is not None:
            queue = row[-1]
            self._heads.pop(queue, None)
            if self._known_queues is not None and queue not in self._known_queues:
                self._known_queues.append(queue)
            if row[:2] <= self._passed[queue]:
                heapq.heappush(self._exposed[queue], row)


_Leaf = tuple[float, bytes, bytes, bytes, int, int, int, int, int, str, int]
_LEAF = "priority, key, parent, root, bytes, uses, last_use, tokens, depth, note, queue"
_IS_LEAF = f"state = {State.READY:d} AND children = 0 AND pins = 0"
