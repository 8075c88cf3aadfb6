"""Placement of the pages of cold layers: host memory while its budget lasts, then files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch

from kvtier.kv.allocation import new_buffer
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.codecs import Codec
from kvtier.kv.page import Page, PageView
from kvtier.kv.spec import LayerSpec
from kvtier.offload.accounting import MemoryBudget, TransferStats
from kvtier.offload.extents import HostExtent, PageStorage, Part, StagedExtent
from kvtier.offload.host_memory import HostPool, StagingBuffer
from kvtier.offload.storage.encoded_pages import EncodedPages, FilePayloads, HostPayloads
from kvtier.offload.storage.page_file import PageFile
from kvtier.offload.storage.spill_folder import SpillFolder
from kvtier.transfer.base import CopyEngine, Fence


class ColdPages:
    """K and V of one layer for all rows.

    Pages are never changed, only dropped, so that copies of this object share them.

    Attributes:
        tail: a buffer of one page, for the columns from ``paged`` on.
    """

    def __init__(self, rows: int, spec: LayerSpec, page_tokens: int, device: torch.device, first: int = 0) -> None:
        self._pages: tuple[int, tuple[Part, ...]] = first, ()  # one value: an interrupt may come at any time
        self.tail = KVBuffer(rows, spec, page_tokens, device)

    @property
    def first(self) -> int:
        """The first column held, of a whole page."""
        return self._pages[0]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The full pages, in order and without gaps."""
        return self._pages[1]

    @property
    def paged(self) -> int:
        """The column after the last in lower tiers."""
        return self.first + sum(part.tokens for part in self.parts)

    @property
    def page_tokens(self) -> int:
        """Columns of a page."""
        return self.tail.capacity

    def between(self, begin: int, end: int) -> Iterator[Part]:
        """Return the parts of the columns ``[begin, end)`` that are in lower tiers."""
        at = self.first
        for part in self.parts:
            first, last = max(begin - at, 0), min(end - at, part.tokens)
            if first < last:
                whole = (first, last) == (0, part.tokens)
                yield part if whole else Part(part.extent, part.first + first, part.first + last, part.rows)
            at += part.tokens

    def add(self, parts: Sequence[Part]) -> None:
        """Append full pages."""
        self._pages = self.first, (*self.parts, *parts)

    def put_tail(self, into: KVBuffer, base: int, end: int) -> None:
        """Copy the columns ``[paged, end)`` to ``into``, whose column 0 is column ``base``."""
        paged = self.paged
        if paged < end:
            into.write(paged - base, self.tail.k[:, :, : end - paged], self.tail.v[:, :, : end - paged])

    def keep_tail(self, source: KVBuffer, base: int, begin: int, end: int) -> None:
        """Copy the unpaged columns of ``[begin, end)`` from ``source``, whose column 0 is column ``base``."""
        paged = self.paged
        begin = max(begin, paged)
        columns = slice(begin - base, end - base)
        self.tail.write(begin - paged, source.k[:, :, columns], source.v[:, :, columns])

    def crop(self, columns: int) -> None:
        """Drop the pages after the first ``columns`` columns; a page that is cut becomes the tail page again.

        Raises:
            StreamError: the page that is cut is lost.
        """
        if columns >= self.paged:
            return
        keep = columns // self.page_tokens * self.page_tokens
        if columns > keep:
            for row in range(self.tail.rows):
                self.tail.put(row, 0, self.page(row, keep, columns))
        self._pages = self.first, tuple(self.between(self.first, keep))

    def drop_before(self, column: int) -> None:
        """Drop the pages before ``column``, the first of a page."""
        self._pages = min(column, self.paged), tuple(self.between(column, self.paged))

    def select(self, rows: torch.Tensor, live: int) -> None:
        """Make row ``i`` the former row ``rows[i]``, for the first ``live`` columns. No page moves."""
        order = rows.tolist()
        self.tail.select(rows, max(0, live - self.paged))
        parts = (Part(part.extent, part.first, part.last, tuple(part.rows[r] for r in order)) for part in self.parts)
        self._pages = self.first, tuple(parts)

    def page(self, row: int, begin: int, end: int) -> Page:
        """Return a host copy of the columns ``[begin, end)`` of ``row``; pages in lower tiers stay there.

        Raises:
            StreamError: a page is lost.
        """
        g, paged = self.tail.spec, self.paged
        k = new_buffer(g.k_heads, end - begin, g.k_dim, dtype=g.dtype)
        v = new_buffer(g.v_heads, end - begin, g.v_dim, dtype=g.values_dtype)
        view, at = PageView.on(k, v), 0
        for part in self.between(begin, min(end, paged)):
            part.extent.read(part.rows[row], part.first, part.last, view.cut(at, at + part.tokens))
            at += part.tokens
        if at < end - begin:
            rest = self.tail.page(row, begin + at - paged, end - paged)
            view.cut(at, end - begin).take(rest, 0, end - begin - at)
        return Page(k, v)

    def twin(self) -> ColdPages:
        """Return a copy that shares the pages."""
        twin = copy.copy(self)
        twin.tail = copy.deepcopy(self.tail)
        return twin


