"""Page files: K and V of cold layers on disk, in a folder that lives as long as its cache."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kvtier.errors import StreamError
from kvtier.geometry import LayerGeometry
from kvtier.headers import DTYPE_NAMES, encode_header
from kvtier.pages import Landing

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: a folder that a killed process left is not told from a living one's, and stays
    fcntl = None

_log = logging.getLogger("kvtier.stream")
_Transfer = Callable[[int, list[memoryview], int], int]
_LOCK = "owner.lock"
_MAX_PIECES = 1024  # of one vectored system call (IOV_MAX of Linux and macOS)


class SpillFolder:
    """A private folder (0700) below ``parent``, made when it is first needed, deleted by ``close`` and at exit.

    Its owner holds a lock on a file in it. Folders without a living owner were left by killed processes: whoever makes
    a folder beside them deletes them.

    Raises:
        StreamError: the folder cannot be made.
    """

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        self._path: Path | None = None
        self._remove: weakref.finalize[[Path, int, int], SpillFolder] | None = None
        self._users = 1
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
        _sweep(self.parent)
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


class PageFile:
    """K ``[rows, k_heads, tokens, k_dim]`` and V ``[rows, v_heads, tokens, v_dim]`` as a safetensors file (0600).

    Written once, piece by piece; read in pieces by any thread. The file is deleted when the object is.
    """

    def __init__(self, folder: SpillFolder, rows: int, tokens: int, geometry: LayerGeometry) -> None:
        g = geometry
        self.rows, self.tokens, self.geometry = rows, tokens, geometry
        name = DTYPE_NAMES.get(g.dtype)
        if name is None:
            raise StreamError(f"cold pages of {g.dtype} cannot be kept in files")
        k_bytes, v_bytes = rows * tokens * g.k_bytes, rows * tokens * g.v_bytes
        self.path = path = folder.new_file()
        self._header = encode_header(
            [
                ("k", name, (rows, g.k_heads, tokens, g.k_dim), k_bytes),
                ("v", name, (rows, g.v_heads, tokens, g.v_dim), v_bytes),
            ],
            {"format": "kvtier-pages/1"},
        )
        self._k_begin = len(self._header)
        self._v_begin = self._k_begin + k_bytes
        self.nbytes = self._v_begin + v_bytes
        weakref.finalize(self, folder.forget, path).atexit = False

    def write(self, first: int, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> None:
        """Write the tokens from ``first`` on; both tensors are on the host.

        Raises:
            StreamError: the disk is full, or fails.
        """
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600)
            try:
                if os.fstat(fd).st_size < self.nbytes:
                    os.ftruncate(fd, self.nbytes)
                    _transfer_all(os.pwritev, fd, [memoryview(self._header)], 0)
                landing = [Landing.on(k_bhtd[row], v_bhtd[row]) for row in range(self.rows)]
                for row, at in enumerate(landing):
                    self._move(fd, os.pwritev, row, first, at)
            finally:
                os.close(fd)
        except OSError as error:
            raise StreamError(f"cannot write cold pages to {self.path}: {error}") from error

    def read(self, row: int, first: int, last: int, landing: Landing) -> None:
        """Put the tokens ``[first, last)`` of a row into ``landing``, which has their size.

        Raises:
            StreamError: the file is gone, cut short, or cannot be read.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
            try:
                if os.fstat(fd).st_size != self.nbytes:
                    raise StreamError(f"the page file {self.path} has been cut short or changed: its K and V are lost")
                self._move(fd, os.preadv, row, first, landing.cut(0, last - first))
            finally:
                os.close(fd)
        except OSError as error:
            raise StreamError(f"cannot read cold pages from {self.path}: {error}; their K and V are lost") from error

    def _move(self, fd: int, transfer: _Transfer, row: int, first: int, landing: Landing) -> None:
        g = self.geometry
        for begin, heads_htb, row_bytes in (
            (self._k_begin, landing.k_htb, self.tokens * g.k_bytes),
            (self._v_begin, landing.v_htb, self.tokens * g.v_bytes),
        ):
            heads, tokens, _ = heads_htb.shape
            at = begin + row * row_bytes
            head_bytes = row_bytes // heads
            pieces = [memoryview(head_tb) for head_tb in heads_htb]
            # Whole heads of a row lie next to each other.
            together = _MAX_PIECES if tokens == self.tokens else 1
            for h in range(0, heads, together):
                offset = at + h * head_bytes + first * (head_bytes // self.tokens)
                _transfer_all(transfer, fd, pieces[h : h + together], offset)


def _transfer_all(transfer: _Transfer, fd: int, pieces: Sequence[memoryview], offset: int) -> None:
    """Read or write all of ``pieces``, however little one system call does."""
    left = [piece.cast("B") for piece in pieces]
    while left:
        count = transfer(fd, left, offset)
        if count == 0:
            raise OSError(f"ends at {offset} bytes")
        offset += count
        while left and count >= left[0].nbytes:
            count -= left.pop(0).nbytes
        if left:
            left[0] = left[0][count:]
