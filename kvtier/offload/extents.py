"""Extents: full pages of one layer that are contiguous in a lower tier."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from kvtier.kv.buffer import KVBuffer
from kvtier.kv.page import PageView
from kvtier.kv.spec import LayerSpec
from kvtier.offload.host_memory import HostPool, Slice, StagingBuffer
from kvtier.transfer.base import CopyEngine, Fence, Pair


class Extent(Protocol):
    """K ``[rows, k_heads, tokens, k_dim]`` and V of full pages. Immutable, and may be shared by layers and caches.

    Attributes:
        tokens: a whole number of pages.
        tier: ``host`` or ``disk``.
        spec: spec of its layer.
    """

    tokens: int
    tier: str
    spec: LayerSpec

    def lift(self, into: KVBuffer, begin: int, part: Part, after: Sequence[Fence]) -> list[Fence]:
        """Copy ``part`` of this extent to the columns of ``into`` from ``begin`` on, when ``after`` has passed.

        Returns:
            The fences of all copies; there is at least one.
        """

    def read(self, row: int, first: int, last: int, view: PageView) -> None:
        """Copy the tokens ``[first, last)`` of a row to host memory; block until that is done.

        Raises:
            StreamError: the tokens are lost.
        """


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens ``[first, last)`` of an extent; row ``i`` of the layer is row ``rows[i]`` of the extent."""

    extent: Extent
    first: int
    last: int
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.last - self.first

    @property
    def nbytes(self) -> int:
        """Bytes of K and V of all rows."""
        return len(self.rows) * self.tokens * self.extent.spec.token_bytes

    def lift(self, into: KVBuffer, begin: int, after: Sequence[Fence]) -> list[Fence]:
        """Copy it to the columns of ``into`` from ``begin`` on."""
        return self.extent.lift(into, begin, self, after)


class PageSource(Protocol):
    """Owner of pages that a cold layer borrows, such as a block of a store."""

    def land(self, layer: int, first: int, last: int, view: PageView) -> None:
        """Put the tokens ``[first, last)`` of the page of ``layer`` into ``view``."""


class HostExtent:
    """Pages in host memory: pinned where that helps. ``fill`` must be called first, once.

    Its memory returns to the slabs when nothing refers to it; the next write there comes after the copies that still
    read it.
    """

    tier = "host"

    def __init__(
        self, engine: CopyEngine, host_pool: HostPool, piece: Slice, rows: int, tokens: int, g: LayerSpec
    ) -> None:
        self._engine = engine
        self._pages = KVBuffer.on_bytes(piece.memory, rows, g, tokens)
        self._after = piece.after
        self._users: list[Fence] = []
        self.tokens, self.spec = tokens, g
        weakref.finalize(self, host_pool.give, piece, self._users)

    def fill(self, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, after: Sequence[Fence]) -> list[Fence]:
        """Copy K and V of all rows from the device when ``after`` has passed; return the fences."""
        pages = self._pages
        pairs = [
            pair for row in range(pages.rows) for pair in _heads(pages, row, 0, self.tokens, k_bhtd[row], v_bhtd[row])
        ]
        self._users.append(self._engine.copy_all(pairs, after=[*after, *self._after]))
        return list(self._users)

    def lift(self, into: KVBuffer, begin: int, part: Part, after: Sequence[Fence]) -> list[Fence]:
        """Copy to the device, head by head: memory that is contiguous on both sides is one large copy."""
        k, v = self._pages.k[:, :, part.first : part.last], self._pages.v[:, :, part.first : part.last]
        end = begin + part.tokens
        pairs = [pair for i, row in enumerate(part.rows) for pair in _heads(into, i, begin, end, k[row], v[row])]
        # Each use comes after the one before, so that the last fence stands for all of them.
        self._users[:] = [self._engine.copy_all(pairs, after=[*after, *self._users])]
        return list(self._users)

    def read(self, row: int, first: int, last: int, view: PageView) -> None:
        """Copy to ``view``."""
        for fence in self._users:
            self._engine.settle(fence)
        view.take(self._pages.page(row, first, last), 0, last - first)


def _heads(into: KVBuffer, row: int, begin: int, end: int, k_htd: torch.Tensor, v_htd: torch.Tensor) -> Iterator[Pair]:
    """Pair the columns ``[begin, end)`` of each head of a row with its source."""
    for buffer, source in ((into.k, k_htd), (into.v, v_htd)):
        for head in range(buffer.shape[1]):
            yield buffer[row, head, begin:end], source[head]


