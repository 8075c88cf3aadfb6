"""One connection to a SQLite file: which thread uses it, how long it waits for others, and when it is made anew."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvtier.store.pause import is_locked

LOCKED_SECONDS = 2.0
"""How long one statement waits for a lock that another process holds."""

Connect = Callable[[str, float], sqlite3.Connection]
"""``(uri, seconds to wait for locks)`` → a connection in autocommit mode that any thread may use."""


def connect(uri: str, timeout_seconds: float) -> sqlite3.Connection:
    """Connect to the database at ``uri``."""
    return sqlite3.connect(uri, uri=True, timeout=timeout_seconds, isolation_level=None, check_same_thread=False)


class Access:
    """A connection and its lock: one thread at a time has it. The connection is made when a thread first needs it.

    After one wait for another process that was in vain, statements do not wait until one use succeeds: many queued
    uses would add their waits up.

    Args:
        path: the file; None for a database in RAM.
        open_connection: connects in a SQLite mode (``rw``, ``rwc``) and sets the connection up.

    Attributes:
        lock: is held by the thread that uses the connection.
    """

    def __init__(self, path: Path | None, open_connection: Callable[[str], sqlite3.Connection]) -> None:
        self.lock = threading.RLock()
        self._path = path
        self._open_connection = open_connection
        self._open: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        self._patience_milliseconds = 0
        self._is_impatient = False
        self._user: int | None = None
        self._closed = False

    @property
    def patience_seconds(self) -> float:
        """How long the last connection that was made waits for other processes, as long as it is patient."""
        return self._patience_milliseconds / 1000

    def is_used_by_this_thread(self) -> bool:
        """Whether the calling thread is inside ``held``."""
        return self._user == threading.get_ident()

    @contextmanager
    def held(self) -> Iterator[sqlite3.Connection]:
        """Hold the connection; it is made anew after a fork, and when the file is another one than it was.

        Raises:
            sqlite3.Error: it cannot be made, or the access was closed.
        """
        with self.lock:
            before, self._user = self._user, threading.get_ident()
            try:
                yield self._connection()
            except sqlite3.OperationalError as error:
                if is_locked(error):
                    self._wait_for_others(False)
                raise
            else:
                self._wait_for_others(True)
            finally:
                self._user = before

    def _connection(self) -> sqlite3.Connection:
        if self._open is not None and self._file() != self._opened and not self._open.in_transaction:
            self.disconnect()  # deleted under us, or made anew by another process
        return self._open or self.connect("rw")  # a file that is gone by now is not made anew, and empty

    def connect(self, mode: str) -> sqlite3.Connection:
        """Connect in a SQLite mode.

        Raises:
            sqlite3.Error: that is impossible, or the access was closed.
        """
        if self._closed:
            raise sqlite3.ProgrammingError("the catalog was closed")
        self._opened = self._file()
        self._open = self._open_connection(mode)
        if self._opened is None:  # it was made this moment
            self._opened = self._file()
        (self._patience_milliseconds,) = self._open.execute("PRAGMA busy_timeout").fetchone()
        if self._is_impatient:
            self._set_timeout(0)
        return self._open

    def _file(self) -> tuple[int, int] | None:
        """Return what tells the file from another one in its place; None when there is none."""
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

    def disconnect(self) -> None:
        """Close the connection. The next use makes another one."""
        connection, self._open = self._open, None
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Close the connection for good."""
        self._closed = True
        self.disconnect()
