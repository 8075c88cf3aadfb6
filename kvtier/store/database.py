"""The SQLite file of a store: connections, transactions, forks, and the tables that live in it.

``blocks`` has a row for each block, its state one of ``lifecycle.State``; ``ids`` its token ids, in the order in which
neighbours share most; ``names`` and ``pins`` what people called and pinned; ``ghosts`` what was evicted lately;
``total`` one row of sums. All of it can be made anew from the files.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvtier.store.fork import Rank, take_part
from kvtier.store.lifecycle import State

SCHEMA_VERSION = 4
_PAGE_BYTES = 8192  # ids of a block of 256 tokens fit into one page, with room
_LOCKED_SECONDS = 30.0  # how long to wait for other processes
_RETRY_SECONDS = 0.01
_HERE = f"({State.WRITING:d}, {State.READY:d})"  # blocks that hold their parent
_SCHEMA = f"""
CREATE TABLE blocks (
    key BLOB PRIMARY KEY, parent BLOB NOT NULL, root BLOB NOT NULL, state INTEGER NOT NULL, owner TEXT NOT NULL,
    tokens INTEGER NOT NULL, depth INTEGER NOT NULL, bytes INTEGER NOT NULL, children INTEGER NOT NULL,
    uses INTEGER NOT NULL, hits INTEGER NOT NULL, last_use INTEGER NOT NULL, priority REAL NOT NULL,
    used_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX leaves ON blocks (uses > 1, priority) WHERE state = {State.READY:d} AND children = 0;
CREATE INDEX moving ON blocks (state) WHERE state != {State.READY:d};
CREATE INDEX by_root ON blocks (root);
CREATE INDEX by_use ON blocks (used_at);
CREATE TABLE ids (
    parent BLOB NOT NULL, ids BLOB NOT NULL, key BLOB NOT NULL, PRIMARY KEY (parent, ids, key)
) WITHOUT ROWID;
CREATE TABLE names (
    name TEXT PRIMARY KEY, root BLOB NOT NULL, tokens INTEGER NOT NULL, pinned INTEGER NOT NULL, ttl REAL,
    created_at REAL NOT NULL, used_at REAL NOT NULL, expires_at REAL
) WITHOUT ROWID;
CREATE INDEX names_expire ON names (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE links (
    name TEXT NOT NULL, place INTEGER NOT NULL, key BLOB NOT NULL, pinned INTEGER NOT NULL, PRIMARY KEY (name, place)
) WITHOUT ROWID;
CREATE INDEX links_key ON links (key);
CREATE INDEX pins ON links (key) WHERE pinned;
CREATE TABLE ghosts (key BLOB PRIMARY KEY, uses INTEGER NOT NULL, last_use INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX ghosts_age ON ghosts (last_use);
CREATE TABLE total (
    id INTEGER PRIMARY KEY CHECK (id = 0), bytes INTEGER NOT NULL, policy TEXT NOT NULL, boot TEXT NOT NULL
);
INSERT INTO total VALUES (0, 0, '', '');
CREATE TRIGGER added AFTER INSERT ON blocks BEGIN
    UPDATE total SET bytes = bytes + NEW.bytes;
    UPDATE blocks SET children = children + 1 WHERE key = NEW.parent;
END;
CREATE TRIGGER removed AFTER DELETE ON blocks BEGIN
    UPDATE total SET bytes = bytes - OLD.bytes;
    UPDATE blocks SET children = children - 1 WHERE key = OLD.parent AND OLD.state IN {_HERE};
    DELETE FROM ids WHERE key = OLD.key AND parent = OLD.parent;
END;
CREATE TRIGGER resized AFTER UPDATE OF bytes ON blocks BEGIN
    UPDATE total SET bytes = bytes + NEW.bytes - OLD.bytes;
END;
CREATE TRIGGER left AFTER UPDATE OF state ON blocks WHEN OLD.state IN {_HERE} AND NEW.state NOT IN {_HERE} BEGIN
    UPDATE blocks SET children = children - 1 WHERE key = NEW.parent;
END;
"""
_TABLES = ("blocks", "ids", "names", "links", "ghosts", "total")

# What a row may hold, by the names of columns: bits that flipped in the file can make anything of a value.
_SOUND: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("key", "parent", "root"), lambda value: isinstance(value, bytes) and len(value) == 32),
    **dict.fromkeys(("tokens", "depth", "bytes", "children", "uses", "hits"), lambda value: type(value) is int),
    **dict.fromkeys(("used_at", "created_at"), lambda value: isinstance(value, (int, float))),
    "ids": lambda value: isinstance(value, bytes) and len(value) % 8 == 0,
    "state": lambda value: value in {State.WRITING, State.READY, State.LEAVING},
    "name": lambda value: isinstance(value, str),
}


def _sound_row(cursor: sqlite3.Cursor, row: tuple[object, ...]) -> tuple[object, ...]:
    """Return ``row``.

    Raises:
        sqlite3.DatabaseError: it holds what its columns cannot.
    """
    for (column, *_), value in zip(cursor.description, row, strict=True):
        if column in _SOUND and not _SOUND[column](value):
            raise sqlite3.DatabaseError(f"database disk image is malformed: {value!r:.40} as {column}")
    return row


Connect = Callable[[str, float], sqlite3.Connection]
"""``(uri, seconds to wait for locks)`` → a connection in autocommit mode that any thread may use."""


def connect(uri: str, timeout_seconds: float) -> sqlite3.Connection:
    """Connect to the database at ``uri``."""
    return sqlite3.connect(uri, uri=True, timeout=timeout_seconds, isolation_level=None, check_same_thread=False)


class Database:
    """One connection to the tables of a store. Thread-safe; several processes may share the file (WAL).

    Args:
        path: the file; None for tables in RAM.
        exclusive: keep the file locked: for drives where processes cannot share it. A second one is refused.
        make_connection: for tests: what connects.

    Raises:
        sqlite3.Error: as all methods do; the disk tier translates.
    """

    def __init__(self, path: Path | None, *, exclusive: bool = False, make_connection: Connect = connect) -> None:
        self._path = path.absolute() if path is not None else None
        self._exclusive = exclusive
        self._make_connection = make_connection
        self._lock = threading.RLock()
        self._open: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        self._closed = False
        take_part(self, Rank.DATABASE)
        with self._lock:
            self._open = self._connect("rwc")
            try:
                if self._path is not None:
                    self._switch_to_wal()
                self._make_tables()
            except BaseException:
                self._disconnect()
                raise

    def _file(self) -> tuple[int, int] | None:
        """Return what tells the file from another one in its place; None when there is none."""
        if self._path is None:
            return None
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"{self._path.as_uri()}?mode={mode}" if self._path is not None else "file::memory:"
        connection = self._make_connection(uri, 0.0 if self._exclusive else _LOCKED_SECONDS)
        connection.row_factory = _sound_row
        try:
            connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA secure_delete=ON")  # what is forgotten is overwritten, too
            if self._exclusive:
                connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        except BaseException:
            connection.close()
            raise
        self._opened = self._file()
        return connection

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection of this process; made anew after a fork, and when the file is another one than it was.

        Whoever asks is in ``reading`` or ``transaction``.
        """
        if self._open is not None and self._file() != self._opened and not self._open.in_transaction:
            self._disconnect()  # deleted under us, or made anew by another process
        if self._open is None:
            if self._closed:
                raise sqlite3.ProgrammingError("the catalog was closed")
            self._open = self._connect("rw")  # a file that is gone by now is not made anew, and empty
        return self._open

    def before_fork(self) -> None:
        """Close the connection, once no thread uses it."""
        self._lock.acquire()
        try:
            if self._path is not None:  # tables in RAM are copied like everything in RAM
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
        give_up_at = time.monotonic() + (0.0 if self._exclusive else _LOCKED_SECONDS)
        while True:
            try:
                self.connection.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > give_up_at:
                    raise
                time.sleep(_RETRY_SECONDS)
            else:
                return

    def _make_tables(self) -> None:
        """Make the tables unless they are there; those of another version are replaced."""
        with self.transaction() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master WHERE name = 'total'").fetchone()
            if tables and version in (0, SCHEMA_VERSION):
                return  # 0: made, and to be filled
            for table in _TABLES:
                connection.execute(f"DROP TABLE IF EXISTS {table}")
            for statement in _statements(_SCHEMA):
                connection.execute(statement)
            connection.execute("PRAGMA user_version = 0")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Hold the connection for queries."""
        with self._lock, _rows_as_written():
            yield self.connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the connection for changes that happen together or not at all."""
        with self._lock, _rows_as_written():
            try:
                self.connection.execute("BEGIN IMMEDIATE")
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:  # left open, it would keep every process from writing
                    self.connection.execute("ROLLBACK")
                raise

    def truncate_log(self) -> None:
        """Move what the write-ahead log holds into the file, and leave nothing of it in the log."""
        with self.reading() as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def problems(self) -> list[str]:
        """Return what SQLite finds wrong with the file; an empty list when all is well."""
        with self.reading() as connection:
            found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._closed = True
            self._disconnect()


@contextmanager
def _rows_as_written() -> Iterator[None]:
    """Take values that no row was ever written with for damage of the file, which SQLite does not always notice.

    Raises:
        sqlite3.DatabaseError: something could not be done with the values of a row.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise sqlite3.DatabaseError(f"a row is malformed ({type(error).__name__}: {error})") from error


def _statements(script: str) -> Iterator[str]:
    """Split ``script`` into statements: ``executescript`` would commit what is open."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def boot_id() -> str:
    """Return what names this boot of the machine; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