class PageStorage(Protocol):
    """Keeps K ``[rows, k_heads, tokens, k_dim]`` and V of one layer where only host code reaches them.

    Attributes:
        rows: sequences.
        tokens: tokens of each.
        spec: spec of the layer.
        tier: ``host`` or ``disk``.
    """

    rows: int
    tokens: int
    spec: LayerSpec
    tier: str

    def write(self, first: int, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> None:
        """Keep the tokens from ``first`` on; both tensors are on the host.

        Raises:
            StreamError: there is no room, or the storage fails.
        """

    def read(self, row: int, first: int, last: int, view: PageView) -> None:
        """Put the tokens ``[first, last)`` of a row into ``view``, which has their size.

        Raises:
            StreamError: the tokens are lost.
        """


class StagedExtent:
    """Pages in a file, or encoded in host memory. ``fill`` must be called first, once.

    On a device that reads host memory, they are read into buffers; else through staging memory.
    """

    def __init__(self, engine: CopyEngine, staging: StagingBuffer | None, storage: PageStorage) -> None:
        self._engine = engine
        self._staging = staging
        self._storage = storage
        self._written: list[Fence] = []
        self.tokens, self.spec, self.tier = storage.tokens, storage.spec, storage.tier

    def fill(self, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, after: Sequence[Fence]) -> list[Fence]:
        """Write K and V of all rows when ``after`` has passed; return the fences that free the source."""
        if self._staging is None:
            write = partial(self._storage.write, 0, k_bhtd, v_bhtd)
            self._written = [self._engine.call(write, reads=(k_bhtd, v_bhtd), after=after)]
            return self._written
        freed: list[Fence] = []
        rows = self._storage.rows
        for first, last in self._staging.chunks(0, self.tokens, rows * self.spec.token_bytes):
            stage, free = self._staging.next(rows, last - first, self.spec)
            k, v = k_bhtd[:, :, first:last], v_bhtd[:, :, first:last]
            pairs = [pair for row in range(rows) for pair in _heads(stage, row, 0, last - first, k[row], v[row])]
            write = partial(self._storage.write, first, stage.k, stage.v)
            users = list(free)
            try:
                users = [copied := self._engine.copy_all(pairs, after=[*after, *free])]
                users = [written := self._engine.call(write, reads=(stage.k, stage.v), after=users)]
            finally:
                self._staging.used(users)
            self._written.append(written)
            freed.append(copied)
        return freed

    def lift(self, into: KVBuffer, begin: int, part: Part, after: Sequence[Fence]) -> list[Fence]:
        """Read on a thread, and copy to the device unless its memory is host memory."""
        return _lift_by_host(self._engine, self._staging, into, begin, part, self._storage.read, after, self._written)

    def read(self, row: int, first: int, last: int, view: PageView) -> None:
        """Read into ``view``."""
        for fence in self._written:
            self._engine.settle(fence)
        self._storage.read(row, first, last, view)


class BorrowedExtent:
    """One page of another owner, for a layer of one sequence. Keeps the source alive; nothing is copied."""

    def __init__(
        self,
        engine: CopyEngine,
        staging: StagingBuffer | None,
        source: PageSource,
        layer: int,
        tokens: int,
        g: LayerSpec,
        tier: str,
    ) -> None:
        self._engine = engine
        self._staging = staging
        self._source = source
        self._layer = layer
        self.tokens, self.spec, self.tier = tokens, g, tier

    def lift(self, into: KVBuffer, begin: int, part: Part, after: Sequence[Fence]) -> list[Fence]:
        """Read on a thread, and copy to the device unless its memory is host memory."""
        return _lift_by_host(self._engine, self._staging, into, begin, part, self.read, after, ())

    def read(self, row: int, first: int, last: int, view: PageView) -> None:
        """Let the source copy the tokens to ``view``."""
        self._source.land(self._layer, first, last, view)


class _Read(Protocol):
    def __call__(self, row: int, first: int, last: int, view: PageView) -> None: ...


def _lift_by_host(
    engine: CopyEngine,
    staging: StagingBuffer | None,
    into: KVBuffer,
    begin: int,
    part: Part,
    read: _Read,
    after: Sequence[Fence],
    written: Sequence[Fence],
) -> list[Fence]:
    """Read ``part`` on a thread: into the buffer itself where kernels read host memory, else through ``staging``."""
    if staging is None:
        end = begin + part.tokens
        task = partial(_read_rows, read, part.rows, part.first, part.last, into, begin)
        writes = (into.k[:, :, begin:end], into.v[:, :, begin:end])
        return [engine.call(task, writes=writes, after=[*after, *written])]
    fences: list[Fence] = []
    rows = len(part.rows)
    for first, last in staging.chunks(part.first, part.last, rows * part.extent.spec.token_bytes):
        stage, free = staging.next(rows, last - first, part.extent.spec)
        task = partial(_read_rows, read, part.rows, first, last, stage, 0)
        at = begin + first - part.first
        to = at + last - first
        pairs = [pair for row in range(rows) for pair in _heads(into, row, at, to, stage.k[row], stage.v[row])]
        users = list(free)
        try:
            users = [engine.call(task, writes=(stage.k, stage.v), after=[*written, *free])]
            users = [copied := engine.copy_all(pairs, after=[*after, *users])]
        finally:
            staging.used(users)
        fences.append(copied)
    return fences


def _read_rows(read: _Read, rows: Sequence[int], first: int, last: int, into: KVBuffer, begin: int) -> None:
    for i, row in enumerate(rows):
        read(row, first, last, into.view(i, begin).cut(0, last - first))
