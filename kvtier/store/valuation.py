"""Valuation: what blocks of the catalog are worth, by the numbers that an eviction policy keeps in their rows.

The policy is pure; here is what it is fed from and where its numbers go: columns of ``blocks``, the rows of ``ghosts``
(what was evicted lately), and the one text that is its state for all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.store.chain import BlockId
from kvtier.store.connection import Statements
from kvtier.store.eviction import LONGEST_CLOCK, EvictionPolicy, PolicyState, Usage
from kvtier.store.lifecycle import State

PINNED = "EXISTS (SELECT 1 FROM links WHERE links.key = blocks.key AND links.pinned)"
_MIN_GHOSTS = 1024


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

    def _read_state(self) -> PolicyState:
        """Return what the policy has learnt; where that cannot be read, a fresh state that no block is younger than."""
        state = PolicyState.from_text(self._text, self._policy.name)
        if state is None:
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

    def least(self, passed: set[str]) -> Valued | None:
        """Return the leaf of the lowest value that is not in ``passed``: the first of one of two queues."""
        lead, firsts = self._policy.lead(self._state), []
        for came_back in (0, 1):
            rows = self._connection.execute(
                "SELECT key, root, bytes, uses, last_use, tokens, depth, priority FROM blocks INDEXED BY leaves "
                f"WHERE state = {State.READY:d} AND children = 0 AND (uses > 1) = {came_back} AND NOT {PINNED} "
                "ORDER BY priority"
            )
            row = next((row for row in rows if row[0].hex() not in passed), None)
            if row is not None:
                firsts.append((row[7] + came_back * lead, row))
        if not firsts:
            return None
        row = min(firsts, key=lambda each: each[0])[1]
        return Valued(Place(row[0].hex(), row[1].hex(), row[2]), Usage(row[3], row[4], row[5], row[6], row[2]), row[7])

    def evicted(self, valued: Valued) -> None:
        """Learn from an eviction, and remember the block as a ghost; of those, no more than there are blocks."""
        self._state = self._policy.evicted(valued.usage, valued.priority, self._state)
        self._connection.execute(
            "INSERT OR REPLACE INTO ghosts VALUES (?, ?, ?)",
            (bytes.fromhex(valued.place.key), valued.usage.uses, self._state.clock),
        )
        (ghosts,) = self._connection.execute("SELECT COUNT(*) FROM ghosts").fetchone()
        if ghosts > _MIN_GHOSTS:
            (blocks,) = self._connection.execute("SELECT COUNT(*) FROM blocks").fetchone()
            self._connection.execute(
                "DELETE FROM ghosts WHERE key IN (SELECT key FROM ghosts ORDER BY last_use LIMIT ?)",
                (max(0, ghosts - max(_MIN_GHOSTS, blocks)),),
            )
