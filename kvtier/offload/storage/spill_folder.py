"""SpillFolder: a private folder of page files, deleted with its cache."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import uuid
import weakref
from pathlib import Path
from typing import Any

from kvtier.errors import StreamError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: folders of killed processes cannot be told from live ones, and stay
    fcntl = None

_log = logging.getLogger("kvtier.offload")
_LOCK = "owner.lock"
_NAME = re.compile(r"\d+-[0-9a-f]{32}")
_ATTEMPTS = 10


class SpillFolder:
    """A private folder (0700) below ``parent``, made when it is first needed, deleted by ``close`` and at exit.

    Its owner holds a lock on a file in it. Folders beside it without a living owner were left by killed processes, and
    are deleted at once.

    Raises:
        StreamError: the folder cannot be made.
    """

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        self._path: Path | None = None
        self._remove: weakref.finalize[[Path, int, int], SpillFolder] | None = None
        self._users = 1
        _sweep(parent)
        self._pid = os.getpid()

    def new_file(self, suffix: str = "safetensors") -> str:
        """Return the path of a file that does not exist yet; make the folder if needed.

        Raises:
            StreamError: the folder cannot be made.
        """
        try:
            if self._path is None or not (self._path / _LOCK).exists():  # it may have been deleted
                self._make()
        except OSError as error:
            raise StreamError(
                f"cannot keep cold pages in {self.parent}: {error}; pass a folder you can write to as spill_dir=…"
            ) from error
        return f"{self._path}/{uuid.uuid4().hex}.{suffix}"

    def share(self) -> SpillFolder:
        """Return this folder for another user, which must close it too."""
        self._users += 1
        return self

    def forget(self, path: str) -> None:
        """Delete a file that is no longer read."""
        if os.getpid() != self._pid:
            return  # a forked child drops copies; the files belong to its parent
        with contextlib.suppress(OSError):
            Path(path).unlink()

    def _make(self) -> None:
        """Make the folder, with a lock in it that this process holds.

        Raises:
            OSError: it cannot be made; nothing is left of it.
        """
        if self._remove is not None:
            self._remove()
        self.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            path = self.parent / f"{os.getpid()}-{uuid.uuid4().hex}"
            path.mkdir(mode=0o700)
            try:
                lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # another process has swept the empty folder
                continue
            except BaseException:
                with contextlib.suppress(OSError):
                    path.rmdir()
                raise
            if _is_held(path, lock):
                self._remove = weakref.finalize(self, _remove, path, lock, os.getpid())
                self._path = path
                return
            os.close(lock)  # another process has found it unlocked, and sweeps it
        raise OSError(errno.EAGAIN, "other processes delete each folder that is made", str(self.parent))

    def close(self) -> None:
        """Delete the folder and its content when the last user closes it."""
        self._users -= 1
        if self._users == 0 and self._remove is not None:
            self._remove()


def _remove(path: Path, lock: int, pid: int) -> None:
    if os.getpid() == pid:  # a forked child did not make it
        shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _is_held(path: Path, lock: int) -> bool:
    """Lock a folder; return whether its lock was free, and the folder still exists."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: then no process can sweep it either
        return True
    try:
        return (path / _LOCK).stat().st_ino == os.fstat(lock).st_ino
    except FileNotFoundError:
        return False


def _sweep(parent: Path) -> None:
    """Delete the folders whose owners are gone. Only folders with such a name are examined."""
    if fcntl is None:
        return
    try:
        folders = [path for path in parent.iterdir() if _NAME.fullmatch(path.name)]
    except OSError:  # ``parent`` does not exist yet
        return
    for path in folders:
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                path.rmdir()  # pages come after the lock: without a lock it is empty, or not ours
            continue
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its owner is alive
        else:
            _log.info("deleting %s, left by a process that was killed", path)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
