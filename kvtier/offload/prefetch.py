"""PrefetchRing: a few slots that receive the pages of the next cold layers while other layers compute.

A slot cycles: *idle* → *arriving* (pages are being copied) → *in use* (passed to attention) → idle. It is in use until
the next layer of the device is updated, since by then its attention has been enqueued. The next pages in the slot come
after a mark taken at that moment.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kvtier.errors import BudgetError
from kvtier.kv.allocation import new_buffer
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.spec import LayerSpec
from kvtier.offload.accounting import PREFETCH_DEPTH, MemoryBudget, TransferStats
from kvtier.offload.extents import Part
from kvtier.transfer.base import CopyEngine, Fence

_log = logging.getLogger("kvtier.offload")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Required content of a slot for a layer: pages from column ``base`` on, and room for ``columns`` columns."""

    layer: int
    base: int
    pages: tuple[Part, ...]
    columns: int
    rows: int
    spec: LayerSpec

    @property
    def nbytes(self) -> int:
        """Bytes of such a slot."""
        return self.rows * self.columns * self.spec.token_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of the pages."""
        return sum(part.nbytes for part in self.pages)


class ColdLayer(Protocol):
    """The interface of a layer to the ring."""

    index: int

    @property
    def is_cold(self) -> bool:
        """Whether its pages are in lower tiers."""

    def wanted_next(self) -> Wanted:
        """Return the slot content that the next update is expected to need."""


@dataclass(slots=True, eq=False)
class PrefetchSlot:
    """Memory of the device for one layer at a time."""

    memory: torch.Tensor | None = None
    holds: Wanted | None = None
    in_use: bool = False
    arriving: list[Fence] = field(default_factory=list)  # copies into it
    leaving: list[Fence] = field(default_factory=list)  # copies from it to lower tiers
    seen: list[Fence] = field(default_factory=list)  # marks after the kernels that used it

    def buffer(self, rows: int, spec: LayerSpec) -> KVBuffer:
        """Return the whole slot as a buffer of a layer."""
        assert self.memory is not None
        return KVBuffer.on_bytes(self.memory, rows, spec, self.memory.nbytes // (rows * spec.token_bytes))

    def has(self, wanted: Wanted) -> bool:
        """Whether the pages of ``wanted`` are here or arriving, with room for its columns."""
        held = self.holds
        return (
            held is not None
            and (held.layer, held.base, held.pages) == (wanted.layer, wanted.base, wanted.pages)
            and (held.rows, held.spec) == (wanted.rows, wanted.spec)
            and self.memory is not None
            and self.memory.nbytes >= wanted.nbytes
        )


class PrefetchRing:
    """The slots of one device.

    Args:
        engine: moves the bytes.
        ledger: counts the slots.
        transfers: counts pages and waits.
        make_room: frees the given bytes of the budget for a slot, or raises.
        layers: the layers of the device, in order; called at each step, since some may have turned cold.
    """

    def __init__(
        self,
        engine: CopyEngine,
        device: torch.device,
        ledger: MemoryBudget,
        transfers: TransferStats,
        make_room: Callable[[int], None],
        layers: Callable[[], Sequence[ColdLayer]],
    ) -> None:
        self._engine = engine
        self._device = device
        self._ledger = ledger
        self._transfers = transfers
        self._make_room = make_room
        self._layers = layers
        self.slots = [PrefetchSlot() for _ in range(PREFETCH_DEPTH)]

    def release(self) -> None:
        """Take back the slots in use: their attention is enqueued. Called at the beginning of each update."""
        used = [slot for slot in self.slots if slot.in_use]
        if not used:
            return
        mark = self._engine.mark()
        for slot in used:
            slot.seen.append(mark)
            slot.in_use, slot.holds = False, None

    def take(self, wanted: Wanted) -> PrefetchSlot:
        """Return a slot with the pages of ``wanted`` in it, for the kernels that are enqueued from now on.

        Raises:
            StreamError: a page is lost.
            BudgetError: there is no room for the slot.
        """
        slot = next((slot for slot in self.slots if slot.has(wanted)), None)
        if slot is None:
            slot = self._idle(wanted)
            self._fill(slot, wanted)
        slot.in_use = True
        self.prefetch(wanted.layer)
        started = time.perf_counter()
        try:
            for fence in slot.arriving:
                self._engine.wait(fence)
        except BaseException:
            self._give_up(slot)
            raise
        if wanted.pages:
            self._transfers.waits += 1
            self._transfers.wait_seconds += time.perf_counter() - started
        slot.arriving = []
        return slot

    def prefetch(self, position: int) -> None:
        """Fetch the pages of the next cold layers after layer ``position`` into free slots.

        After the last layer comes the first, for the next step.
        """
        cold = [layer for layer in self._layers() if layer.is_cold]
        coming = [layer for layer in cold if layer.index > position] + [
            layer for layer in cold if layer.index < position
        ]
        free = [slot for slot in self.slots if not slot.in_use]
        wishes = [layer.wanted_next() for layer in coming[: len(free)]]
        for wanted in wishes:
            kept = next((slot for slot in free if slot.has(wanted)), None)
            if kept is not None:
                free.remove(kept)
        for wanted in wishes:
            if wanted.pages and not any(slot.has(wanted) for slot in self.slots):
                try:
                    self._fill(free.pop(), wanted)
                except BudgetError:
                    return  # ``take`` for that layer raises

    def _idle(self, wanted: Wanted) -> PrefetchSlot:
        """Return a slot that is not in use, preferably without prefetched pages of another layer."""
        idle = [slot for slot in self.slots if not slot.in_use]
        return min(idle, key=lambda slot: slot.holds is not None and slot.holds.layer != wanted.layer)

    def _fill(self, slot: PrefetchSlot, wanted: Wanted) -> None:
        self._settle(slot.arriving)  # of a prefetch that is no longer needed
        before, slot.arriving = slot.seen + slot.leaving, []
        slot.holds = None  # an interrupt from here on leaves an empty slot
        if slot.memory is None or slot.memory.nbytes < wanted.nbytes:
            self._give_up(slot)
            self._make_room(wanted.nbytes)
            self._ledger.set(id(slot), wanted.nbytes)
            slot.memory = new_buffer(wanted.nbytes, dtype=torch.uint8, device=self._device)
            before = [self._engine.mark()]
        buffer = slot.buffer(wanted.rows, wanted.spec)
        try:
            fences, begin = [], 0
            for part in wanted.pages:
                fences += part.lift(buffer, begin, before)
                begin += part.tokens
        except BaseException:
            # Unrecorded copies may be running: leave the memory to them.
            slot.memory, slot.leaving, slot.seen = None, [], []
            self._ledger.set(id(slot), 0)
            raise
        self._transfers.bytes_up += wanted.page_bytes
        # Without pages, kernels write there first; kernels are ordered among themselves.
        slot.arriving, slot.leaving, slot.seen = fences or slot.leaving, [], []
        slot.holds = wanted

    def _give_up(self, slot: PrefetchSlot) -> None:
        """Free the memory of a slot after its last use; the budget counts it as free from then on."""
        users = slot.seen + slot.leaving + slot.arriving
        slot.holds, slot.in_use = None, False
        slot.memory, slot.arriving, slot.leaving, slot.seen = None, [], [], []
        self._settle(users)
        self._ledger.set(id(slot), 0)

    def _settle(self, fences: Sequence[Fence]) -> None:
        """Wait for copies to end, and only log their errors: their results are no longer needed."""
        for fence in fences:
            try:
                self._engine.settle(fence)
            except Exception:
                _log.debug("a copy that is no longer needed failed", exc_info=True)

    def close(self) -> None:
        """Free all slots."""
        for slot in self.slots:
            self._give_up(slot)
