"""Faults of drives: any one call or statement of a store can fail, be cut short, or end its process.

``Faults`` counts a store's system calls (``open``, ``write``, ``fsync``, ``rename``, ``unlink``, ``mkdir``) and SQLite
statements (``statement``), in one order, and makes the planned calls go wrong. Give a store ``FaultyFilesystem`` and
``Faults.connect`` in place of the real ones. First run without a fault and look at ``Faults.met``: it lists all points
for a fault.
"""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from kvtier.platform.filesystem import LocalFilesystem, SystemCalls

T = TypeVar("T")
CALLS = ("open", "write", "fsync", "rename", "unlink", "mkdir", "statement")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS)
# System error → the SQLite error that stands for it.
_SQLITE_ERRORS = {
    errno.ENOSPC: ("SQLITE_FULL", 13, "database or disk is full"),
    errno.EDQUOT: ("SQLITE_FULL", 13, "database or disk is full"),
    errno.EIO: ("SQLITE_IOERR", 10, "disk I/O error"),
    errno.EACCES: ("SQLITE_CANTOPEN", 14, "unable to open database file"),
    errno.EROFS: ("SQLITE_READONLY", 8, "attempt to write a readonly database"),
}


class Deed(Enum):
    """Ways for a call to go wrong."""

    FAIL = "fail"
    """The call raises ``OSError``; a statement raises the equivalent ``sqlite3.OperationalError``."""
    KILL = "kill"
    """The process is killed, as by SIGKILL: no handler, no ``finally``, no ``atexit`` runs."""
    SHORT = "short"
    """A ``write`` writes only half of its bytes, at least one. Other calls are not affected."""
    LOSE = "lose"
    """A ``rename`` is done, but a file that was never synced is then empty, as after a power cut."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A planned fault.

    Attributes:
        deed: how the call goes wrong.
        at: the first of the matching calls to go wrong, counted from 1.
        times: how many matching calls from there on; None for all.
        call: one of ``CALLS``; empty for any.
        subject: a pattern (as in ``fnmatch``) for the path, or for the text of a statement.
        error: for ``Deed.FAIL``, a code of ``errno``.
        after: whether the call is done first.
    """

    deed: Deed
    at: int = 1
    times: int | None = 1
    call: str = ""
    subject: str = "*"
    error: int = errno.EIO
    after: bool = False

    def __post_init__(self) -> None:
        if self.call not in ("", *CALLS):
            raise ValueError(f"call={self.call!r} is none of {', '.join(CALLS)}")
        if self.at < 1:
            raise ValueError(f"at={self.at} must be 1 or more")

    def fits(self, call: str, subject: str) -> bool:
        """Whether the fault matches this call."""
        return self.call in ("", call) and fnmatchcase(subject, self.subject)


class Faults:
    """Planned faults, and the calls so far. Thread-safe; ``plan`` may be called at any time.

    Attributes:
        met: ``(call, subject)`` of every call since the last ``plan``, including calls that went wrong.
    """

    def __init__(self, *faults: Fault) -> None:
        self._lock = threading.RLock()
        self.plan(*faults)

    def plan(self, *faults: Fault) -> None:
        """Plan these faults from now on, and restart the counts. Without arguments, no call goes wrong."""
        with self._lock:
            self._counts = dict.fromkeys(faults, 0)
            self.met: list[tuple[str, str]] = []

    def meet(self, call: str, subject: str, do: Callable[[Deed | None], T]) -> T:
        """Do a call with its planned faults. ``do`` gets a deed that it must carry out itself, or None."""
        due = self._due(call, subject)
        for fault in due:
            if not fault.after:
                _bring_about(fault, call, subject)
        own = [fault.deed for fault in due if fault.deed in (Deed.SHORT, Deed.LOSE)]
        result = do(own[0] if own else None)
        for fault in due:
            if fault.after:
                _bring_about(fault, call, subject)
        return result

    def _due(self, call: str, subject: str) -> list[Fault]:
        with self._lock:
            self.met.append((call, subject))
            due = []
            for fault in self._counts:
                if fault.fits(call, subject):
                    self._counts[fault] += 1
                    past = self._counts[fault] - fault.at
                    if past >= 0 and (fault.times is None or past < fault.times):
                        due.append(fault)
            return due

    def connect(self, uri: str, timeout_seconds: float) -> sqlite3.Connection:
        """Connect to a database whose statements pass through ``meet``."""
        return sqlite3.connect(
            uri,
            uri=True,
            timeout=timeout_seconds,
            isolation_level=None,
            check_same_thread=False,
            factory=self.connection_class(),
        )

    def connection_class(self) -> type[sqlite3.Connection]:
        """Return the class of connections whose statements pass through ``meet``."""
        faults = self

        class FaultyConnection(sqlite3.Connection):
            def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
                do = super().execute
                return faults.meet("statement", sql, lambda _: do(sql, *parameters))

            def executemany(self, sql: str, parameters: Iterable[Any]) -> sqlite3.Cursor:
                do = super().executemany
                return faults.meet("statement", sql, lambda _: do(sql, parameters))

            def executescript(self, sql_script: str) -> sqlite3.Cursor:
                do = super().executescript
                return faults.meet("statement", sql_script, lambda _: do(sql_script))

        return FaultyConnection


