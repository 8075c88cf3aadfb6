"""A pool of open files: many files are read repeatedly, few of them are open at a time.

The system limits how many files a process may have open (256 on macOS, 1,024 on most of Linux), while a long prompt has
thousands of blocks. So a ``ReadFile`` does not stay open: its descriptor is kept while there is room, and reopened when
it is needed again.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from kvtier.errors import GoneError
from kvtier.platform.fork_safety import Rank, take_part

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None

_FEWEST, _MOST = 8, 256
_SHARE = 4  # of what the process may have open, a quarter
_TOO_MANY = (errno.EMFILE, errno.ENFILE)


@dataclass(slots=True, eq=False)
class _Open:
    fd: int
    users: int = 1


class Descriptors:
    """The descriptors of files that are in use or were recently used. Thread-safe.

    Args:
        most: open descriptors above which unused ones are closed; by default a quarter of the process's limit, 8 to
            256.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._open: OrderedDict[ReadFile, _Open] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        take_part(self, Rank.DESCRIPTORS)

    def before_fork(self) -> None:
        """Wait until no thread changes the pool."""
        self._lock.acquire()

    def after_fork(self, in_child: bool) -> None:
        """Go on. A child closes its copies and opens files itself: it cannot know which were in use by threads."""
        if in_child:
            for opened in self._open.values():
                os.close(opened.fd)
            self._open.clear()
        self._lock.release()

    def borrow(self, file: ReadFile, open_file: Callable[[], int]) -> int:
        """Return a descriptor of ``file``, opened if there is none; ``give_back`` must follow.

        Raises:
            OSError: the file cannot be opened.
        """
        with self._lock:
            opened = self._open.get(file)
            if opened is not None:
                opened.users += 1
                self._open.move_to_end(file)
                return opened.fd
        fd = self.open(open_file)
        with self._lock:
            opened = self._open.get(file)
            if opened is None:
                self._open[file] = _Open(fd)
                return fd
            opened.users += 1
        os.close(fd)  # another thread was faster
        return opened.fd

    def open(self, open_file: Callable[[], int]) -> int:
        """Return the result of ``open_file``; if too many files are open, close unused ones and try again.

        Raises:
            OSError: the file cannot be opened.
        """
        try:
            return open_file()
        except OSError as error:
            if error.errno not in _TOO_MANY or not self._close_idle(0):
                raise
        return open_file()

    def give_back(self, file: ReadFile) -> None:
        """End a use of the descriptor of ``file``; unused descriptors are closed if there is no room."""
        limit = self._limit()
        with self._lock:
            self._open[file].users -= 1
            full = len(self._open) > limit
        if full:
            self._close_idle(limit)

    def close(self, file: ReadFile) -> None:
        """Close the descriptor of ``file``, which is not in use, if one is open."""
        with self._lock:
            opened = self._open.pop(file, None)
        if opened is not None:
            os.close(opened.fd)

    def _close_idle(self, leave: int) -> bool:
        """Close unused descriptors until ``leave`` are open; return whether one was closed."""
        with self._lock:
            idle = [*(file for file, opened in self._open.items() if not opened.users)]
            closed = [self._open.pop(file).fd for file in idle[: max(0, len(self._open) - leave)]]
        for fd in closed:
            os.close(fd)
        return bool(closed)

    def _limit(self) -> int:
        if self._most is not None:
            return self._most
        if resource is None:
            return _MOST
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return _MOST if allowed == resource.RLIM_INFINITY else max(_FEWEST, min(_MOST, allowed // _SHARE))

    def __len__(self) -> int:
        return len(self._open)


OF_THIS_PROCESS = Descriptors()
"""One pool for all stores, since the limit of descriptors is per process."""


class ReadFile:
    """A file that is read in pieces, by any thread. Later reads are of the same file as the first, or fail.

    Args:
        open_file: opens it for reading, and raises ``OSError``.
        descriptors: the pool that keeps its descriptor.
    """

    def __init__(self, open_file: Callable[[], int], descriptors: Descriptors = OF_THIS_PROCESS) -> None:
        self._open_file = open_file
        self._descriptors = descriptors
        self._identity: tuple[int, ...] | None = None
        self._is_held = False

    def __enter__(self) -> int:
        """Return a descriptor of the file, which stays open until ``__exit__``. Threads may use one file side by side.

        Raises:
            OSError: it cannot be opened.
            GoneError: the file was deleted or replaced since it was first read.
        """
        return self._descriptors.borrow(self, self._open_same)

    def __exit__(self, *_: object) -> None:
        """End this use of the descriptor."""
        self._descriptors.give_back(self)

    def _open_same(self) -> int:
        try:
            fd = self._open_file()
        except FileNotFoundError as error:
            if self._identity is None:
                raise
            raise GoneError(f"{error}: it was there before") from error
        try:
            found = os.fstat(fd)
            identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if self._identity not in (None, identity):
                raise GoneError("another file is in its place")
            self._identity = identity
        except BaseException:
            os.close(fd)
            raise
        return fd

    def hold(self) -> None:
        """Stay open from now on: the file is about to be deleted.

        Raises:
            OSError: it cannot be opened.
            GoneError: the file was deleted or replaced since it was first read.
        """
        if not self._is_held:
            self._descriptors.borrow(self, self._open_same)
            self._is_held = True

    def close(self) -> None:
        """Close the file. May be called more than once, while no read is running."""
        self._descriptors.close(self)
