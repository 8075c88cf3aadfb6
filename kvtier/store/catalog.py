"""Which blocks the disk tier holds: the rows of ``blocks`` and ``ids``, and every change of their state.

A row is prepared before its file appears, so that the byte budget counts it, and it stays until its file is gone. Only
ready rows are ever found. States and moves are those of ``lifecycle``; a move that a row cannot make changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, auto

import numpy as np

from kvtier.store.base import Entry
from kvtier.store.chain import BlockId, TokenIds, common_run
from kvtier.store.connection import Statements
from kvtier.store.database import Database
from kvtier.store.eviction import EvictionPolicy
from kvtier.store.lifecycle import Move, State, after, sources
from kvtier.store.schema import SCHEMA_VERSION
from kvtier.store.valuation import PINNED, Place, Session, Valuation

_REBUILD_CACHE_KIB = 128 * 1024  # rows come in no order: without, each is read from the file again
_KEYS_AT_ONCE = 500  # SQLite takes 999 values in a statement, or more
_FOREVER = float("-inf")
_SAME_IDS = (
    "SELECT ids.key, ids.parent, root, ids FROM ids JOIN blocks ON blocks.key = ids.key "
    f"WHERE ids.parent = ? AND ids = ? AND state = {State.READY:d}"
)
_FOUND = f"state = {State.READY:d} AND (used_at >= :since OR {PINNED})"


class Prepared(Enum):
    """What came of preparing a store."""

    RESERVED = auto()
    """The caller writes the file, then completes or aborts the store."""
    PRESENT = auto()
    """It is there."""
    ELSEWHERE = auto()
    """Another owner is writing it."""
    LEAVING = auto()
    """What was there is being deleted."""
    ORPHAN = auto()
    """Its parent is not there: it could never be found."""
    NO_ROOM = auto()
    """The budget has no room for it now."""


class _NotEnoughError(Exception):
    """Less can be evicted than is needed: what was begun is rolled back."""


class Catalog:
    """The blocks of one store. Thread-safe, and shared by processes. Methods raise ``sqlite3.Error``."""

    def __init__(self, database: Database, policy: EvictionPolicy, clock: Callable[[], float]) -> None:
        self._database = database
        self._valuation = Valuation(policy)
        self._clock = clock

    # --- finding ----------------------------------------------------------------------------------------------------

    def contains(self, key: str, since: float = _FOREVER) -> bool:
        """Whether a block is ready, and was used at ``since`` (Unix time) or later, or is pinned."""
        with self._database.reading() as connection:
            found = connection.execute(
                f"SELECT 1 FROM blocks WHERE key = :key AND {_FOUND}", {"key": bytes.fromhex(key), "since": since}
            ).fetchone()
        return found is not None

    def absent(self, keys: Sequence[str]) -> list[str]:
        """Return those of ``keys`` that are neither ready nor being written."""
        present: set[bytes] = set()
        with self._database.reading() as connection:
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                some = [bytes.fromhex(key) for key in keys[start : start + _KEYS_AT_ONCE]]
                rows = connection.execute(
                    f"SELECT key FROM blocks WHERE key IN ({','.join('?' * len(some))}) "
                    f"AND state IN ({State.READY:d}, {State.WRITING:d})",
                    some,
                )
                present.update(row[0] for row in rows)
        return [key for key in keys if bytes.fromhex(key) not in present]

    def find(self, key: str, since: float = _FOREVER) -> BlockId | None:
        """Return the identity of such a block."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT blocks.key, blocks.parent, root, ids FROM blocks JOIN ids ON ids.parent = blocks.parent "
                f"AND ids.key = blocks.key WHERE blocks.key = :key AND {_FOUND}",
                {"key": bytes.fromhex(key), "since": since},
            ).fetchone()
        return _block_id(row) if row else None

    def nearest(self, parent: str, tokens: TokenIds, since: float = _FOREVER) -> list[BlockId]:
        """Return, of the blocks after ``parent``, the two beside ``tokens`` in the order of their bytes.

        One of them shares the longest run with ``tokens`` that any does: in that order, what two sequences share can
        only shrink with the distance between them.
        """
        found = []
        values = {"parent": bytes.fromhex(parent), "ids": _as_bytes(tokens), "since": since}
        with self._database.reading() as connection:
            for side, order in (("<=", "DESC"), (">", "ASC")):
                row = connection.execute(
                    "SELECT ids.key, ids.parent, root, ids FROM ids JOIN blocks ON blocks.key = ids.key "
                    f"WHERE ids.parent = :parent AND ids {side} :ids AND {_FOUND} ORDER BY ids {order} LIMIT 1",
                    values,
                ).fetchone()
                if row is not None:
                    found.append(_block_id(row))
        return found

    def tails(self, parent: str, tokens: TokenIds) -> list[BlockId]:
        """Return the blocks after ``parent`` that ``tokens`` begin with, and go beyond."""
        found: list[BlockId] = []
        bound, shared = tokens, len(tokens) - 1
        with self._database.reading() as connection:
            while shared > 0:
                # All that is left to find is no longer than what the last neighbour shares with ``tokens``.
                bound = tokens[:shared]
                row = connection.execute(
                    "SELECT ids.key, ids.parent, root, ids FROM ids JOIN blocks ON blocks.key = ids.key WHERE "
                    f"ids.parent = ? AND ids <= ? AND state = {State.READY:d} ORDER BY ids DESC LIMIT 1",
                    (bytes.fromhex(parent), _as_bytes(bound)),
                ).fetchone()
                if row is None:
                    break
                block = _block_id(row)
                shared = common_run(block.tokens, tokens)
                if shared == len(block.tokens):
                    found += map(_block_id, connection.execute(_SAME_IDS, row[1::2]))  # a snapshot beside a block
                    shared -= 1
        return found

    def entry(self, key: str) -> Entry | None:
        """Return what is known of a ready block."""
        with self._database.reading() as connection:
            row = connection.execute(
                f"SELECT {_ENTRY} FROM blocks WHERE key = ? AND state = {State.READY:d}", (bytes.fromhex(key),)
            ).fetchone()
        return _entry(row) if row else None

    def entries(self) -> list[Entry]:
        """Return what is known of every ready block."""
        with self._database.reading(long=True) as connection:
            rows = connection.execute(f"SELECT {_ENTRY} FROM blocks WHERE state = {State.READY:d}").fetchall()
        return [_entry(row) for row in rows]

    # --- storing ----------------------------------------------------------------------------------------------------

    def prepare_store(self, block: BlockId, nbytes: int, budget_bytes: int, owner: str) -> Prepared:
        """Reserve ``nbytes`` for ``block`` when all blocks then fit ``budget_bytes``; ``owner`` writes its file."""
        with self._database.transaction() as connection:
            row = connection.execute("SELECT state FROM blocks WHERE key = ?", (bytes.fromhex(block.key),)).fetchone()
            if row is not None:
                return _OUTCOMES[State(row[0])]
            depth = self._depth(connection, block)
            if depth is None:
                return Prepared.ORPHAN
            (total,) = connection.execute("SELECT bytes FROM total").fetchone()
            if total + nbytes > budget_bytes:
                return Prepared.NO_ROOM
            session = self._valuation.session(connection)
            state = after(State.ABSENT, Move.PREPARE_STORE)
            self._insert(connection, session, block, depth, nbytes, state, owner)
            session.end()
            return Prepared.RESERVED

    def complete_store(self, key: str, owner: str) -> bool:
        """Make a prepared block ready: its file is in place. Returns whether ``owner`` had prepared it."""
        with self._database.transaction() as connection:
            return self._move(connection, key, Move.COMPLETE_STORE, owner)

    def abort_store(self, key: str, owner: str) -> bool:
        """Take a prepared block back. Returns whether ``owner`` had prepared it."""
        with self._database.transaction() as connection:
            return self._move(connection, key, Move.ABORT_STORE, owner)

    def writer(self, key: str) -> str | None:
        """Return the owner that is writing a block; None when nobody is."""
        with self._database.reading() as connection:
            row = connection.execute(
                f"SELECT owner FROM blocks WHERE key = ? AND state = {State.WRITING:d}", (bytes.fromhex(key),)
            ).fetchone()
            return str(row[0]) if row else None

    def adopt(self, found: Iterable[tuple[BlockId, int, float]]) -> int:
        """Take in whole files that nobody knew: identity, bytes, Unix time of last use. Returns how many were new."""
        with self._database.transaction(long=True) as connection:
            return self._adopt(connection, found)

    def _adopt(self, connection: Statements, found: Iterable[tuple[BlockId, int, float]]) -> int:
        session = self._valuation.session(connection)
        new = 0
        for block, nbytes, used_at in found:
            key = bytes.fromhex(block.key)
            row = connection.execute("SELECT state FROM blocks WHERE key = ?", (key,)).fetchone()
            if row is None:
                depth, state = self._depth(connection, block) or 0, after(State.ABSENT, Move.ADOPT)
                self._insert(connection, session, block, depth, nbytes, state, "", used_at)
            elif row[0] == State.WRITING:
                connection.execute("UPDATE blocks SET bytes = ? WHERE key = ?", (nbytes, key))
                self._move(connection, block.key, Move.ADOPT)
            else:
                continue
            new += 1
        session.end()
        if new:
            connection.execute(_SET_DEPTHS)
        return new

    def rebuild_once(self, found: Callable[[], Iterable[tuple[BlockId, int, float]]]) -> bool:
        """Fill tables that were just made with the blocks ``found``; other processes wait for it. Returns whether."""
        if self._is_filled():
            return False
        with self._database.transaction(long=True) as connection:
            if self._is_filled():
                return False
            connection.execute(f"PRAGMA cache_size = -{_REBUILD_CACHE_KIB}")
            self._adopt(connection, found())
            connection.execute("PRAGMA cache_size = -2000")  # SQLite's own
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            return True

    def _is_filled(self) -> bool:
        with self._database.reading() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
        return bool(version == SCHEMA_VERSION)

    def _depth(self, connection: Statements, block: BlockId) -> int | None:
        """Return how many tokens precede ``block``; None when its parent is not there, or leaving."""
        if block.parent == block.root:
            return 0
        row = connection.execute(
            f"SELECT depth + tokens FROM blocks WHERE key = ? AND state != {State.LEAVING:d}",
            (bytes.fromhex(block.parent),),
        ).fetchone()
        return int(row[0]) if row else None

    def _insert(
        self,
        connection: Statements,
        session: Session,
        block: BlockId,
        depth: int,
        nbytes: int,
        state: State,
        owner: str,
        used_at: float | None = None,
    ) -> None:
        key = bytes.fromhex(block.key)
        usage, priority = session.entered(block, depth, nbytes)
        connection.execute(
            "INSERT INTO ids VALUES (?, ?, ?)", (bytes.fromhex(block.parent), _as_bytes(block.tokens), key)
        )
        connection.execute(
            "INSERT INTO blocks SELECT :key, :parent, :root, :state, :owner, :tokens, :depth, :bytes, "
            f"(SELECT COUNT(*) FROM ids JOIN blocks AS c ON c.key = ids.key WHERE ids.parent = :key "
            f"AND c.state != {State.LEAVING:d}), :uses, 0, :last_use, :priority, :used_at",
            {
                "key": key,
                "parent": bytes.fromhex(block.parent),
                "root": bytes.fromhex(block.root),
                "state": state,
                "owner": owner,
                "tokens": len(block.tokens),
                "depth": depth,
                "bytes": nbytes,
                "uses": usage.uses,
                "last_use": usage.last_use,
                "priority": priority,
                "used_at": self._clock() if used_at is None else used_at,
            },
        )

    def _move(self, connection: Statements, key: str, move: Move, owner: str | None = None) -> bool:
        """Change the state of a block, if its state allows; with ``owner``, only what that one has begun."""
        # A lease is no state of a row: what is leased is ready here.
        states = [state for state in sources(move) if state not in (State.ABSENT, State.LEASED)]
        (target,) = {after(state, move) for state in states}
        change = "DELETE FROM blocks" if target is State.ABSENT else f"UPDATE blocks SET state = {target:d}"
        where = f"WHERE key = ? AND state IN ({', '.join(f'{state:d}' for state in states)})"
        values: list[object] = [bytes.fromhex(key)]
        if owner is not None:
            where += " AND owner = ?"
            values.append(owner)
        return connection.execute(f"{change} {where}", values).rowcount > 0

    # --- leaving ----------------------------------------------------------------------------------------------------

    def evict(
        self,
        nbytes: int,
        owner: str,
        keep: str,
        leased: Callable[[Place], bool],
        *,
        at_most: int,
        all_or_nothing: bool = True,
    ) -> list[Place]:
        """Let ``nbytes`` leave, leaves first, those that the policy values least.

        Args:
            nbytes: how much should go.
            owner: who deletes the files.
            keep: a block that must stay (the parent of what needs the room).
            leased: whether a block is being read.
            at_most: how many blocks may go at once; whoever needs more asks again.
            all_or_nothing: change nothing when less can go.

        Returns:
            What leaves.
        """
        try:
            with self._database.transaction() as connection:
                return self._evict(connection, nbytes, owner, {keep}, leased, at_most, all_or_nothing)
        except _NotEnoughError:
            return []

    def _evict(
        self,
        connection: Statements,
        nbytes: int,
        owner: str,
        passed: set[str],
        leased: Callable[[Place], bool],
        at_most: int,
        all_or_nothing: bool,
    ) -> list[Place]:
        session = self._valuation.session(connection)
        gone: list[Place] = []
        freed = 0
        while freed < nbytes and len(gone) < at_most:
            valued = session.least(passed)
            if valued is None:
                if all_or_nothing:
                    raise _NotEnoughError
                break
            place = valued.place
            if leased(place):
                passed.add(place.key)
                continue
            connection.execute("UPDATE blocks SET owner = ? WHERE key = ?", (owner, bytes.fromhex(place.key)))
            self._move(connection, place.key, Move.EVICT)
            session.evicted(valued)
            gone.append(place)
            freed += place.nbytes
        if all_or_nothing and freed < nbytes and self._evictable_bytes(connection, passed) < nbytes - freed:
            raise _NotEnoughError
        session.end()
        return gone

    def _evictable_bytes(self, connection: Statements, staying: Iterable[str]) -> int:
        """Return what all blocks that may go take; of those being read, only ``staying`` are known, and stay.

        What follows a block keeps it: blocks that are pinned or ``staying``, and those before them, stay.
        """
        keys = [bytes.fromhex(key) for key in staying if key]
        (held,) = connection.execute(_HELD_BYTES.format(keys=",".join("?" * len(keys))), keys).fetchone()
        (total,) = connection.execute(
            "SELECT bytes - (SELECT COALESCE(SUM(bytes), 0) FROM blocks WHERE state != ?) FROM total",
            (int(State.READY),),
        ).fetchone()
        return int(total) - int(held)

    def discard(self, keys: Iterable[str], owner: str) -> list[Place]:
        """Let ready blocks leave whose files ``owner`` deletes; return those that did."""
        gone: list[Place] = []
        keys = list(keys)
        if not keys:
            return gone  # nothing to change is nothing to wait for
        with self._database.transaction() as connection:
            for key in keys:
                row = connection.execute(
                    "SELECT key, root, bytes FROM blocks WHERE key = ?", (bytes.fromhex(key),)
                ).fetchone()
                if row is not None and self._move(connection, key, Move.DISCARD):
                    connection.execute("UPDATE blocks SET owner = ? WHERE key = ?", (owner, row[0]))
                    gone.append(Place(row[0].hex(), row[1].hex(), row[2]))
        return gone

    def complete_delete(self, keys: Iterable[str]) -> None:
        """Forget blocks whose files are gone."""
        keys = list(keys)
        if not keys:
            return
        with self._database.transaction() as connection:
            for key in keys:
                self._move(connection, key, Move.COMPLETE_DELETE)

    def unused_since(self, since: float) -> list[str]:
        """Return the keys of ready blocks that were last used before ``since`` (Unix time) and are not pinned."""
        with self._database.reading(long=True) as connection:
            rows = connection.execute(
                f"SELECT key FROM blocks WHERE used_at < ? AND state = {State.READY:d} AND NOT {PINNED} "
                "ORDER BY depth DESC",
                (since,),
            ).fetchall()
        return [row[0].hex() for row in rows]

    def moving(self, state: State) -> list[tuple[Place, str]]:
        """Return the blocks that are ``WRITING`` or ``LEAVING``, each with its owner."""
        with self._database.reading(long=True) as connection:
            rows = connection.execute(
                "SELECT key, root, bytes, owner FROM blocks WHERE state = ?", (int(state),)
            ).fetchall()
        return [(Place(row[0].hex(), row[1].hex(), row[2]), row[3]) for row in rows]

    # --- using ------------------------------------------------------------------------------------------------------

    def touch(self, keys: Sequence[str], hits: Mapping[str, int]) -> None:
        """Note that a turn used the blocks ``keys``, and how often blocks were restored."""
        with self._database.transaction() as connection:
            session = self._valuation.session(connection)
            session.used(keys, self._clock())
            session.end()
            connection.executemany(
                "UPDATE blocks SET hits = hits + ? WHERE key = ?", [(n, bytes.fromhex(key)) for key, n in hits.items()]
            )

    # --- counting ---------------------------------------------------------------------------------------------------

    def files(self) -> dict[str, int]:
        """Return the bytes of every block whose file may exist, by key."""
        with self._database.reading(long=True) as connection:
            return {row[0].hex(): row[1] for row in connection.execute("SELECT key, bytes FROM blocks")}

    def set_bytes(self, key: str, nbytes: int) -> None:
        """Correct what a block is counted for."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE blocks SET bytes = ? WHERE key = ?", (nbytes, bytes.fromhex(key)))

    def recount(self) -> tuple[int, int]:
        """Count all bytes anew; return what the total was and is."""
        with self._database.transaction(long=True) as connection:
            (before,) = connection.execute("SELECT bytes FROM total").fetchone()
            connection.execute("UPDATE total SET bytes = (SELECT COALESCE(SUM(bytes), 0) FROM blocks)")
            (now,) = connection.execute("SELECT bytes FROM total").fetchone()
        return before, now

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, those being written or deleted included."""
        with self._database.reading() as connection:
            (total,) = connection.execute("SELECT bytes FROM total").fetchone()
        return int(total)

    def counts(self) -> tuple[int, int]:
        """Return the number of ready blocks, and of those that are pinned."""
        with self._database.reading(long=True) as connection:
            (ready,) = connection.execute(f"SELECT COUNT(*) FROM blocks WHERE state = {State.READY:d}").fetchone()
            (pinned,) = connection.execute(
                f"SELECT COUNT(*) FROM blocks WHERE state = {State.READY:d} AND {PINNED}"
            ).fetchone()
        return int(ready), int(pinned)

    def begin_boot(self, boot: str) -> bool:
        """Note which boot of the machine this is; return whether it is the one of before."""
        with self._database.reading() as connection:
            (before,) = connection.execute("SELECT boot FROM total").fetchone()
        if before != boot:
            with self._database.transaction() as connection:
                connection.execute("UPDATE total SET boot = ?", (boot,))
        return bool(boot) and bool(before == boot)


