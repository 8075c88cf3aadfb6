"""StagedPrefixLoad: the known prefix of a turn, loaded to a device beside the computation."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

from kvtier.errors import RestoreError
from kvtier.hf.layers.loads.prefix_load import PrefixLoad, RowPlan
from kvtier.kv.base import LayerMemory
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.room import Room
from kvtier.kv.spec import LayerSpec
from kvtier.kv.window import Window
from kvtier.store.reading.load import LoadJob
from kvtier.transfer.base import CopyEngine, Fence, Pair

_STAGES = 3  # one layer is read, one is copied to the device, one is in between


class StagedPrefixLoad(PrefixLoad):
    """The first columns of a turn, for layers on a device whose kernels do not read host memory.

    A thread reads the pages of a layer into host memory, pinned where that helps; a side stream copies them from there
    into the layer's buffer. All of that is enqueued when the turn begins: pages of later layers arrive while earlier
    layers compute. The update of a layer makes the current stream wait for its copies; the host waits only until the
    layer was read. A few stages of host memory are used in turn.

    Args:
        engine: reads and copies.
        room: decides the room of new buffers.
        columns: number of known columns.
        first: the first of them that sliding layers need.
        plans: source of each row.
        job: the load from the store; None for none.
        held_rows: number of rows that are held now.
    """

    def __init__(
        self,
        engine: CopyEngine,
        room: Room,
        columns: int,
        first: int,
        plans: Sequence[RowPlan],
        job: LoadJob | None,
        held_rows: int,
    ) -> None:
        super().__init__(columns, first, plans, job, held_rows)
        self._engine = engine
        self._room = room
        self._arriving: dict[int, Fence] = {}
        self._stopped = False

    def start(self, memories: Sequence[LayerMemory | None], windows: Sequence[Window | None], columns: int) -> None:
        """Assign a place on the device to the pages of each layer, and enqueue reads and copies.

        Raises:
            RestoreError: the blocks of the store do not fit the layers.
        """
        self.check_fit(memories, windows)
        self.move_held_rows(memories, columns)
        job = self.job
        if job is None or not job.nbytes:
            return
        specs = job.spec.layers
        loaded = [layer for layer, spec in enumerate(specs) if spec.token_bytes]
        self._landed = [None] * len(specs)
        for layer in loaded:
            self._landed[layer] = self._target(layer, memories[layer], specs[layer])
        rows = len(self.plans)
        largest = max(rows * specs[layer].token_bytes * (self.columns - self.first_of(layer)) for layer in loaded)
        memory = [self._engine.host_empty(largest) for _ in range(min(_STAGES, len(loaded)))]
        stages = [
            KVBuffer.on_bytes(
                memory[number % _STAGES],
                rows,
                specs[layer],
                self.columns - self.first_of(layer),
                self.first_of(layer),
            )
            for number, layer in enumerate(loaded)
        ]
        all_pairs = [self._pairs(layer, stage) for layer, stage in zip(loaded, stages, strict=True)]
        ready = self._engine.mark()  # after all kernels that use the memory of the buffers
        copied: list[Fence] = []
        for number, (layer, stage, pairs) in enumerate(zip(loaded, stages, all_pairs, strict=True)):
            free = copied[number - _STAGES : number - _STAGES + 1] if number >= _STAGES else []
            read = self._engine.call(partial(self._read, layer, stage), writes=(stage.k, stage.v), after=free)
            copied.append(self._engine.copy_all(pairs, after=[read, ready]) if pairs else read)
            self._arriving[layer] = copied[-1]

    def is_tight(self, memory: LayerMemory) -> bool:
        """Return True: the memory is that of an accelerator."""
        return True

    def _target(self, layer: int, memory: LayerMemory | None, spec: LayerSpec) -> KVBuffer:
        """Return the buffer that the layer will have: the held one if its rows stay, else a new one."""
        rows, base = len(self.plans) * self.repeats, self.first_of(layer)
        held = isinstance(memory, KVBuffer) and memory.device == self.device and memory.spec == spec
        if held and memory is not None and self.stays(layer, memory) and memory.rows == rows:
            assert isinstance(memory, KVBuffer)
            target, live = memory, min(self.columns, memory.capacity)
        else:
            target, live = KVBuffer(rows, spec, 0, self.device, self.room(layer, self._room), base), base
        target.reserve(self.columns, live=live)
        return target

    def _pairs(self, layer: int, stage: KVBuffer) -> list[Pair]:
        """Pair the loaded columns of each head on the device with the stage: on both sides, a head is contiguous."""
        pairs: list[Pair] = []
        target = self._landed[layer]
        assert target is not None
        for row in range(target.rows):
            source = row * len(self.plans) // target.rows
            begin, end = self.loaded_columns(layer, source)
            if begin >= end:
                continue
            for to, of in zip(target.columns(row, begin, end), stage.columns(source, begin, end), strict=True):
                pairs += zip(to, of, strict=True)
        return pairs

    def _read(self, layer: int, stage: KVBuffer) -> None:
        if self._stopped:
            raise RestoreError("the turn was given up")
        assert self.job is not None
        self.job.land(layer, lambda _, row: self.place_in(stage, row))

    def _wait(self, layer: int, spec: LayerSpec) -> KVBuffer | None:
        if not self._landed:
            return None
        fence = self._arriving.pop(layer, None)
        if fence is not None:
            self._engine.wait(fence)
        landed = self._landed[layer]
        if landed is not None and landed.spec != spec:
            raise self.misfit(landed.spec, spec)
        return landed

    def wait(self) -> None:
        """Wait for all pages.

        Raises:
            RestoreError: a page could not be read.
        """
        for layer, fence in self._arriving.items():
            self._engine.settle(fence)
            if self.on_landed is not None:
                self.on_landed(layer)
        self._arriving.clear()

    def close(self) -> None:
        """Stop loading. Blocks until no page is being read. May be called more than once."""
        self._stopped = True
        for fence in list(self._arriving.values()):
            with contextlib.suppress(Exception):  # the pages are no longer needed, and the job reports failed blocks
                self._engine.settle(fence)
        self._arriving.clear()
        super().close()
