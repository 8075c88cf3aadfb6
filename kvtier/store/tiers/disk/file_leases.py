"""FileLeases: which blocks any process is reading, as byte locks on one file of the store.

Each block has a byte of its own in that file, of which only the locks exist. A reader of a block shares the lock of
its byte; an eviction claims it alone. The locks are those of an open file, not of a process (Linux,
fcntl(2), "Open file description locks"): they end when the process does, however it ends, and take one descriptor for
however many blocks.

Where the system has no such locks, blocks that another process reads can be evicted. It then finds them missing, and
computes their tokens: a block file is read to the end from the same file, or not at all.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections import Counter
from pathlib import Path
from types import ModuleType

from kvtier.platform.fork_safety import Rank, take_part

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_FLOCK = struct.Struct("hhqqi")  # type, whence, start, length, pid: ``struct flock``
_PLACE_DIGITS = 15  # of a key in hex: 60 bits, which a file offset can hold


class FileLeases:
    """The leases of one store on its blocks, and its claims. Thread-safe.

    Two blocks in 2**60 share a byte: then one that is not read may stay a while longer.

    Args:
        path: the file, made if missing. Where it cannot be, nothing is told between processes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shared: Counter[int] = Counter()
        self._claimed: set[int] = set()
        self._lock = threading.RLock()  # a reader may be collected while this thread holds it
        self._closed = False
        self._fd = -1
        self._file: tuple[int, int] | None = None
        self._begin_anew()
        take_part(self, Rank.FILE_LEASES)

    def before_fork(self) -> None:
        """Wait until no thread changes anything."""
        self._lock.acquire()

    def after_fork(self, in_child: bool) -> None:
        """Go on; a child takes leases of its own on what it has a copy of."""
        try:
            if in_child and not self._closed:
                self._claimed.clear()
                self._begin_anew()
        finally:
            self._lock.release()

    def _begin_anew(self) -> None:
        """Open the file, and take on it what is shared already."""
        with contextlib.suppress(OSError):  # the folder is gone, or something else bears the name
            fd = os.open(self._path, _FLAGS, 0o600)
            self._let_go()
            self._fd, self._file = fd, _identity(os.fstat(fd))
            for place in self._shared:
                self._set("F_RDLCK", place)

    def _let_go(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._file = -1, None

    def _set(self, kind: str, place: int) -> bool:
        """Change the lock of a byte; return whether no other lock was in the way."""
        if fcntl is None or not hasattr(fcntl, "F_OFD_SETLK") or self._fd < 0:
            return True
        lock = _FLOCK.pack(getattr(fcntl, kind), os.SEEK_SET, place, 1, 0)
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, lock)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a drive without locks, which only one process uses at a time
            return True
        return True

    def _look_for_another_file(self) -> None:
        """Go over to the file that others lock by now, if somebody has tidied up."""
        try:
            found = _identity(self._path.lstat())
        except OSError:
            found = None
        if found is None or found != self._file:
            self._begin_anew()

    def share(self, key: str) -> bool:
        """Take a lease on block ``key``; return whether it is not claimed. Each lease is released."""
        place = _place(key)
        with self._lock:
            if place in self._claimed:
                return False
            if place not in self._shared:
                self._look_for_another_file()
                if not self._set("F_RDLCK", place):
                    return False
            self._shared[place] += 1
            return True

    def release(self, key: str) -> None:
        """End one lease on block ``key``."""
        place = _place(key)
        with self._lock:
            self._shared[place] -= 1
            if self._shared[place] <= 0:
                del self._shared[place]
                self._set("F_UNLCK", place)
                if self._closed and not self._shared:
                    self._let_go()

    def claim(self, key: str) -> bool:
        """Claim block ``key``, so that no read of it begins; return whether none is running. ``unclaim`` ends it."""
        place = _place(key)
        with self._lock:
            if place in self._shared or place in self._claimed:
                return False
            self._look_for_another_file()
            if not self._set("F_WRLCK", place):
                return False
            self._claimed.add(place)
            return True

    def unclaim(self, key: str) -> None:
        """Let block ``key`` be read again."""
        place = _place(key)
        with self._lock:
            self._claimed.discard(place)
            self._set("F_UNLCK", place)

    def close(self) -> None:
        """Let go of the file, once nothing is read any more. May be called more than once."""
        with self._lock:
            self._closed = True
            if not self._shared:
                self._let_go()


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _place(key: str) -> int:
    return int(key[:_PLACE_DIGITS], 16)
