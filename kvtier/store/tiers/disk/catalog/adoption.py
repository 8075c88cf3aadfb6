"""Adoption: adds rows for whole files that the catalog lacks, and for all files when it is rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum, auto

from kvtier.store.chain import BlockId
from kvtier.store.eviction.base import EvictionPolicy, SavedSeconds
from kvtier.store.tiers.block_states import Move, State, after
from kvtier.store.tiers.disk.catalog.connection import Statements
from kvtier.store.tiers.disk.catalog.database import Database
from kvtier.store.tiers.disk.catalog.ranking import Session
from kvtier.store.tiers.disk.catalog.rows import batches, depth_after, insert, is_filled, move, place_below, place_some
from kvtier.store.tiers.disk.catalog.schema import SCHEMA_VERSION, UNPLACED

Found = tuple[BlockId, int, float]
"""Identity, bytes, and Unix time of the last use of a whole file."""
_ROWS_AT_ONCE = 1000  # in one transaction: its log is about 10 MB, and others wait no longer for it than for a write
_CACHE_KIB = 64 * 1024  # rows come in no order: without a cache, each is read from the file again


class Rebuilt(Enum):
    """Outcome of rebuilding a catalog."""

    NOT = auto()
    """It knew all files, or another process had adopted the last of them."""
    ANEW = auto()
    """It was empty."""
    RESUMED = auto()
    """Another process had begun to rebuild it: some of the files that it adopted may be gone."""


class Adoption:
    """Adopts files. Idempotent: a block that is known stays as it is."""

    def __init__(self, database: Database, policy: EvictionPolicy, saved_seconds: SavedSeconds) -> None:
        self._database = database
        self._policy = policy
        self._saved_seconds = saved_seconds

    def adopt(self, found: Iterable[Found]) -> int:
        """Add rows for whole files that have none; return how many were new."""
        new = 0
        for some in batches(found, _ROWS_AT_ONCE):
            with self._database.transaction(long=True) as connection:
                keys = self._adopt(connection, some, 0)
                for key in keys:
                    place_below(connection, key)
                new += len(keys)
        return new

    def _adopt(self, connection: Statements, found: Iterable[Found], orphan_depth: int) -> list[bytes]:
        session = Session(self._policy, connection, self._saved_seconds)
        new = []
        for block, nbytes, used_at in found:
            key = bytes.fromhex(block.key)
            row = connection.execute("SELECT state FROM blocks WHERE key = ?", (key,)).fetchone()
            if row is None:
                depth = depth_after(connection, block)
                state = after(State.ABSENT, Move.ADOPT)
                insert(connection, session, block, orphan_depth if depth is None else depth, nbytes, state, "", used_at)
            elif row[0] == State.WRITING:
                connection.execute("UPDATE blocks SET bytes = ? WHERE key = ?", (nbytes, key))
                move(connection, block.key, Move.ADOPT)
            else:
                continue
            new.append(key)
        session.end()
        return new

    def rebuild(self, found: Callable[[], Iterable[Found]]) -> Rebuilt:
        """Fill new tables with the blocks ``found``.

        Its transactions are short, so that the log stays small and other processes can help: each adopts the files that
        it finds, and the first that has seen all files ends the rebuild for all. Until then no block is evicted.
        """
        with self._database.reading() as connection:
            if is_filled(connection):
                return Rebuilt.NOT
            (is_begun,) = connection.execute("SELECT EXISTS (SELECT 1 FROM blocks)").fetchone()
        for some in batches(found(), _ROWS_AT_ONCE):
            with self._database.transaction(long=True) as connection:
                if is_filled(connection):
                    return Rebuilt.NOT  # found files may have been evicted meanwhile
                connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
                self._adopt(connection, some, UNPLACED)
        unplaced = True
        while unplaced:
            with self._database.transaction() as connection:
                unplaced = place_some(connection, _ROWS_AT_ONCE)
        with self._database.transaction() as connection:
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("PRAGMA cache_size = -2000")  # SQLite's default
        self._database.truncate_log()
        return Rebuilt.RESUMED if is_begun else Rebuilt.ANEW
