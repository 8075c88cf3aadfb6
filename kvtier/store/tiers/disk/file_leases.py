"""FileLeases: leases on blocks between processes, as byte locks on one file of the store.

Each block has a byte of its own in that file; only the locks exist, not the bytes. A reader shares the lock of its
block's byte; an eviction takes it exclusively. The locks belong to an open file, not to a process (Linux, fcntl(2),
"Open file description locks"): they end when the process ends, however it ends, and any number of blocks takes one
descriptor.

Where the system has no such locks, blocks that another process reads can be evicted. That process then finds them
missing, and recomputes their tokens: a block is read to the end from the same file, or not at all.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections import Counter
from pathlib import Path

from kvtier.platform.fork_safety import Rank, take_part

with contextlib.suppress(ImportError):  # Windows, where no folder can be opened
    import fcntl

_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_FLOCK = struct.Struct("hhqqi")  # type, whence, start, length, pid: ``struct flock``
_PLACE_DIGITS = 15  # of a key in hex: 60 bits, which a file offset can hold


class FileLeases:
    """Leases and claims of one store on its blocks. Thread-safe.

    Two blocks in 2**60 share a byte: an unread block may then stay a while longer.

    Args:
        path: the file, made if missing. If that fails, processes do not see each other's leases.
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
        """Release the lock; a child takes leases of its own for its copies of readers."""
        try:
            if in_child and not self._closed:
                self._claimed.clear()
                self._begin_anew()
        finally:
            self._lock.release()

    def _begin_anew(self) -> None:
        """Open the file, and lock the bytes of all current leases."""
        with contextlib.suppress(OSError):  # the folder is gone, or the path is no such file
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
        """Change the lock of a byte; return False if another lock is in the way."""
        if not hasattr(fcntl, "F_OFD_SETLK") or self._fd < 0:
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
        """Switch to the file now at the path, if the open one was deleted or replaced."""
        try:
            found = _identity(self._path.lstat())
        except OSError:
            found = None
        if found is None or found != self._file:
            self._begin_anew()

    def share(self, key: str) -> bool:
        """Take a lease on block ``key``; return False if it is claimed. Each lease must be released."""
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
        """Claim block ``key``: no read of it begins until ``unclaim``. Returns False if it is being read or claimed."""
        place = _place(key)
        with self._lock:
            if place in self._shared or place in self._claimed:
                return False
            self._look_for_another_file()
            if not self._set("F_WRLCK", place):
                return False
            self._claimed.add(place)
            return True

    def are_held(self) -> bool:
        """Whether any block may be shared or claimed now, in this process or another one; one call for all blocks."""
        with self._lock:
            if self._shared or self._claimed:
                return True
            self._look_for_another_file()
            if not hasattr(fcntl, "F_OFD_GETLK") or self._fd < 0:
                return False  # ``claim`` finds none either
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # all bytes of the file
            try:
                found, *_ = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked))
            except OSError:  # a drive without locks, which only one process uses at a time
                return False
            return bool(found != fcntl.F_UNLCK)

    def unclaim(self, key: str) -> None:
        """End the claim on block ``key``, so that it can be read again."""
        place = _place(key)
        with self._lock:
            self._claimed.discard(place)
            self._set("F_UNLCK", place)

    def close(self) -> None:
        """Close the file, once no block is being read. May be called more than once."""
        with self._lock:
            self._closed = True
            if not self._shared:
                self._let_go()


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _place(key: str) -> int:
    return int(key[:_PLACE_DIGITS], 16)