_OUTCOMES = {
    State.READY: Prepared.PRESENT,
    State.WRITING: Prepared.ELSEWHERE,
    State.LEAVING: Prepared.LEAVING,
}
_ENTRY = f"key, parent, root, tokens, depth, bytes, children, uses, hits, used_at, {PINNED}"
_HELD_BYTES = f"""
WITH RECURSIVE held(key, parent, bytes) AS (
    SELECT key, parent, bytes FROM blocks
        WHERE state = {State.READY:d} AND (key IN ({{keys}}) OR key IN (SELECT key FROM links WHERE pinned))
    UNION
    SELECT blocks.key, blocks.parent, blocks.bytes FROM blocks JOIN held ON blocks.key = held.parent
        WHERE blocks.state = {State.READY:d}
)
SELECT COALESCE(SUM(bytes), 0) FROM held
"""
_SET_DEPTHS = """
WITH RECURSIVE walk(key, depth, tokens) AS (
    SELECT key, 0, tokens FROM blocks WHERE parent = root
    UNION ALL
    SELECT c.key, walk.depth + walk.tokens, c.tokens
    FROM walk JOIN ids ON ids.parent = walk.key JOIN blocks AS c ON c.key = ids.key
    WHERE c.parent != c.root  -- or a root that is a block, too, would never end
)
UPDATE blocks SET depth = walk.depth FROM walk WHERE walk.key = blocks.key AND blocks.depth != walk.depth
"""


def _as_bytes(tokens: TokenIds) -> bytes:
    return np.ascontiguousarray(tokens, dtype="<i8").tobytes()


def _block_id(row: tuple[bytes, bytes, bytes, bytes]) -> BlockId:
    return BlockId(row[0].hex(), row[1].hex(), row[2].hex(), np.frombuffer(row[3], dtype="<i8").astype(np.int64))


def _entry(row: tuple[bytes, bytes, bytes, int, int, int, int, int, int, float, int]) -> Entry:
    return Entry(row[0].hex(), row[1].hex(), row[2].hex(), *row[3:10], pinned=bool(row[10]))
