"""One SQLite connection: which thread uses it, how long it waits, when it is reopened."""

from __future__ import annotations

import itertools
import math
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvtier.store.tiers.backoff import is_locked

LOCKED_SECONDS = 2.0
"""How long one statement waits for a lock that another process holds."""

TURN_SECONDS = 2.0
"""How long one statement of a turn may run. It reads few rows, whatever the size of the tables."""
LONG_SECONDS = 120.0
"""How long one statement that reads all rows may run."""
_STEPS = 1000  # of SQLite's machine, between checks of the clock; a shorter statement is never cut off
_ROWS_AT_ONCE = 500
_MOST_BYTES = 64 * 2**20  # of one value or row: ids of seven million tokens

Connect = Callable[[str, float], sqlite3.Connection]
"""``(uri, seconds to wait for locks)`` → a connection in autocommit mode that any thread may use."""


def connect(uri: str, timeout_seconds: float) -> sqlite3.Connection:
    """Connect to the database at ``uri``."""
    return sqlite3.connect(uri, uri=True, timeout=timeout_seconds, isolation_level=None, check_same_thread=False)


class _Deadline:
    """When the running statement is cut off, in seconds of ``time.monotonic``.

    It is an object of its own, so that a connection does not keep its ``Statements`` alive.
    """

    def __init__(self) -> None:
        self.at = math.inf

    def is_over(self) -> bool:
        return time.monotonic() > self.at


class Statements:
    """A connection that cuts off statements that run too long: a hostile file can make any statement endless.

    Each may run for ``TURN_SECONDS``, until its last row is fetched. A connection that was not closed is closed when
    this is garbage-collected.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._limit_seconds = TURN_SECONDS
        self._connection = connection
        self._deadline = _Deadline()
        self._close = weakref.finalize(self, connection.close)
        self._close.atexit = False
        connection.set_progress_handler(self._deadline.is_over, _STEPS)
        if hasattr(connection, "setlimit"):  # since Python 3.11
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_BYTES)

    @contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Let each statement within the context run for ``seconds``."""
        before, self._limit_seconds = self._limit_seconds, seconds
        try:
            yield
        finally:
            self._limit_seconds = before

    def execute(self, statement: str, values: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Cursor:
        """Execute a statement."""
        self._deadline.at = time.monotonic() + self._limit_seconds
        return self._connection.execute(statement, values)

    def executemany(self, statement: str, rows: Iterable[Sequence[Any] | dict[str, Any]]) -> None:
        """Execute a statement once for each of ``rows``."""
        rows = iter(rows)
        while some := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            self._deadline.at = time.monotonic() + self._limit_seconds
            self._connection.executemany(statement, some)

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self._connection.in_transaction

    def close(self) -> None:
        """Close the connection. May be called more than once."""
        self._close()


@contextmanager
def _too_long_is_damage() -> Iterator[None]:
    """Report a statement that was cut off as damage of the file.

    Raises:
        sqlite3.DatabaseError: a statement was cut off.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        if "interrupted" not in str(error):
            raise
        raise sqlite3.DatabaseError("database disk image is malformed: a statement ran for too long") from error


class Access:
    """A connection and its lock: one thread at a time uses it. It is opened when a thread first needs it.

    After one wait for another process has timed out, statements do not wait until one use succeeds: otherwise the waits
    of many queued uses would add up.

    Args:
        path: the file; None for a database in RAM.
        open_connection: connects in a SQLite mode (``rw``, ``rwc``) and sets the connection up.

    Attributes:
        lock: held by the thread that uses the connection.
    """

    def __init__(self, path: Path | None, open_connection: Callable[[str], Statements]) -> None:
        self.lock = threading.RLock()
        self._path = path
        self._open_connection = open_connection
        self._open: Statements | None = None
        self._opened: tuple[int, int] | None = None
        self._patience_milliseconds = 0
        self._is_impatient = False
        self._user: int | None = None
        self._closed = False

    @property
    def patience_seconds(self) -> float:
        """How long the last opened connection waits for other processes, while waits are on."""
        return self._patience_milliseconds / 1000

    def is_used_by_this_thread(self) -> bool:
        """Whether the calling thread is inside ``held``."""
        return self._user == threading.get_ident()

    @contextmanager
    def held(self, limit_seconds: float) -> Iterator[Statements]:
        """Hold the connection; it is reopened after a fork, and when the file was deleted or replaced.

        Each statement may run for ``limit_seconds``.

        Raises:
            sqlite3.Error: it cannot be opened, or the access was closed.
        """
        with self.lock, _too_long_is_damage():
            before, self._user = self._user, threading.get_ident()
            try:
                connection = self._connection()
                with connection.limited(limit_seconds):
                    yield connection
            except sqlite3.OperationalError as error:
                if is_locked(error):
                    self._wait_for_others(False)
                raise
            else:
                self._wait_for_others(True)
            finally:
                self._user = before

    def _connection(self) -> Statements:
        if self._open is not None and self._file() != self._opened and not self._open.in_transaction:
            self.disconnect()  # deleted, or rebuilt by another process
        return self._open or self.connect("rw")  # does not replace a deleted file by an empty one

    def connect(self, mode: str) -> Statements:
        """Connect in a SQLite mode.

        Raises:
            sqlite3.Error: it cannot connect, or the access was closed.
        """
        if self._closed:
            raise sqlite3.ProgrammingError("the catalog was closed")
        self._opened = self._file()
        with _too_long_is_damage():
            self._open = self._open_connection(mode)
        if self._opened is None:  # it was created just now
            self._opened = self._file()
        (self._patience_milliseconds,) = self._open.execute("PRAGMA busy_timeout").fetchone()
        if self._is_impatient:
            self._set_timeout(0)
        return self._open

    def _file(self) -> tuple[int, int] | None:
        """Return device and inode of the file; None when there is no file."""
        if self._path is None:
            return None
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _wait_for_others(self, wait: bool) -> None:
        if self._is_impatient is wait:
            self._is_impatient = not wait
            self._set_timeout(self._patience_milliseconds if wait else 0)

    def _set_timeout(self, milliseconds: int) -> None:
        if self._open is not None:
            self._open.execute(f"PRAGMA busy_timeout={milliseconds:d}")

    @contextmanager
    def not_waiting(self) -> Iterator[None]:
        """Wait for no other process within the context. For the thread that holds the connection."""
        self._set_timeout(0)
        try:
            yield
        finally:
            self._set_timeout(0 if self._is_impatient else self._patience_milliseconds)

    def disconnect(self) -> None:
        """Close the connection. The next use opens another one."""
        connection, self._open = self._open, None
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Close the connection for good."""
        self._closed = True
        self.disconnect()
