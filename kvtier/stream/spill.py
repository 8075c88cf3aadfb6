"""The spill folder: a private place for page files, which lives as long as its cache."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
import weakref
from pathlib import Path
from typing import Any

from kvtier.errors import StreamError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: a folder that a killed process left is not told from a living one's, and stays
    fcntl = None

_log = logging.getLogger("kvtier.stream")
_LOCK = "owner.lock"


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

    def new_file(self) -> str:
        """Return a path that no file has."""
        if self._path is None:
            try:
                self._make()
            except OSError as error:
                raise StreamError(
                    f"cannot keep cold pages in {self.parent}: {error}; pass a folder you can write to as spill_dir=…"
                ) from error
        return f"{self._path}/{uuid.uuid4().hex}.safetensors"

    def share(self) -> SpillFolder:
        """Return the folder for another user, who closes it too."""
        self._users += 1
        return self

    def forget(self, path: str) -> None:
        """Delete a file that nobody reads any more."""
        if os.getpid() != self._pid:
            return  # a forked child lets go of copies; the files are its parent's
        with contextlib.suppress(OSError):
            Path(path).unlink()

    def _make(self) -> None:
        self.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.parent / f"{os.getpid()}-{uuid.uuid4().hex}"
        path.mkdir(mode=0o700)
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks: then nobody can sweep it either
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._remove = weakref.finalize(self, _remove, path, lock, os.getpid())
        self._path = path

    def close(self) -> None:
        """Delete the folder and what is in it, when the last of its users closes it."""
        self._users -= 1
        if self._users == 0 and self._remove is not None:
            self._remove()


def _remove(path: Path, lock: int, pid: int) -> None:
    if os.getpid() == pid:  # a fork has not made it
        shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _sweep(parent: Path) -> None:
    """Delete the folders whose owners are gone."""
    if fcntl is None:
        return
    for lock_path in parent.glob(f"*/{_LOCK}"):
        try:
            lock = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its owner lives
        else:
            _log.info("deleting %s, left by a process that was killed", lock_path.parent)
            shutil.rmtree(lock_path.parent, ignore_errors=True)
        finally:
            os.close(lock)
