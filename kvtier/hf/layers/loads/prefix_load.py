"""PrefixLoad: the known prefix of a turn, loaded into the buffers layer by layer."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtier.errors import RestoreError
from kvtier.kv.base import LayerMemory
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.page import PageView
from kvtier.kv.room import ON_DEMAND, Growth, WindowRoom
from kvtier.kv.spec import LayerSpec
from kvtier.kv.window import Window
from kvtier.store.reading.load import LoadJob

MakeMemory = Callable[[torch.Tensor, torch.Tensor], LayerMemory]
"""``(K, V)`` → an empty memory for K and V like these, ``[batch, heads, tokens, dim]`` each."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The source of the first tokens of one row: ``device_tokens`` of a held row, then the store.

    ``pad`` is the column of the row's first token, ``end`` the column after its last. ``source_pad`` is the column of
    the first token of the held row ``source_row``. ``window_tokens`` is the number of first tokens for which sliding
    layers take what they need from the held row; 0 where the held row lacks some of it.
    """

    pad: int
    source_row: int
    source_pad: int
    device_tokens: int
    end: int = sys.maxsize
    window_tokens: int = 0


class PrefixLoad:
    """The first ``columns`` columns of a turn, as far as they are known; in sliding layers, those from ``first`` on.

    Rows share one limit: transformers cuts a batch at one column for all rows. Tokens that are in place already are
    not copied. Pages of the store land in host buffers layer by layer. On a CPU these are the layers' own buffers, so
    that a page is copied once, from its tier to its place.
    """

    def __init__(self, columns: int, first: int, plans: Sequence[RowPlan], job: LoadJob | None, held_rows: int) -> None:
        self.columns = columns
        self.first = first
        self.windows: Sequence[Window | None] = ()
        self.restored_bytes = job.nbytes if job is not None else 0
        self.rows = len(plans)
        self.repeats = 1
        self.device = torch.device("cpu")
        self.seconds = 0.0
        self.overlap_bytes_per_second = 1e9  # slower pages are not waited for before the first layer computes
        self.patience_seconds: float | None = None  # what has not landed after so long is given up
        self.on_landed: Callable[[int], None] | None = None  # is told each layer whose pages have landed
        self.plans = tuple(plans)
        self.job = job
        self.in_place = held_rows == len(plans) and all(
            plan.source_row == row and plan.source_pad == plan.pad for row, plan in enumerate(plans)
        )
        self._landed: list[KVBuffer | None] = []
        self._left: set[int] = set()
        self._moved: dict[int, int] = {}  # layers whose held rows were moved: to so many rows for each row

    def start(self, memories: Sequence[LayerMemory | None], windows: Sequence[Window | None], columns: int) -> None:
        """Assign a place to the pages of each layer and start loading them.

        Args:
            memories: current memory of each layer.
            windows: the columns that each layer keeps; None for all.
            columns: columns that the buffers are expected to need in this turn.

        Raises:
            RestoreError: the blocks of the store do not fit the layers.
        """
        self.check_fit(memories, windows)
        self.move_held_rows(memories, columns)
        job = self.job
        if job is None or not job.nbytes:
            return
        for layer, (memory, spec) in enumerate(zip(memories, job.spec.layers, strict=True)):
            if not spec.token_bytes:
                self._landed.append(None)
            elif isinstance(memory, KVBuffer) and self.stays(layer, memory) and memory.is_host(spec):
                slides = windows[layer] is not None
                memory.reserve(self.columns if slides else columns, live=min(self.columns, memory.capacity))
                self._landed.append(memory)
            else:
                self._landed.append(self._host_buffer(layer, spec, columns))
        job.start(self._place, self.patience_seconds)
        self._give_head_start(job)

    def _give_head_start(self, job: LoadJob) -> None:
        """Wait for fast pages where computing would take the cores from the threads that read them.

        Here, and not in the first layer: the Python before it and those threads would wait for each other.
        """
        if self.device.type == "cpu" and torch.get_num_threads() >= (os.cpu_count() or 1):
            started = time.perf_counter()
            job.give_head_start(self.restored_bytes / self.overlap_bytes_per_second)
            self.seconds += time.perf_counter() - started

    def first_of(self, layer: int) -> int:
        """Return the first column that ``layer`` needs."""
        return 0 if self.windows[layer] is None else self.first

    def stays(self, layer: int, memory: LayerMemory) -> bool:
        """Whether the held columns of ``layer`` are in place already, and the others fit behind them without a gap."""
        return (self.in_place or layer in self._moved) and self._has_no_gap(layer, memory)

    def _has_no_gap(self, layer: int, memory: LayerMemory) -> bool:
        if self.windows[layer] is None:
            return True
        reaches = all(self.held_end(layer, row) >= self.first for row in range(len(self.plans)))
        return memory.base == self.first or (memory.base < self.first and reaches)

    def rows_to_move(self, layer: int, memory: LayerMemory, repeats: int) -> torch.Tensor | None:
        """Return the held row of each row; None where ``memory`` may stay as it is, or rows cannot be moved in it.

        A second buffer would need as much memory again. Moved rows do not: they are moved in place, or K before V.
        """
        if layer in self._moved or (self.in_place and repeats == 1) or not self._has_no_gap(layer, memory):
            return None
        are_held = any(plan.device_tokens for plan in self.plans)
        if not are_held or any(plan.source_pad != plan.pad for plan in self.plans):
            return None
        sources = [plan.source_row for plan in self.plans for _ in range(repeats)]
        if memory.rows != len(sources) and not self.is_tight(memory):
            return None
        return torch.tensor(sources, device="cpu")

    def is_tight(self, memory: LayerMemory) -> bool:
        """Whether a second buffer would cost more than columns that are copied twice."""
        return memory.device.type != "cpu"

    def moved_rows(self, layer: int, repeats: int) -> None:
        """Note that each row of the turn has ``repeats`` rows of ``layer`` now."""
        self._moved[layer] = repeats

    def move_held_rows(self, memories: Sequence[LayerMemory | None], columns: int) -> None:
        """Move the held rows of each layer to their places, in memory with room for ``columns``."""
        on_device: dict[torch.device, torch.Tensor] = {}  # one blocking copy, not one for each layer
        for layer, memory in enumerate(memories):
            if not isinstance(memory, KVBuffer):
                continue
            rows = self.rows_to_move(layer, memory, self.repeats)
            if rows is not None:
                if memory.device not in on_device:
                    on_device[memory.device] = rows.to(memory.device)
                live = min(self.held_columns(layer, memory), memory.capacity)
                memory.select(on_device[memory.device], live, columns)
                self.moved_rows(layer, self.repeats)

    def held_columns(self, layer: int, memory: LayerMemory) -> int:
        """Return the column after the last in ``memory`` that comes from a held row."""
        return max(memory.base, min(self.columns, max(self.held_end(layer, row) for row in range(len(self.plans)))))

    def source_row(self, layer: int, row: int) -> int:
        """Return where the held row of ``row`` is now."""
        return row * self._moved[layer] if layer in self._moved else self.plans[row].source_row

    def room(self, layer: int, room: Growth) -> Growth:
        """Return the room of a buffer for ``layer``, where ``room`` is that of a layer that keeps all columns."""
        window = self.windows[layer]
        return room if window is None else WindowRoom(room, window.most_columns)

    def _host_buffer(self, layer: int, spec: LayerSpec, columns: int) -> KVBuffer:
        """Return a buffer for pages. On a CPU it becomes the layer's own, and has room for the rest of the prompt."""
        base = self.first_of(layer)
        buffer = KVBuffer(len(self.plans), spec, 0, "cpu", self.room(layer, ON_DEMAND), base)
        stays = self.device.type == "cpu" and self.windows[layer] is None
        buffer.reserve(columns if stays else self.columns, live=base)
        return buffer

    def check_fit(self, memories: Sequence[LayerMemory | None], windows: Sequence[Window | None]) -> None:
        """Check that the blocks of the store have as many layers as the cache.

        Raises:
            RestoreError: they have another number of layers.
        """
        job, self.windows = self.job, windows
        if job is not None and len(memories) != len(job.spec.layers):
            raise job.reject(f"blocks of {len(job.spec.layers)} layers do not fit {len(memories)}")
        self._left = {i for i, memory in enumerate(memories) if memory is not None or self.brings(i)}

    def held_end(self, layer: int, row: int) -> int:
        """Return the column of ``row`` after the last that comes from a held row."""
        plan = self.plans[row]
        return plan.pad + (plan.device_tokens if self.windows[layer] is None else plan.window_tokens)

    def loaded_columns(self, layer: int, row: int) -> tuple[int, int]:
        """Return the columns ``[begin, end)`` of ``row`` that come from the store."""
        begin = max(self.held_end(layer, row), self.first_of(layer))
        return min(begin, self.columns), min(self.plans[row].end, self.columns)

    def brings(self, layer: int) -> bool:
        """Whether the store has K or V of buffer ``layer``. It has none of a buffer that no forward pass fills."""
        return self.job is not None and self.job.spec.layers[layer].token_bytes > 0

    def nothing(self, layer: int, like: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of no tokens for buffer ``layer``, with all rows of the turn.

        Args:
            layer: index of the buffer.
            like: K and V of no tokens from the held buffer; None when all pages come from the store.
        """
        rows = self.rows * self.repeats
        if like is not None:
            k, v = (part.new_empty(rows, *part.shape[1:]) for part in like)
            return k, v
        assert self.job is not None
        g = self.job.spec.layers[layer]
        k = torch.empty(rows, g.k_heads, 0, g.k_dim, dtype=g.dtype, device=self.device)
        return k, torch.empty(rows, g.v_heads, 0, g.v_dim, dtype=g.dtype, device=self.device)

    @property
    def has_states(self) -> bool:
        """Whether states come from the store."""
        return self.job is not None and self.job.has_states

    def states(self) -> list[torch.Tensor]:
        """Return the states of each row, U8 ``[bytes]``.

        Raises:
            RestoreError: they could not be read.
        """
        assert self.job is not None
        states = [self.job.states(row) for row in range(self.rows)]
        self.restored_bytes += sum(each.nbytes for each in states)
        return states

    def reject(self, reason: str) -> RestoreError:
        """Reject the blocks of the store, which do not fit. Returns the error to raise."""
        return self.job.reject(reason) if self.job is not None else RestoreError(reason)

    def _place(self, layer: int, row: int) -> tuple[PageView, int]:
        landed = self._landed[layer]
        assert landed is not None
        return self.place_in(landed, row)

    def place_in(self, buffer: KVBuffer, row: int) -> tuple[PageView, int]:
        """Return a view of ``row`` in ``buffer``, and the token at its index 0."""
        pad = self.plans[row].pad
        return buffer.view(row, pad), max(0, buffer.base - pad)

    def take(
        self, layer: int, old: LayerMemory | None, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, make: MakeMemory
    ) -> LayerMemory:
        """Return the buffer of ``layer`` with the prefix in it, for as many rows as ``k_bhtd`` has.

        Args:
            layer: index of the buffer.
            old: its memory before the turn.
            k_bhtd: the first K to be appended; beams and return sequences of a row follow each other.
            v_bhtd: the first V to be appended.
            make: returns an empty memory for K and V like these.

        Raises:
            RestoreError: a page could not be read, or does not fit.
        """
        started = time.perf_counter()
        memory = self._fill(layer, old, k_bhtd, v_bhtd, make)
        self._left.discard(layer)
        if self.on_landed is not None:
            self.on_landed(layer)
        if not self._left:
            self.close()
        self.seconds += time.perf_counter() - started
        return memory

    def _fill(
        self, layer: int, old: LayerMemory | None, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, make: MakeMemory
    ) -> LayerMemory:
        assert old is None or isinstance(old, KVBuffer)
        landed = self._wait(layer, LayerSpec.of(k_bhtd, v_bhtd))
        repeats = k_bhtd.shape[0] // len(self.plans)
        first = self.first_of(layer)
        if old is not None and self.stays(layer, old) and old.takes(k_bhtd, v_bhtd):
            memory = old
            memory.reserve(self.columns, live=min(self.columns, memory.capacity))
        elif landed is not None and landed.takes(k_bhtd, v_bhtd):
            memory = landed
        else:
            made = make(k_bhtd, v_bhtd)
            assert isinstance(made, KVBuffer)
            memory = made
            memory.begin_at(first)
            memory.reserve(self.columns + k_bhtd.shape[2], live=first)
        for row in range(memory.rows):
            source = row // repeats
            plan = self.plans[source]
            begin = min(max(plan.pad, first), self.columns)
            held, end = self.loaded_columns(layer, source)
            if memory is not old:
                memory.clear(row, 0, begin)
                if old is not None:
                    source_row = self.source_row(layer, source)
                    memory.copy(row, begin, held, old, source_row, plan.source_pad + begin - plan.pad)
            if landed is not None and landed is not memory:
                memory.copy(row, held, end, landed, source * landed.rows // self.rows, held)
            if end < self.columns:
                memory.clear(row, end, self.columns)
        return memory

    def _wait(self, layer: int, spec: LayerSpec) -> KVBuffer | None:
        if not self._landed:
            return None
        if self.job is not None:
            self.job.wait(layer)
        landed = self._landed[layer]
        if landed is not None and landed.spec != spec:
            raise self.misfit(landed.spec, spec)
        return landed

    def misfit(self, stored: LayerSpec, wanted: LayerSpec) -> RestoreError:
        """Return the error for a stored layer that does not fit the model."""
        return self.reject(f"stored pages of {stored} do not fit the model's {wanted}")

    def wait(self) -> None:
        """Wait for all pages.

        Raises:
            RestoreError: a page could not be read.
        """
        if self.job is not None:
            for layer in range(len(self._landed)):
                self.job.wait(layer)
                if self.on_landed is not None:
                    self.on_landed(layer)

    def close(self) -> None:
        """Stop loading. May be called more than once."""
        if self.job is not None:
            self.job.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixLoad:
        """Wait for all pages, then share the buffers in which they landed."""
        self.wait()
        twin = copy.copy(self)
        twin.job = twin.on_landed = None
        twin._landed = [
            memo.get(id(memory)) or memory.share(memory.capacity) if memory is not None else None
            for memory in self._landed
        ]
        twin._left, twin._moved = set(self._left), dict(self._moved)
        return twin
