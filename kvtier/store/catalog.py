"""Which blocks the disk tier holds: a SQLite table that the files can always rebuild.

A row is *reserved* (``writer`` is the process that is writing the file) before its file appears, so that the byte
budget counts it, and *ready* (``writer`` is 0) after. Only ready rows are ever found.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kvtier.store.chain import BlockId
from kvtier.store.fork import take_part

_SCHEMA = """
CREATE TABLE IF NOT EXISTS blocks (
    key TEXT PRIMARY KEY, parent TEXT NOT NULL, root TEXT NOT NULL, tokens BLOB NOT NULL,
    bytes INTEGER NOT NULL, last_use INTEGER NOT NULL, writer INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS blocks_parent ON blocks (parent);
CREATE INDEX IF NOT EXISTS blocks_last_use ON blocks (last_use);
CREATE TABLE IF NOT EXISTS total (
    id INTEGER PRIMARY KEY CHECK (id = 0), bytes INTEGER NOT NULL, clock INTEGER NOT NULL
);
INSERT OR IGNORE INTO total VALUES (0, 0, 0);
CREATE TRIGGER IF NOT EXISTS blocks_added AFTER INSERT ON blocks
    BEGIN UPDATE total SET bytes = bytes + NEW.bytes; END;
CREATE TRIGGER IF NOT EXISTS blocks_removed AFTER DELETE ON blocks
    BEGIN UPDATE total SET bytes = bytes - OLD.bytes; END;
CREATE TRIGGER IF NOT EXISTS blocks_resized AFTER UPDATE OF bytes ON blocks
    BEGIN UPDATE total SET bytes = bytes + NEW.bytes - OLD.bytes; END;
"""
_LOCKED_SECONDS = 30.0  # how long to wait for other processes
_RETRY_SECONDS = 0.01
_LEAVES = """
SELECT key, root, bytes FROM blocks AS b
WHERE writer = 0 AND key != ? AND NOT EXISTS (SELECT 1 FROM blocks AS c WHERE c.parent = b.key)
ORDER BY last_use LIMIT 1
"""


class NoRoom(Exception):  # noqa: N818  nothing went wrong: the block stays out
    """A block does not fit: it is larger than the budget, or what fills the budget must stay."""


class Catalog:
    """The table of one store folder. Thread-safe; several processes may share the file (WAL).

    Methods raise ``sqlite3.Error``; the disk tier translates.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._lock = threading.RLock()
        self._open: sqlite3.Connection | None = None
        self._closed = False
        take_part(self)
        with self._lock:
            self._open = self._connect("rwc")
            try:
                self._switch_to_wal()
                self._open.executescript(_SCHEMA)
            except sqlite3.Error:
                self._open.close()
                raise

    def _connect(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self._path.as_uri()}?mode={mode}",
            uri=True,
            timeout=_LOCKED_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            connection.execute("PRAGMA synchronous=NORMAL")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    @property
    def _connection(self) -> sqlite3.Connection:
        """The connection of this process; made anew after a fork. Whoever asks holds the lock."""
        if self._open is None:
            if self._closed:
                raise sqlite3.ProgrammingError("the catalog was closed")
            self._open = self._connect("rw")  # a file that is gone by now is not made anew, and empty
        return self._open

    def before_fork(self) -> None:
        """Close the connection, once no thread uses it."""
        self._lock.acquire()
        try:
            self._disconnect()
        except BaseException:
            self._lock.release()
            raise

    def after_fork(self, in_child: bool) -> None:
        """Let threads connect again."""
        self._lock.release()

    def _disconnect(self) -> None:
        connection, self._open = self._open, None
        if connection is not None:
            connection.close()

    def _switch_to_wal(self) -> None:
        """Switch to WAL; while another process opens or closes the same file, SQLite refuses without waiting."""
        give_up_at = time.monotonic() + _LOCKED_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > give_up_at:
                    raise
                time.sleep(_RETRY_SECONDS)
            else:
                return

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # left open, it would keep every process from writing
                    self._connection.execute("ROLLBACK")
                raise

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a ready block."""
        with self._lock:
            row = self._connection.execute(
                "SELECT key, parent, root, tokens FROM blocks WHERE key = ? AND writer = 0", (key,)
            ).fetchone()
        return _block_id(row) if row else None

    def has(self, key: str) -> bool:
        """Whether a block is ready or reserved."""
        with self._lock:
            return self._has(self._connection, key)

    def children(self, parent: str) -> list[BlockId]:
        """Return the ready blocks that follow ``parent``."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT key, parent, root, tokens FROM blocks WHERE parent = ? AND writer = 0", (parent,)
            ).fetchall()
        return [_block_id(row) for row in rows]

    def rebuild_once(self, found: Callable[[], Iterable[tuple[BlockId, int]]]) -> None:
        """Fill a table that was just made with the ready blocks ``found``; other processes wait for it."""
        with self._transaction() as connection:
            (done,) = connection.execute("PRAGMA user_version").fetchone()
            if not done:
                for block, size in found():
                    if not self._has(connection, block.key):
                        self._insert(connection, block, size, 0)
                connection.execute("PRAGMA user_version = 1")

    @staticmethod
    def _has(connection: sqlite3.Connection, key: str) -> bool:
        return connection.execute("SELECT 1 FROM blocks WHERE key = ?", (key,)).fetchone() is not None

    def reserve(self, block: BlockId, size: int, budget: int) -> list[tuple[str, str]] | None:
        """Reserve ``size`` bytes for ``block``, evicting ready leaves until the total fits ``budget``.

        Returns:
            ``(key, root)`` of the evicted blocks, whose files the caller deletes before it writes; None, with nothing
            changed, when the block is there already, or its parent is not: it could never be reached.

        Raises:
            NoRoom: it does not fit; nothing was changed.
        """
        if size > budget:
            raise NoRoom
        with self._transaction() as connection:
            orphan = block.parent != block.root and not self._has(connection, block.parent)
            if orphan or self._has(connection, block.key):
                return None
            evicted: list[tuple[str, str]] = []
            (total,) = connection.execute("SELECT bytes FROM total").fetchone()
            while total + size > budget:
                leaf = connection.execute(_LEAVES, (block.parent,)).fetchone()
                if leaf is None:
                    raise NoRoom
                connection.execute("DELETE FROM blocks WHERE key = ?", (leaf[0],))
                evicted.append((leaf[0], leaf[1]))
                total -= leaf[2]
            self._insert(connection, block, size, os.getpid())
            return evicted

    def _insert(self, connection: sqlite3.Connection, block: BlockId, size: int, writer: int) -> None:
        connection.execute("UPDATE total SET clock = clock + 1")
        connection.execute(
            "INSERT INTO blocks SELECT ?, ?, ?, ?, ?, clock, ? FROM total",
            (block.key, block.parent, block.root, block.tokens.astype("<i8").tobytes(), size, writer),
        )

    def ready(self, key: str) -> None:
        """Make a reserved block ready: its file is in place."""
        with self._transaction() as connection:
            connection.execute("UPDATE blocks SET writer = 0 WHERE key = ?", (key,))

    def remove(self, key: str) -> None:
        """Forget a block."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM blocks WHERE key = ?", (key,))

    def withdraw(self, key: str) -> bool:
        """Forget a block if this process has reserved it and it is not ready. Returns whether."""
        with self._transaction() as connection:
            rows = connection.execute("DELETE FROM blocks WHERE key = ? AND writer = ?", (key, os.getpid()))
            return rows.rowcount > 0

    def touch(self, keys: Sequence[str]) -> None:
        """Note that these blocks were used now."""
        with self._transaction() as connection:
            connection.execute("UPDATE total SET clock = clock + 1")
            connection.executemany(
                "UPDATE blocks SET last_use = (SELECT clock FROM total) WHERE key = ?", [(key,) for key in keys]
            )

    def writers(self) -> list[tuple[str, str, int]]:
        """Return ``(key, root, process id)`` of every reserved block."""
        with self._lock:
            return self._connection.execute("SELECT key, root, writer FROM blocks WHERE writer != 0").fetchall()

    def keys(self) -> set[str]:
        """Return the keys of all blocks, reserved ones included."""
        with self._lock:
            return {key for (key,) in self._connection.execute("SELECT key FROM blocks")}

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, those being written included."""
        with self._lock:
            (total,) = self._connection.execute("SELECT bytes FROM total").fetchone()
        return int(total)

    def __len__(self) -> int:
        with self._lock:
            (count,) = self._connection.execute("SELECT COUNT(*) FROM blocks WHERE writer = 0").fetchone()
        return int(count)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._closed = True
            self._disconnect()


def _block_id(row: tuple[str, str, str, bytes]) -> BlockId:
    return BlockId(row[0], row[1], row[2], np.frombuffer(row[3], dtype="<i8").astype(np.int64))
