"""PageFile: K and V of one layer, for some tokens of all rows, as a safetensors file."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch

from kvtier.errors import StreamError
from kvtier.kv.page import PageView
from kvtier.kv.safetensors_header import dtype_name, encode_header
from kvtier.kv.spec import LayerSpec
from kvtier.offload.storage.spill_folder import SpillFolder
from kvtier.platform.descriptors import OF_THIS_PROCESS

READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
_Transfer = Callable[[int, list[memoryview], int], int]
_MAX_PIECES = 1024  # of one vectored system call (IOV_MAX of Linux and macOS)


class PageFile:
    """K ``[rows, k_heads, tokens, k_dim]`` and V ``[rows, v_heads, tokens, v_dim]`` as a safetensors file (0600).

    Written once, piece by piece; read in pieces by any thread. The file is deleted when the object is.
    """

    tier = "disk"

    def __init__(self, folder: SpillFolder, rows: int, tokens: int, spec: LayerSpec) -> None:
        g = spec
        self.rows, self.tokens, self.spec = rows, tokens, spec
        k_name, v_name = dtype_name(g.dtype), dtype_name(g.values_dtype)
        if k_name is None or v_name is None:
            raise StreamError(f"cold pages of {g.dtype} and {g.values_dtype} cannot be kept in files")
        k_bytes, v_bytes = rows * tokens * g.k_bytes, rows * tokens * g.v_bytes
        self.path = path = folder.new_file()
        self._header = encode_header(
            [
                ("k", k_name, (rows, g.k_heads, tokens, g.k_dim), k_bytes),
                ("v", v_name, (rows, g.v_heads, tokens, g.v_dim), v_bytes),
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
            fd = OF_THIS_PROCESS.open(partial(os.open, self.path, WRITE_FLAGS, 0o600))
            try:
                if os.fstat(fd).st_size < self.nbytes:
                    os.ftruncate(fd, self.nbytes)
                    transfer_all(os.pwritev, fd, [memoryview(self._header)], 0)
                view = [PageView.on(k_bhtd[row], v_bhtd[row]) for row in range(self.rows)]
                for row, at in enumerate(view):
                    self._move(fd, os.pwritev, row, first, at)
            finally:
                os.close(fd)
        except OSError as error:
            raise StreamError(f"cannot write cold pages to {self.path}: {error}") from error

    def read(self, row: int, first: int, last: int, view: PageView) -> None:
        """Put the tokens ``[first, last)`` of a row into ``view``, which has their size.

        Raises:
            StreamError: the file is gone, cut short, or cannot be read.
        """
        try:
            fd = OF_THIS_PROCESS.open(partial(os.open, self.path, READ_FLAGS))
            try:
                if os.fstat(fd).st_size != self.nbytes:
                    raise StreamError(f"the page file {self.path} has been cut short or changed: its K and V are lost")
                self._move(fd, os.preadv, row, first, view.cut(0, last - first))
            finally:
                os.close(fd)
        except OSError as error:
            raise StreamError(f"cannot read cold pages from {self.path}: {error}; their K and V are lost") from error

    def _move(self, fd: int, transfer: _Transfer, row: int, first: int, view: PageView) -> None:
        g = self.spec
        for begin, heads_htb, row_bytes in (
            (self._k_begin, view.k_htb, self.tokens * g.k_bytes),
            (self._v_begin, view.v_htb, self.tokens * g.v_bytes),
        ):
            heads, tokens, _ = heads_htb.shape
            at = begin + row * row_bytes
            head_bytes = row_bytes // heads
            pieces = [memoryview(head_tb) for head_tb in heads_htb]
            # Whole heads of a row lie next to each other.
            together = _MAX_PIECES if tokens == self.tokens else 1
            for h in range(0, heads, together):
                offset = at + h * head_bytes + first * (head_bytes // self.tokens)
                transfer_all(transfer, fd, pieces[h : h + together], offset)


def transfer_all(transfer: _Transfer, fd: int, pieces: Sequence[memoryview], offset: int) -> None:
    """Read or write all of ``pieces``, in as many system calls as needed."""
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
