"""One layer under a budget: hot, a window on the device; or cold, pages below and an unfinished page on the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from kvtier.kv.base import first_visible
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.page import Page
from kvtier.kv.spec import LayerSpec
from kvtier.offload.cold_pages import ColdPages
from kvtier.offload.extents import BorrowedExtent, PageSource, Part
from kvtier.offload.prefetch import PrefetchBuffer, Wanted
from kvtier.offload.residency import round_up

if TYPE_CHECKING:
    from kvtier.offload.device import DeviceMemory


class OffloadedLayer:
    """K and V of one layer for all rows.

    What attention gets are views: of the window of a hot layer, and of a slot of the ring for a cold one. The latter
    are valid until the next layer of the same device is updated.

    Attributes:
        index: which layer of the model.
        length: columns held.
        wants: columns that the last update needed room for.
        may_be_cold: whether views of it end with the next layer's update; where others read them, it stays hot.
    """

    def __init__(
        self,
        deck: DeviceMemory,
        index: int,
        rows: int,
        geometry: LayerSpec,
        *,
        sliding_window: int | None,
        may_be_cold: bool,
    ) -> None:
        self.index = index
        self.geometry = geometry
        self.length = 0
        self.may_be_cold = may_be_cold
        self.wants = 1
        self._deck = deck
        self._rows = rows
        self._sliding_window = sliding_window
        self._window: KVBuffer | None = None
        # What a hot layer has beside its window is of no meaning: giving up the window is what turns it cold.
        self._cold: ColdPages | None = None
        self._chunk = 1  # columns of the last update
        deck.join(self)

    # --- what is held -----------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Sequences held."""
        return self._rows

    @property
    def is_cold(self) -> bool:
        """Whether its full pages are below."""
        return self._window is None and self._cold is not None

    @property
    def device(self) -> torch.device:
        """Where attention reads."""
        return self._deck.device

    @property
    def kernels_read_host(self) -> bool:
        """Whether the device's memory is that of the host."""
        return self._deck.engine.device_is_host

    @property
    def token_bytes(self) -> int:
        """Bytes of one column of all rows."""
        return self._rows * self.geometry.token_bytes

    @property
    def paged(self) -> int:
        """Columns that are below."""
        return self._cold.paged if self._window is None and self._cold is not None else 0

    @property
    def device_bytes(self) -> int:
        """Bytes of the device that are the layer's own; room for the unfinished page included, which it may need."""
        window = self._window
        return self._page_bytes + (window.k.nbytes + window.v.nbytes if window is not None else 0)

    @property
    def _page_bytes(self) -> int:
        return self.token_bytes * self._deck.page_tokens

    def takes(self, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> bool:
        """Whether K and V like these can be appended as they are."""
        return (
            self._rows == k_bhtd.shape[0]
            and self.device == k_bhtd.device
            and self.geometry == LayerSpec.of(k_bhtd, v_bhtd)
        )

    def _first_visible(self, begin: int) -> int:
        return 0 if self._sliding_window is None else first_visible(begin, self._sliding_window)

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
        self._deck.step(self)
        self.crop(begin)
        self.reserve(end)
        if self._window is not None:
            self._window.write(begin, k_bhtd, v_bhtd)
            self.length = end
            return self._window.k[:, :, first:end], self._window.v[:, :, first:end]
        slot, window, base = self._open(begin, end, first)
        window.write(begin - base, k_bhtd, v_bhtd)
        self._close(slot, window, base, begin, end)
        return window.k[:, :, first - base : end - base], window.v[:, :, first - base : end - base]

    def reserve(self, end: int) -> None:
        """Have room for ``end`` columns, as long as the layer can stay hot."""
        self.wants = end
        if self.is_cold or (self._window is not None and self._window.capacity >= end):
            return
        # A window grows by an eighth: under a budget, room that is not used yet is another layer's.
        page = self._deck.page_tokens
        capacity = round_up(max(end + page, end + end // 8), page)
        if not self._deck.keep_hot(self, capacity * self.token_bytes):
            self.turn_cold()
            return
        if self._window is None:
            self._window = KVBuffer(self._rows, self.geometry, capacity, self.device)
        else:
            self._deck.count(self, capacity * self.token_bytes)
            self._window.grow(capacity, live=self.length)
        self._deck.count(self)

    def _open(self, begin: int, end: int, first: int) -> tuple[PrefetchBuffer, KVBuffer, int]:
        """Return a slot as a window whose column 0 is column ``base``, with all columns from there to ``begin``."""
        page = self._deck.page_tokens
        base = min(first // page * page, self.paged)
        slot = self._deck.ring.take(self._wanted(base, end))
        window = slot.window(self._rows, self.geometry)
        assert self._cold is not None
        self._cold.put_tail(window, base, begin)
        return slot, window, base

    def _close(self, slot: PrefetchBuffer, window: KVBuffer, base: int, begin: int, end: int) -> None:
        """Keep the columns ``[begin, end)`` that were written: full pages go down, once; the rest stays."""
        assert self._cold is not None
        paged, page = self.paged, self._deck.page_tokens
        full = end // page * page
        if full > paged:
            k, v = window.k[:, :, paged - base : full - base], window.v[:, :, paged - base : full - base]
            parts, fences = self._deck.below.lower(k, v, [self._deck.engine.mark()])
            slot.leaving += fences
            self._cold.add(parts)
        self._cold.keep_tail(window, base, begin, end)
        self.length = end

    def _wanted(self, base: int, end: int) -> Wanted:
        columns = round_up(end - base, self._deck.page_tokens)
        assert self._cold is not None
        pages = tuple(self._cold.between(base, self.paged))
        return Wanted(self.index, base, pages, columns, self._rows, self.geometry)

    def wanted_next(self) -> Wanted:
        """Return what the next update will want: another piece of the prompt, or one token."""
        page = self._deck.page_tokens
        base = min(self._first_visible(self.length) // page * page, self.paged)
        rest = self._deck.expected_columns - self.length
        return self._wanted(base, self.length + (min(self._chunk, rest) if rest > 0 else 1))

    # --- turning cold, and everything that is not appending ---------------------------------------------------------

    def turn_cold(self) -> None:
        """Let the full pages go down, keep the rest, and give the window up. Blocks until they are down.

        Raises:
            StreamError: they cannot be written; the layer stays hot.
        """
        window, engine, page = self._window, self._deck.engine, self._deck.page_tokens
        cold = ColdPages(self._rows, self.geometry, page, self.device)
        if window is not None and self.length:
            full = self.length // page * page
            if full:
                parts, fences = self._deck.below.lower(window.k[:, :, :full], window.v[:, :, :full], [engine.mark()])
                for fence in fences:  # the memory is wanted now
                    engine.settle(fence)
                cold.add(parts)
            cold.keep_tail(window, 0, full, self.length)
        self._cold = cold
        self._window = None
        self._deck.count(self)

    @contextmanager
    def filling(self, begin: int, end: int) -> Iterator[tuple[KVBuffer, int]]:
        """Have the columns ``[begin, end)`` written: yields a window whose column 0 is column ``base``, and ``base``.

        Columns before ``begin`` stay. No attention is to see the window.

        Raises:
            BudgetError: the budget is too small for so many columns.
        """
        self._deck.step(self)
        self.crop(begin)
        self.reserve(end)
        if self._window is not None:
            yield self._window, 0
            self.length = end
        else:
            slot, window, base = self._open(begin, end, begin)
            yield window, base
            self._close(slot, window, base, begin, end)

    def borrow(self, parts: Sequence[Part]) -> None:
        """Take full pages of someone else after those that are held, which must be whole pages of a cold layer."""
        assert self._cold is not None
        assert self.length == self.paged
        self._cold.add(parts)
        self.length = self.paged

    def borrowed_run(self, source: PageSource, layer: int, tokens: int, tier: str) -> BorrowedExtent:
        """Return pages of ``source`` as a run that ``borrow`` takes."""
        deck = self._deck
        return BorrowedExtent(deck.engine, deck.below.staging, source, layer, tokens, self.geometry, tier)

    def has_host_room(self, nbytes: int) -> bool:
        """Whether host memory below the device has room for ``nbytes`` more."""
        return self._deck.below.has_host_room(nbytes)

    def crop(self, columns: int) -> None:
        """Hold the first ``columns`` columns, if there were more.

        Raises:
            StreamError: a page that is cut is lost.
        """
        if self._window is None and self._cold is not None:
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
            token_bytes = count * self.geometry.token_bytes
            if self._window is not None and not self._deck.keep_hot(self, token_bytes * self._window.capacity):
                self.turn_cold()
            self._deck.make_room(token_bytes * self._deck.page_tokens, keep=self)
        if self._window is not None:
            self._window.select(rows, live)
        elif self._cold is not None:
            self._cold.select(rows, live)
        self._rows = count
        self._deck.count(self)

    def page(self, row: int, begin: int, end: int) -> Page:
        """Return a host copy of the columns ``[begin, end)`` of ``row``; pages below are not brought up.

        Raises:
            StreamError: a page is lost.
        """
        if self._window is not None:
            return self._window.page(row, begin, end)
        assert self._cold is not None
        return self._cold.page(row, begin, end)

    def contents(self, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of the first ``columns`` columns: views of a hot layer, a copy of a cold one."""
        if self._window is not None:
            return self._window.contents(columns)
        pages = [self.page(row, 0, columns) for row in range(self._rows)]
        k, v = torch.stack([page.k_htd for page in pages]), torch.stack([page.v_htd for page in pages])
        return k.to(self.device), v.to(self.device)

    def twin(self, deck: DeviceMemory) -> OffloadedLayer:
        """Return a copy on another deck. Pages below are shared, since nobody changes them."""
        twin = OffloadedLayer(
            deck,
            self.index,
            self._rows,
            self.geometry,
            sliding_window=self._sliding_window,
            may_be_cold=self.may_be_cold,
        )
        if self._window is not None and not deck.keep_hot(twin, self._window.k.nbytes + self._window.v.nbytes):
            pages = [self.page(row, 0, self.length) for row in range(self._rows)]
            twin.turn_cold()
            with twin.filling(0, self.length) as (window, _):
                for row, page in enumerate(pages):
                    window.put(row, 0, page)
            return twin
        twin.length = self.length
        if self._window is not None:
            twin._window = copy.deepcopy(self._window)
        elif self._cold is not None:
            twin._cold = self._cold.twin()
        deck.count(twin)
        return twin

    def close(self) -> None:
        """Hold nothing."""
        self._window, self._cold, self.length = None, None, 0
        self._deck.leave(self)
