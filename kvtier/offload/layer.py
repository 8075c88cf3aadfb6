"""OffloadedLayer: a hot layer has its buffer on the device; a cold one has pages in lower tiers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from kvtier.kv.base import first_visible
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.page import Page
from kvtier.kv.room import with_slack
from kvtier.kv.spec import LayerSpec
from kvtier.kv.window import Window
from kvtier.offload.accounting import round_up
from kvtier.offload.device import DeviceMemory
from kvtier.offload.extents import BorrowedExtent, PageSource, Part
from kvtier.offload.placement import ColdPages
from kvtier.offload.prefetch import PrefetchSlot, Wanted


class OffloadedLayer:
    """K and V of one layer for all rows.

    Attention gets views: of a hot layer's buffer, or of a ring slot for a cold layer. Views of a slot are valid until
    the next layer of the same device is updated.

    Attributes:
        index: index of the layer in the model.
        length: columns held.
        wants: columns that the last update needed room for.
        may_be_cold: whether its views may end with the next layer's update; if other layers read them, it stays hot.
    """

    def __init__(
        self,
        device_memory: DeviceMemory,
        index: int,
        rows: int,
        spec: LayerSpec,
        *,
        window: Window | None,
        may_be_cold: bool,
    ) -> None:
        self.index = index
        self.spec = spec
        self.length = 0
        self.may_be_cold = may_be_cold
        self.wants = 1
        self._device_memory = device_memory
        self._rows = rows
        self._window = window
        self._base = 0
        self._buffer: KVBuffer | None = None
        # Valid only while ``_buffer`` is None: dropping the buffer turns the layer cold.
        self._cold: ColdPages | None = None
        self._chunk = 1  # columns of the last update
        device_memory.join(self)

    # --- contents ---------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Sequences held."""
        return self._rows

    @property
    def is_cold(self) -> bool:
        """Whether its full pages are in lower tiers."""
        return self._buffer is None and self._cold is not None

    @property
    def device(self) -> torch.device:
        """The device on which attention reads."""
        return self._device_memory.device

    @property
    def kernels_read_host(self) -> bool:
        """Whether the device's memory is host memory."""
        return self._device_memory.engine.device_is_host

    @property
    def token_bytes(self) -> int:
        """Bytes of one column of all rows."""
        return self._rows * self.spec.token_bytes

    @property
    def paged(self) -> int:
        """Columns in lower tiers."""
        return self._cold.paged if self._buffer is None and self._cold is not None else 0

    @property
    def device_bytes(self) -> int:
        """Device bytes that the layer owns, including room for a tail page, which it may need."""
        buffer = self._buffer
        return self._page_bytes + (buffer.k.nbytes + buffer.v.nbytes if buffer is not None else 0)

    @property
    def _page_bytes(self) -> int:
        return self.token_bytes * self._device_memory.page_tokens

    def takes(self, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> bool:
        """Whether K and V like these can be appended as they are."""
        return (
            self._rows == k_bhtd.shape[0] and self.device == k_bhtd.device and self.spec == LayerSpec.of(k_bhtd, v_bhtd)
        )

    def _first_visible(self, begin: int) -> int:
        return 0 if self._window is None else first_visible(begin, self._window.visible)

    @property
    def base(self) -> int:
        """The first column held. In memory, whole pages are: the columns before it in its page are undefined."""
        return self._base

    @property
    def _first_page(self) -> int:
        """The first column of the page of column ``base``."""
        return self._base // self._device_memory.page_tokens * self._device_memory.page_tokens

    def begin_at(self, base: int) -> None:
        """Let an empty layer hold columns from ``base`` on."""
        assert self._buffer is None
        self._base = base
        self.length = self._first_page
        if self._cold is not None:
            self.turn_cold()

    # --- appending --------------------------------------------------------------------------------------------------

    def append(
        self, begin: int, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put ``[rows, heads, new columns, dim]`` into the columns from ``begin`` on; return those from ``first`` on.

        Raises:
            BudgetError: the budget is too small for so many columns.
            StreamError: a page of the layer is lost, or cannot be written.
        """
        end = begin + k_bhtd.shape[2]
        self._chunk = end - begin
        self._device_memory.step(self)
        self.crop(begin)
        self.reserve(end)
        if self._buffer is not None:
            self._buffer.write(begin, k_bhtd, v_bhtd)
            self.length = end
            return self._buffer.contents(end, first)
        slot, buffer, base = self._open(begin, end, first)
        buffer.write(begin - base, k_bhtd, v_bhtd)
        self._close(slot, buffer, base, begin, end)
        return buffer.k[:, :, first - base : end - base], buffer.v[:, :, first - base : end - base]

    def reserve(self, end: int) -> None:
        """Make room for ``end`` columns, or turn cold if the budget has no room."""
        self.wants = end
        if self.is_cold or (self._buffer is not None and self._buffer.capacity >= end):
            return
        capacity = self._capacity(end)
        columns = capacity - self._first_page
        k_bytes, v_bytes = (self._rows * columns * each for each in (self.spec.k_bytes, self.spec.v_bytes))
        held_k_bytes = self._buffer.k.nbytes if self._buffer is not None else 0
        more = max(k_bytes, k_bytes + v_bytes - held_k_bytes)  # the buffer replaces K first, then V
        if not self._device_memory.keep_hot(self, more):
            self.turn_cold()
            return
        if self._buffer is None:
            self._buffer = KVBuffer(self._rows, self.spec, columns, self.device, base=self._first_page)
        else:
            self._device_memory.count(self, more)
            self._buffer.grow(capacity, live=self.length)
        self._device_memory.count(self)

    def _capacity(self, end: int) -> int:
        """Return the column up to which to reserve for columns before ``end``."""
        expected = self._device_memory.expected_columns
        capacity = max(with_slack(end), expected if end <= expected else 0)
        if self._window is None:
            return capacity
        page = self._device_memory.page_tokens
        return max(end, min(capacity, self._first_page + round_up(self._window.most_columns, page) + page))

    def trim(self, base: int, live: int) -> OffloadedLayer:
        """Drop the columns before ``base``, which no token sees any more; the columns ``[base, live)`` stay.

        Raises:
            StreamError: the layer must turn cold, and a page cannot be written.
        """
        self.crop(live)
        page = self._device_memory.page_tokens
        first = base // page * page
        buffer = self._buffer
        self._base = base  # first: an interrupt may come at any time
        if buffer is not None and first > buffer.base:
            columns = max(self._window.most_columns + page if self._window is not None else 0, live - first)
            if self._device_memory.keep_hot(self, self.token_bytes * columns):
                self._device_memory.count(self, self.token_bytes * columns)
                trimmed = KVBuffer(self._rows, self.spec, columns, self.device, base=first)
                trimmed.write(first, *buffer.contents(live, first))
                self._buffer = trimmed
                self._device_memory.count(self)
            else:
                self.turn_cold()
        if self._buffer is None and self._cold is not None:
            self._cold.drop_before(first)
        return self

    def _open(self, begin: int, end: int, first: int) -> tuple[PrefetchSlot, KVBuffer, int]:
        """Return a slot, its buffer with the columns ``[base, begin)`` from index 0 on, and ``base``."""
        page = self._device_memory.page_tokens
        base = min(first // page * page, self.paged)
        slot = self._device_memory.ring.take(self._wanted(base, end))
        buffer = slot.buffer(self._rows, self.spec)
        assert self._cold is not None
        self._cold.put_tail(buffer, base, begin)
        return slot, buffer, base

    def _close(self, slot: PrefetchSlot, buffer: KVBuffer, base: int, begin: int, end: int) -> None:
        """Keep the written columns ``[begin, end)``: full pages move to lower tiers, once; the rest stays."""
        assert self._cold is not None
        paged, page = self.paged, self._device_memory.page_tokens
        full = end // page * page
        if full > paged:
            k, v = buffer.k[:, :, paged - base : full - base], buffer.v[:, :, paged - base : full - base]
            parts, fences = self._device_memory.placement.lower(k, v, [self._device_memory.engine.mark()])
            slot.leaving += fences
            self._cold.add(parts)
        self._cold.keep_tail(buffer, base, begin, end)
        self.length = end

    def _wanted(self, base: int, end: int) -> Wanted:
        columns = round_up(end - base, self._device_memory.page_tokens)
        assert self._cold is not None
        pages = tuple(self._cold.between(base, self.paged))
        return Wanted(self.index, base, pages, columns, self._rows, self.spec)

    def wanted_next(self) -> Wanted:
        """Return the slot content for the next update: another piece of the prompt, or one token."""
        page = self._device_memory.page_tokens
        base = min(self._first_visible(self.length) // page * page, self.paged)
        rest = self._device_memory.expected_columns - self.length
        return self._wanted(base, self.length + (min(self._chunk, rest) if rest > 0 else 1))

    # --- turning cold, and everything that is not appending ---------------------------------------------------------

    def turn_cold(self) -> None:
        """Move full pages to lower tiers, keep the rest, and drop the buffer. Blocks until the pages are moved.

        Raises:
            StreamError: the pages cannot be written; the layer stays hot.
        """
        buffer, engine, page = self._buffer, self._device_memory.engine, self._device_memory.page_tokens
        begin = self._first_page if buffer is None else buffer.base
        cold = ColdPages(self._rows, self.spec, page, self.device, begin)
        if buffer is not None and self.length > begin:
            full = self.length // page * page
            if full > begin:
                parts, fences = self._device_memory.placement.lower(*buffer.contents(full, begin), [engine.mark()])
                for fence in fences:  # the memory is needed now
                    engine.settle(fence)
                cold.add(parts)
            cold.keep_tail(buffer, begin, full, self.length)
        self._cold = cold
        self._buffer = None
        self._device_memory.count(self)

    @contextmanager
    def filling(self, begin: int, end: int) -> Iterator[tuple[KVBuffer, int]]:
        """Let the caller write the columns ``[begin, end)``: yields a buffer from column ``base`` on, and ``base``.

        Columns before ``begin`` stay. Attention must not read the buffer.

        Raises:
            BudgetError: the budget is too small for so many columns.
        """
        self._device_memory.step(self)
        self.crop(begin)
        self.reserve(end)
        if self._buffer is not None:
            yield self._buffer, 0
            self.length = end
        else:
            slot, buffer, base = self._open(begin, end, begin)
            yield buffer, base
            self._close(slot, buffer, base, begin, end)

    def borrow(self, parts: Sequence[Part]) -> None:
        """Append full pages of another owner. The layer must be cold, and hold whole pages only."""
        assert self._cold is not None
        assert self.length == self.paged
        self._cold.add(parts)
        self.length = self.paged

    def borrowed_extent(self, source: PageSource, layer: int, tokens: int, tier: str) -> BorrowedExtent:
        """Return pages of ``source`` as an extent for ``borrow``."""
        device_memory = self._device_memory
        return BorrowedExtent(
            device_memory.engine, device_memory.placement.staging, source, layer, tokens, self.spec, tier
        )

    def has_host_room(self, nbytes: int) -> bool:
        """Whether host memory below the device has room for ``nbytes`` more."""
        return self._device_memory.placement.has_host_room(nbytes)

    def crop(self, columns: int) -> None:
        """Drop the columns after the first ``columns`` columns.

        Raises:
            StreamError: a page that is cut is lost.
        """
        if self._buffer is None and self._cold is not None:
            self._cold.crop(columns)
        self.length = min(self.length, columns)

    def select(self, rows: torch.Tensor, live: int) -> None:
        """Make row ``i`` the former row ``rows[i]``, for the first ``live`` columns. No page moves.

        ``rows`` are indices, or one truth value for each row.
        """
        self.crop(live)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        count = len(rows)
        if count != self._rows:
            # The new buffers lie beside the old ones until everything is copied.
            token_bytes = count * self.spec.token_bytes
            if self._buffer is not None and not self._device_memory.keep_hot(self, token_bytes * self._buffer.capacity):
                self.turn_cold()
            self._device_memory.make_room(token_bytes * self._device_memory.page_tokens, keep=self)
        if self._buffer is not None:
            self._buffer.select(rows, live)
        elif self._cold is not None:
            self._cold.select(rows, live)
        self._rows = count
        self._device_memory.count(self)

    def page(self, row: int, begin: int, end: int) -> Page:
        """Return a host copy of the columns ``[begin, end)`` of ``row``; pages in lower tiers stay there.

        Raises:
            StreamError: a page is lost.
        """
        if self._buffer is not None:
            return self._buffer.page(row, begin, end)
        assert self._cold is not None
        return self._cold.page(row, begin, end)

    def contents(self, columns: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the held columns from ``first`` on, before ``columns``: views of a hot layer, a copy of a cold one."""
        if self._buffer is not None:
            return self._buffer.contents(columns, max(first, self._base))
        begin = max(first, self._base)
        pages = [self.page(row, begin, max(columns, begin)) for row in range(self._rows)]
        k, v = torch.stack([page.k_htd for page in pages]), torch.stack([page.v_htd for page in pages])
        return k.to(self.device), v.to(self.device)

    def twin(self, device_memory: DeviceMemory) -> OffloadedLayer:
        """Return a copy on another device memory. Pages in lower tiers are shared, since they never change."""
        twin = OffloadedLayer(
            device_memory,
            self.index,
            self._rows,
            self.spec,
            window=self._window,
            may_be_cold=self.may_be_cold,
        )
        if self._buffer is not None and not device_memory.keep_hot(twin, self._buffer.k.nbytes + self._buffer.v.nbytes):
            begin = self._buffer.base
            pages = [self.page(row, begin, self.length) for row in range(self._rows)]
            twin.begin_at(self._base)
            twin.turn_cold()
            with twin.filling(begin, self.length) as (buffer, base):
                for row, page in enumerate(pages):
                    buffer.put(row, begin - base, page)
            return twin
        twin.length, twin._base = self.length, self._base
        if self._buffer is not None:
            twin._buffer = copy.deepcopy(self._buffer)
        elif self._cold is not None:
            twin._cold = self._cold.twin()
        device_memory.count(twin)
        return twin

    def close(self) -> None:
        """Release all K and V."""
        self._buffer, self._cold, self.length, self._base = None, None, 0, 0
        self._device_memory.leave(self)
