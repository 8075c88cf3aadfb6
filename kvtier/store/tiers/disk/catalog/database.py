"""Database: the SQLite file of a store, with one connection for writes and one for reads.

In WAL mode a reader never waits for a writer. So the generating thread, which only reads, never waits for a writing
thread, even while that thread waits for another process.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from kvtier.platform.fork_safety import Rank, take_part
from kvtier.store.tiers.backoff import is_locked
from kvtier.store.tiers.disk.catalog.connection import (
    LOCKED_SECONDS,
    LONG_SECONDS,
    TURN_SECONDS,
    Access,
    Connect,
    Statements,
    connect,
)
from kvtier.store.tiers.disk.catalog.schema import SCHEMA, SCHEMA_VERSION, SoundRows, is_made, statements

_PAGE_BYTES = 8192  # the row of a block of 256 tokens fits in one page, with room
_RETRY_SECONDS = 0.01


class Database:
    """The tables of a store. Thread-safe; several processes may share the file (WAL).

    Changes wait at most ``LOCKED_SECONDS`` for other processes. After one wait has timed out they do not wait at all,
    until a change succeeds. Queries wait for no changes, of this process or of others. A statement that runs longer
    than ``TURN_SECONDS``, or ``LONG_SECONDS`` if it reads all rows, is cut off, and the file counts as damaged.

    Args:
        path: the file; None for tables in RAM.
        exclusive: keep the file locked, for drives where processes cannot share it. A second process is refused.
        make_connection: opens connections; for tests.

    Raises:
        sqlite3.Error: as all methods do; the disk tier translates.
    """

    def __init__(self, path: Path | None, *, exclusive: bool = False, make_connection: Connect = connect) -> None:
        self._path = path.absolute() if path is not None else None
        self._exclusive = exclusive
        self._make_connection = make_connection
        self._is_file_kept = self._is_log_kept = False  # whether copies of deleted rows may be in it
        self._writer = self._reader = Access(self._path, self._connect)
        if path is not None and not exclusive:
            self._reader = Access(self._path, partial(self._connect, only_reads=True))
        take_part(self, Rank.DATABASE)
        with self._writer.lock:
            try:
                self._writer.connect("rwc")
                if self._path is not None:
                    self._switch_to_wal()
                self._make_tables()
            except BaseException:
                self._writer.disconnect()
                self._reader.disconnect()
                raise

    def _connect(self, mode: str, *, only_reads: bool = False) -> Statements:
        uri = f"{self._path.as_uri()}?mode={mode}" if self._path is not None else "file::memory:"
        made = self._make_connection(uri, 0.0 if self._exclusive else LOCKED_SECONDS)
        made.row_factory = SoundRows()
        connection = Statements(made)
        try:
            connection.execute("PRAGMA trusted_schema=OFF")  # the schema is not trusted before it is compared
            connection.execute("PRAGMA cell_size_check=ON")
            connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA secure_delete=ON")  # deleted rows are overwritten
            if only_reads:
                connection.execute("PRAGMA query_only=ON")
            if self._exclusive:
                connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            if mode != "rwc" and not is_made(connection):
                raise sqlite3.OperationalError("unable to open the catalog: another process is rebuilding it")
        except BaseException:
            connection.close()
            raise
        return connection

    def before_fork(self) -> None:
        """Close the connections, once no thread uses them."""
        self._writer.lock.acquire()  # first, as in ``truncate_log``: holders of the reader's lock wait for no lock
        self._reader.lock.acquire()
        try:
            if self._path is not None:  # a fork copies tables in RAM
                self._reader.disconnect()
                self._writer.disconnect()
        except BaseException:
            self.after_fork(in_child=False)
            raise

    def after_fork(self, in_child: bool) -> None:
        """Let threads connect again."""
        self._reader.lock.release()
        self._writer.lock.release()

    def _switch_to_wal(self) -> None:
        """Switch to WAL; while another process opens or closes the same file, SQLite refuses without waiting."""
        give_up_at = time.monotonic() + self._writer.patience_seconds
        while True:
            try:
                with self._writer.held(TURN_SECONDS) as connection:
                    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
                    if mode != "wal":  # setting it again would wait for writers
                        connection.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as error:
                if not is_locked(error) or time.monotonic() > give_up_at:
                    raise
                time.sleep(_RETRY_SECONDS)
            else:
                return

    def _make_tables(self) -> None:
        """Create the tables unless they exist."""
        with self._writer.held(TURN_SECONDS) as connection:
            if is_made(connection):
                return
        with self.transaction() as connection:
            if is_made(connection):
                return  # created just now by another process
            for statement in statements(SCHEMA):
                connection.execute(statement)
            if self._path is None:  # there are no files to fill them from
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def reading(self, *, long: bool = False) -> Iterator[Statements]:
        """Hold a connection for queries: within ``transaction`` the same, so that a change sees its own rows.

        Args:
            long: the queries read all rows.
        """
        access = self._writer if self._writer.is_used_by_this_thread() else self._reader
        with _rows_as_written(), access.held(LONG_SECONDS if long else TURN_SECONDS) as connection:
            yield connection

    @contextmanager
    def transaction(self, *, long: bool = False) -> Iterator[Statements]:
        """Hold the connection for changes that happen together or not at all.

        Args:
            long: the changes read all rows.
        """
        with _rows_as_written(), self._writer.held(LONG_SECONDS if long else TURN_SECONDS) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
                if self._is_log_kept and not self._is_file_kept:  # writing the file anew takes too long for a turn
                    self.finish_overwriting()
            except BaseException:
                if connection.in_transaction:  # left open, it would block all writers
                    self._roll_back(connection)
                raise

    def _roll_back(self, connection: Statements) -> None:
        try:
            connection.execute("ROLLBACK")
        except sqlite3.Error:
            if self._path is None:  # its tables end with the connection
                raise
            self._writer.disconnect()  # which rolls back, too

    def truncate_log(self) -> bool:
        """Move the write-ahead log into the file; return whether the log is empty.

        It is not while another process reads. The next change tries again.
        """
        with self._writer.held(LONG_SECONDS) as connection, self._reader.lock:  # an own query would keep the log
            (is_kept, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._is_log_kept = bool(is_kept)
            return not is_kept

    def overwrite_deleted(self) -> bool:
        """Remove all copies of deleted rows from the file and its log; return whether that is done.

        SQLite overwrites a deleted row in place. If it moved the row between pages before, a copy may lie in the unused
        part of a page. So the file is written anew, through memory: a temporary file would hold ids outside of the
        folder. If other processes prevent this now, ``finish_overwriting`` and ``close`` try again.
        """
        self.overwrite_later()
        try:
            with self._writer.held(LONG_SECONDS) as connection, self._reader.lock:
                connection.execute("PRAGMA temp_store=MEMORY")
                connection.execute("VACUUM")
                self._is_file_kept = False
        except sqlite3.OperationalError as error:
            if not is_locked(error):
                raise
            return False
        return self.truncate_log()

    def overwrite_later(self) -> None:
        """Leave the overwriting of deleted rows to ``finish_overwriting``."""
        self._is_file_kept = self._is_log_kept = self._path is not None

    def finish_overwriting(self) -> None:
        """Finish ``overwrite_deleted``, as far as possible without waiting. Raises no ``sqlite3.Error``."""
        with suppress(sqlite3.Error):
            if self._is_file_kept:
                with self._writer.lock, self._writer.not_waiting():
                    self.overwrite_deleted()
            elif self._is_log_kept:
                with self._writer.lock, self._writer.not_waiting():
                    self.truncate_log()

    def problems(self) -> list[str]:
        """Return the problems that SQLite finds in the file; an empty list when there are none."""
        with self.reading(long=True) as connection:
            found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found

    def close(self) -> None:
        """Close the database."""
        self.finish_overwriting()
        with self._writer.lock, self._reader.lock:
            self._reader.close()
            self._writer.close()


@contextmanager
def _rows_as_written() -> Iterator[None]:
    """Report impossible values in rows as damage of the file, which SQLite does not always notice.

    Raises:
        sqlite3.DatabaseError: code failed on the values of a row.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise sqlite3.DatabaseError(f"a row is malformed ({type(error).__name__}: {error})") from error


def boot_id() -> str:
    """Return the id of this boot of the machine; empty where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