class PagePlacement:
    """The tiers below one compute device.

    Where kernels read host memory, host memory is the device tier, and only files are below it.

    Args:
        engine: moves the bytes.
        host: the budget of host memory, which all devices share.
        folder: folder of page files.
        transfers: counts the bytes.
        page_tokens: tokens of a page.
        codec: encodes the pages; None to keep them raw.
        devices: how many devices may share ``host``: room for the staging memory of each is left free.
    """

    def __init__(
        self,
        engine: CopyEngine,
        host: MemoryBudget,
        folder: SpillFolder,
        transfers: TransferStats,
        page_tokens: int,
        codec: Codec | None = None,
        devices: int = 1,
    ) -> None:
        self.page_tokens = page_tokens
        self._codec = codec
        self._engine = engine
        self._host = host
        self._folder = folder
        self._transfers = transfers
        self._host_pool = None if engine.device_is_host else HostPool(engine.host_empty, host, taken=engine.host_nbytes)
        self.staging = (
            StagingBuffer(self._host_pool, host.limit_bytes, devices) if self._host_pool is not None else None
        )

    def lower(
        self, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, after: Sequence[Fence]
    ) -> tuple[list[Part], list[Fence]]:
        """Move full pages to lower tiers, once ``after`` has passed.

        Returns:
            The parts that hold them, and the fences after which ``k_bhtd`` and ``v_bhtd`` may be overwritten.

        Raises:
            StreamError: there is no place for files.
            BudgetError: host memory has no room even for the staging memory of files.
        """
        rows, tokens = k_bhtd.shape[0], k_bhtd.shape[2]
        spec = LayerSpec.of(k_bhtd, v_bhtd)
        parts: list[Part] = []
        fences: list[Fence] = []
        begin = 0
        while begin < tokens:
            extent: HostExtent | StagedExtent | None = None
            count = tokens - begin
            while extent is None and count:  # as many pages as host memory has room for
                extent = self._in_host_memory(rows, count, spec)
                if extent is None:
                    count = count // 2 // self.page_tokens * self.page_tokens
            if extent is None:
                count = tokens - begin
                extent = StagedExtent(self._engine, self.staging, self._file(rows, count, spec))
            end = begin + count
            fences += extent.fill(k_bhtd[:, :, begin:end], v_bhtd[:, :, begin:end], after)
            parts.append(Part(extent, 0, count, tuple(range(rows))))
            begin = end
        self._transfers.bytes_down += rows * tokens * spec.token_bytes
        return parts, fences

    def has_host_room(self, nbytes: int) -> bool:
        """Whether host memory has room for ``nbytes`` more, and for the staging memory of files."""
        return self.staging is not None and self._host.fits(nbytes + self.staging.reserve_bytes)

    def _in_host_memory(self, rows: int, tokens: int, spec: LayerSpec) -> HostExtent | StagedExtent | None:
        if self._host_pool is None or self.staging is None:
            return None
        nbytes = rows * tokens * spec.token_bytes
        if self._codec is None:
            piece = self._host_pool.take(nbytes, leave=self.staging.reserve_bytes)
            return None if piece is None else HostExtent(self._engine, self._host_pool, piece, rows, tokens, spec)
        if not self.has_host_room(nbytes):
            return None
        payloads = HostPayloads(self._host, nbytes)
        return StagedExtent(
            self._engine, self.staging, EncodedPages(rows, tokens, spec, self._codec, self.page_tokens, payloads)
        )

    def _file(self, rows: int, tokens: int, spec: LayerSpec) -> PageStorage:
        if self._codec is None:
            return PageFile(self._folder, rows, tokens, spec)
        return EncodedPages(rows, tokens, spec, self._codec, self.page_tokens, FilePayloads(self._folder))
