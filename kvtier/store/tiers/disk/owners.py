"""Owners: the store objects that use a folder, in all processes, and whether each of them is alive.

Each owner holds a lock on a small file of its own while it lives. The system releases the lock when the process ends,
however it ends. Unlike a process id, the lock means the same in every container that sees the folder.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from kvtier.platform.fork_safety import Rank, take_part

with contextlib.suppress(ImportError):  # Windows, where no folder can be opened
    import fcntl

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NAME = re.compile(r"(\d{1,10})-[0-9a-f]{16}")


class Owner:
    """One living store object. Its ``name`` marks its unfinished writes and deletions.

    A forked child has a name of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd = -1
        self._closed = False
        self._begin()
        take_part(self, Rank.OWNER)

    def _begin(self) -> None:
        while True:
            self.name = f"{os.getpid()}-{os.urandom(8).hex()}"
            path = self._path(self.name)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:
                if path.stat().st_ino == os.fstat(self._fd).st_ino:
                    return
            except FileNotFoundError:
                pass  # another store saw the file before it was locked, and removed it
            os.close(self._fd)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.lock"

    def before_fork(self) -> None:
        """Do nothing: no change of an owner has two steps."""

    def after_fork(self, in_child: bool) -> None:
        """Take another name in a child: the unfinished work of its parent is not the child's."""
        if in_child and not self._closed:
            os.close(self._fd)  # the lock stays with the parent
            try:
                self._begin()
            except OSError:  # the folder is gone, or full: other stores take this process for dead
                self._fd, self._closed = -1, True

    def lives(self, name: str) -> bool:
        """Whether the owner ``name`` is alive. Any other string counts as a dead owner."""
        if name == self.name:
            return not self._closed
        match = _NAME.fullmatch(name)
        if match is None:
            return False
        try:
            fd = os.open(self._path(name), os.O_RDWR | _NOFOLLOW)
        except PermissionError:  # the file of another user, perhaps root: its lock cannot be tested
            return _runs(int(match[1]))
        except OSError:  # it is gone, or is no lock file
            return False
        try:
            return _is_locked(fd)
        finally:
            os.close(fd)

    def others(self) -> list[str]:
        """Return the names of all other owners, dead ones included."""
        return [path.stem for path in self._folder.glob("*.lock") if path.stem != self.name]

    def bury(self, name: str) -> None:
        """Remove the file of a dead owner that has left no unfinished work."""
        with contextlib.suppress(OSError):  # another store has done it, or will
            self._path(name).unlink()

    def close(self) -> None:
        """Remove the file and release the lock. No unfinished work may be left. May be called more than once."""
        if self._closed:
            return
        self._closed = True
        self.bury(self.name)
        os.close(self._fd)


def pid_of(name: str) -> int:
    """Return the process id of an owner; 0 when ``name`` is no name of an owner."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else 0


def _is_locked(fd: int) -> bool:
    """Whether another process or owner has the lock of an open file. If not, ``fd`` shares it until it is closed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a drive without locks, which only one process uses at a time
        pass
    return False


def _runs(pid: int) -> bool:
    """Whether a process runs. Used where locks cannot be tested."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