def _bring_about(fault: Fault, call: str, subject: str) -> None:
    if fault.deed is Deed.KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.deed is not Deed.FAIL:
        return
    if call != "statement":
        raise OSError(fault.error, os.strerror(fault.error), subject)
    name, number, text = _SQLITE_ERRORS.get(fault.error, _SQLITE_ERRORS[errno.EIO])
    error = sqlite3.OperationalError(text)
    error.sqlite_errorname, error.sqlite_errorcode = name, number  # as SQLite's own have since Python 3.11
    raise error


class FaultyCalls(SystemCalls):
    """System calls that pass through ``faults`` to ``inner``."""

    def __init__(self, faults: Faults, inner: SystemCalls | None = None) -> None:
        self._faults = faults
        self._inner = inner or SystemCalls()
        self._paths: dict[int, Path] = {}  # of descriptors that were opened here; numbers are reused
        self._unsynced: set[Path] = set()
        self._lock = threading.Lock()

    def open(self, path: Path, flags: int, mode: int = 0) -> int:
        """Open ``path``."""
        fd = self._faults.meet("open", str(path), lambda _: self._inner.open(path, flags, mode))
        with self._lock:
            self._paths[fd] = path
            if flags & os.O_CREAT:
                self._unsynced.add(path)
        return fd

    def write(self, fd: int, piece: memoryview) -> int:
        """Write as much of ``piece`` as one call takes."""

        def do(deed: Deed | None) -> int:
            some = piece[: max(1, piece.nbytes // 2)] if deed is Deed.SHORT else piece
            return self._inner.write(fd, some)

        return self._faults.meet("write", str(self._paths[fd]), do)

    def fsync(self, fd: int) -> None:
        """Wait until the drive holds the file or folder."""
        path = self._paths[fd]
        self._faults.meet("fsync", str(path), lambda _: self._inner.fsync(fd))
        with self._lock:
            self._unsynced.discard(path)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file."""

        def do(deed: Deed | None) -> None:
            self._inner.rename(old, new)
            with self._lock:
                unsynced = old in self._unsynced
                self._unsynced -= {old, new}
                if unsynced:
                    self._unsynced.add(new)
            if unsynced and deed is Deed.LOSE:
                os.truncate(new, 0)

        self._faults.meet("rename", str(new), do)

    def unlink(self, path: Path) -> None:
        """Delete a file."""
        self._faults.meet("unlink", str(path), lambda _: self._inner.unlink(path))

    def mkdir(self, path: Path, mode: int) -> None:
        """Make one folder."""
        self._faults.meet("mkdir", str(path), lambda _: self._inner.mkdir(path, mode))

    def cut_power(self, keep_bytes: int = 0) -> list[Path]:
        """Cut every unsynced file down to ``keep_bytes``, as a drive may do; return the paths of these files."""
        with self._lock:
            lost, self._unsynced = sorted(path for path in self._unsynced if path.exists()), set()
        for path in lost:
            os.truncate(path, min(keep_bytes, path.stat().st_size))
        return lost


class FaultyFilesystem(LocalFilesystem):
    """A local drive whose calls go wrong as planned in ``faults``.

    ``FaultyFilesystem(Faults(Fault(Deed.FAIL, call="unlink", subject="*.safetensors", times=None)))`` never deletes a
    block, for instance.
    """

    def __init__(self, faults: Faults, inner: SystemCalls | None = None) -> None:
        self.faults = faults
        self.calls = FaultyCalls(faults, inner)
        super().__init__(self.calls)
