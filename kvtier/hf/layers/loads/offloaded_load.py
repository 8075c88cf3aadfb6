"""OffloadedPrefixLoad: the known prefix of a turn under a budget, loaded into hot buffers and cold pages."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence

import torch

from kvtier.errors import BlockError, StreamError
from kvtier.hf.layers.loads.prefix_load import MakeMemory, PrefixLoad, RowPlan
from kvtier.kv.base import LayerMemory
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.page import Page, PageView
from kvtier.kv.window import Window
from kvtier.offload.extents import BorrowedExtent, Part
from kvtier.offload.layer import OffloadedLayer
from kvtier.offload.manager import OffloadManager
from kvtier.store.block import BlockReader
from kvtier.store.reading.load import LoadJob
from kvtier.store.reading.lookup import Span


class BorrowedBlock:
    """A block of the store whose pages cold layers read in place. Closed when no layer borrows any of them."""

    def __init__(self, reader: BlockReader) -> None:
        self.reader = reader
        self._checked: set[int] = set()
        weakref.finalize(self, reader.close)

    def land(self, layer: int, first: int, last: int, view: PageView) -> None:
        """Copy the tokens ``[first, last)`` of ``layer`` into ``view``; its checksum is verified the first time.

        Raises:
            StreamError: the page cannot be read, or is damaged.
        """
        try:
            self.reader.landing(layer, first, last, view, check=layer not in self._checked)()
        except BlockError as error:
            raise StreamError(f"a page that a cold layer shares with the store is lost: {error}") from error
        self._checked.add(layer)


class OffloadedPrefixLoad(PrefixLoad):
    """The first columns of a turn, for layers under a budget.

    Pages are read in the update of their layer, so that at most one layer is loading. Cold layers of a single sequence
    borrow whole pages of the store instead of copying them.

    Args:
        offload: manager of the layers.
        device: device of all layers; None when they are on several devices, or it is not known.
        columns: number of known columns.
        first: the first of them that sliding layers need.
        plans: source of each row.
        job: the load from the store; None for none.
        held_rows: number of rows that are held now.
    """

    def __init__(
        self,
        offload: OffloadManager,
        device: torch.device | None,
        columns: int,
        first: int,
        plans: Sequence[RowPlan],
        job: LoadJob | None,
        held_rows: int,
    ) -> None:
        super().__init__(columns, first, plans, job, held_rows)
        self._offload = offload
        self._device = device
        self._borrowed_blocks: dict[str, BorrowedBlock] = {}

    def start(self, memories: Sequence[LayerMemory | None], windows: Sequence[Window | None], columns: int) -> None:
        """Choose which layers will be cold with ``columns`` columns.

        Raises:
            RestoreError: the blocks of the store do not fit the layers.
        """
        self.check_fit(memories, windows)
        if self.job is None:
            return
        if self._device is not None:
            layers = enumerate(self.job.spec.layers)
            token_bytes = {index: spec.token_bytes for index, spec in layers}
            held = {index: columns - self.first_of(index) for index in token_bytes}
            self._offload.device_memory(self._device).foresee(token_bytes, len(self.plans), held)

    def _fill(
        self, layer: int, old: LayerMemory | None, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, make: MakeMemory
    ) -> LayerMemory:
        repeats = k_bhtd.shape[0] // len(self.plans)
        rows = self.rows_to_move(layer, old, repeats) if old is not None else None
        if old is not None and rows is not None:
            old.select(rows, self.held_columns(layer, old))
            self.moved_rows(layer, repeats)
        in_place = old is not None and self.stays(layer, old) and old.takes(k_bhtd, v_bhtd)
        memory = old if in_place else make(k_bhtd, v_bhtd)
        assert isinstance(memory, OffloadedLayer)
        if self.brings(layer) and self.job is not None and self.job.spec.layers[layer] != memory.spec:
            raise self.misfit(self.job.spec.layers[layer], memory.spec)
        try:
            if not in_place:
                memory.begin_at(self.first_of(layer))
            memory.reserve(self.columns)
            if in_place and not self.brings(layer) and memory.length >= self.columns:
                memory.crop(self.columns)
            else:
                begin = min(self._held_ends(layer)) if in_place else memory.length
                self._fill_layer(layer, memory, old, begin, repeats)
        except BaseException:
            if not in_place:
                memory.close()
            raise
        if old is not None and not in_place:
            old.close()
        return memory

    def is_tight(self, memory: LayerMemory) -> bool:
        """Return True: there is a budget, and pages in lower tiers do not move with their rows."""
        return True

    def _held_ends(self, layer: int) -> list[int]:
        """Return, for each row, the column after the last held token."""
        return [max(p.pad, min(self.held_end(layer, row), self.columns)) for row, p in enumerate(self.plans)]

    def _fill_layer(
        self, layer: int, memory: OffloadedLayer, old: LayerMemory | None, begin: int, repeats: int
    ) -> None:
        """Fill the columns from ``begin`` on; whole pages of the store are borrowed where possible."""
        kept = [
            # The crop below would drop tokens beyond the shortest row.
            old.page(row * repeats, begin, end) if old is memory and end > begin else None
            for row, end in enumerate(self._held_ends(layer))
        ]
        memory.crop(begin)
        filled = begin
        for span in self._whole_pages(layer, memory):
            if span.start < filled or span.start % self._offload.page_tokens:
                continue
            if filled < span.start:
                self._fill_columns(layer, memory, old, kept, filled, span.start, repeats)
                filled = span.start
            if not self._has_room(span, memory):
                continue
            extent = self._borrow(span, layer, memory)
            memory.borrow([Part(extent, 0, span.tokens, (0,) * memory.rows)])
            self.restored_bytes -= span.tokens * memory.spec.token_bytes
            filled = span.stop
        if filled < self.columns:
            self._fill_columns(layer, memory, old, kept, filled, self.columns, repeats)

    def _whole_pages(self, layer: int, memory: OffloadedLayer) -> list[Span]:
        """Return the spans that ``memory`` can borrow as whole pages."""
        if self.job is None or len(self.plans) > 1 or self.plans[0].pad or not memory.is_cold:
            return []
        page, tiers = self._offload.page_tokens, ("disk",) if memory.kernels_read_host else ("disk", "host")
        return [
            span
            for span in self.job.spans(0, layer)
            if (span.first, span.last) == (0, page)
            and self.job.reader(span.block.key).is_plain
            and self.job.tier(span.block.key) in tiers
        ]

    def _has_room(self, span: Span, memory: OffloadedLayer) -> bool:
        """Whether a page may be borrowed. A page in RAM needs host room, since the store may evict it first."""
        assert self.job is not None
        on_disk = self.job.tier(span.block.key) == "disk"
        return on_disk or memory.has_host_room(span.tokens * memory.spec.token_bytes)

    def _borrow(self, span: Span, layer: int, memory: OffloadedLayer) -> BorrowedExtent:
        assert self.job is not None
        key = span.block.key
        borrowed = self._borrowed_blocks.get(key)
        if borrowed is None:
            borrowed = self._borrowed_blocks[key] = BorrowedBlock(self.job.lend(key))
        extent = memory.borrowed_extent(borrowed, layer, span.tokens, borrowed.reader.tier)
        if extent.tier == "host":
            owner = object()
            self._offload.host.set(owner, span.tokens * memory.spec.token_bytes)
            weakref.finalize(extent, self._offload.host.set, owner, 0).atexit = False
        return extent

    def _fill_columns(
        self,
        layer: int,
        memory: OffloadedLayer,
        old: LayerMemory | None,
        kept: Sequence[Page | None],
        begin: int,
        end: int,
        repeats: int,
    ) -> None:
        """Write the columns ``[begin, end)``: padding, held tokens, stored tokens."""
        ends = self._held_ends(layer)
        with memory.filling(begin, end) as (target, base):
            for row in range(memory.rows):
                plan, page, held_end = self.plans[row // repeats], kept[row // repeats], ends[row // repeats]
                first = min(max(plan.pad, begin, memory.base), end)
                target.clear(row, begin - base, first - base)
                if page is not None:
                    target.put(row, begin - base, page)
                elif old is not None and old is not memory:
                    step = self._offload.page_tokens
                    for at in range(first, min(held_end, end), step):
                        stop = min(at + step, held_end, end)
                        source = plan.source_pad + at - plan.pad
                        source_row = self.source_row(layer, row // repeats)
                        target.put(row, at - base, old.page(source_row, source, source + stop - at))
            if self.brings(layer):
                self._land(layer, target, base, begin, end, repeats)
            for row in range(memory.rows):
                last = max(self.plans[row // repeats].end, begin)
                if last < end:
                    target.clear(row, last - base, end - base)

    def _land(self, layer: int, target: KVBuffer, base: int, begin: int, end: int, repeats: int) -> None:
        """Load the stored tokens of columns ``[begin, end)`` into ``target``, whose columns count from ``base`` on."""
        assert self.job is not None
        pads = [plan.pad for plan in self.plans]
        direct = target.device.type == "cpu"
        columns = end - base - target.base
        host = target if direct else KVBuffer(len(pads), target.spec, columns, "cpu", base=target.base)
        there = base + target.base  # the first column that has a place

        def place(_: int, row: int) -> tuple[PageView, int]:
            at = row * repeats if direct else row
            return host.view(at, max(pads[row], there) - base), max(there - pads[row], 0)

        one_row = len(pads) == 1
        self.job.land(layer, place, begin - pads[0] if one_row else 0, end - pads[0] if one_row else sys.maxsize)
        for row, held_end in enumerate(self._held_ends(layer)):
            first = max(held_end, begin)
            for copy_row in range(row * repeats + direct, (row + 1) * repeats):
                source_row = row * repeats if direct else row
                target.copy(copy_row, first - base, end - base, host, source_row, first - base)

    def complete(self, layer: int, old: LayerMemory | None, make: MakeMemory) -> LayerMemory:
        """Return the memory of ``layer`` with the prefix in it, before any new token.

        Raises:
            RestoreError: a page could not be read.
        """
        like = old.contents(0) if old is not None else None
        return self.take(layer, old, *self.nothing(layer, like), make)

    def wait(self) -> None:
        """Read every page once, to check that it can be read.

        Raises:
            RestoreError: a page could not be read.
        """
        if self.job is not None:
            self.job.check()
