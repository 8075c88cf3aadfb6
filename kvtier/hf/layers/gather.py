"""Gather: host copies of committed pages of a device, made beside the computation."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from kvtier.errors import UnavailableError
from kvtier.kv.allocation import new_buffer
from kvtier.kv.base import LayerMemory
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.page import Page
from kvtier.transfer import CopyEngine, Fence
from kvtier.transfer.base import Pair, copy_pairs

_log = logging.getLogger("kvtier.hf")
_STAGE_BYTES = 256 * 2**20  # pinned memory for a commit; more would be slow to pin
_LEAST_STAGES = 3
_LONGEST_WAIT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Pages of all layers for the columns ``[begin, end)`` of a row."""

    row: int
    begin: int
    end: int
    pages: tuple[Page, ...]


class Gather:
    """The pages of one commit. ``read`` says which, ``launch`` enqueues their copies, ``wait`` waits for them.

    For each layer, one copy of K and one of V of each row go to host memory, pinned where that helps, on a side stream;
    then a thread cuts the pages out of it. Kernels that come after ``before_writing`` may write to the buffers.

    Args:
        engine: copies.
        memories: the memory of each layer; None for layers that hold nothing.
    """

    def __init__(self, engine: CopyEngine, memories: Sequence[LayerMemory | None]) -> None:
        self._overwriting: list[Fence] = []
        self._engine = engine
        self._memories = memories
        self._ready = engine.mark()  # the kernels of the turn have written the columns
        self._wanted: list[_Wanted] = []
        self._cuts: list[Fence] = []
        self._left = 0  # layers whose pages have not arrived
        self._reads = self._launched = self._landed = 0
        self._lock = threading.Condition()
        self._is_complete = False
        self._failed = False
        self._owner = (os.getpid(), threading.get_ident())

    def read(self, row: int, pad: int, start: int, stop: int) -> tuple[Page, ...]:
        """Return pages of the tokens ``[start, stop)`` of a row, whose first token is in column ``pad``.

        They hold their bytes only after ``wait``.
        """
        pages = tuple(_empty_page(memory, stop - start) for memory in self._memories)
        self._wanted.append(_Wanted(row, pad + start, pad + stop, pages))
        self._reads += 1
        return pages

    def launch(self, *, is_last: bool = True) -> None:
        """Enqueue the copies of the pages that were read so far. After the last launch nothing more is read."""
        wanted, self._wanted = self._wanted, []
        held = [(i, memory) for i, memory in enumerate(self._memories) if isinstance(memory, KVBuffer) and wanted]
        with self._lock:
            self._left += len(held)
            self._launched = self._reads
        columns = _columns(wanted)
        tokens = sum(end - begin for begin, end in columns.values())
        layer_bytes = max((memory.spec.token_bytes * tokens for _, memory in held), default=0)
        depth = min(len(held), max(_LEAST_STAGES, _STAGE_BYTES // max(1, layer_bytes)))
        stages = [self._engine.host_empty(layer_bytes) for _ in range(depth)]
        cuts: list[Fence] = []
        for number, (layer, memory) in enumerate(held):
            free = [cuts[number - depth]] if number >= depth else []
            copies, reads, cut = _plan(stages[number % depth], memory, layer, columns, wanted)
            copied = self._engine.copy_all(copies, after=[self._ready, *free])
            cuts.append(self._engine.call(partial(self._cut, cut), reads=reads, after=[copied]))
            self._overwriting.append(copied)
        self._cuts += cuts
        if is_last:
            self._is_complete, self._memories = True, ()  # stored blocks keep this object: it must not keep buffers
        if not held:
            self._note_landed(0)

    def _cut(self, pairs: Sequence[Pair]) -> None:
        copy_pairs(pairs)
        self._note_landed(1)

    def _note_landed(self, layers: int) -> None:
        with self._lock:
            self._left -= layers
            if not self._left:
                self._landed = self._launched
                self._lock.notify_all()

    def wait(self) -> None:
        """Block until the pages that were read so far hold their bytes; at most ten seconds on another thread.

        Raises:
            UnavailableError: they do not arrive: the device failed, or this is a forked process.
        """
        if self._landed == self._reads:
            return
        if (os.getpid(), threading.get_ident()) == self._owner:
            self.launch(is_last=False)
            self.settle()
        elif self._failed or not self._has_landed():
            self._failed = True  # the next one does not wait
            raise UnavailableError("K and V of a committed block did not arrive from the device")

    def _has_landed(self) -> bool:
        with self._lock:
            needed = self._reads
            return self._lock.wait_for(lambda: self._landed >= needed, _LONGEST_WAIT_SECONDS)

    def settle(self) -> None:
        """Block until all launched pages hold their bytes.

        Raises:
            UnavailableError: the device failed.
        """
        try:
            for fence in self._cuts:
                self._engine.settle(fence)
        except Exception as error:
            self._failed = True
            raise UnavailableError(f"K and V of a committed block did not arrive from the device: {error}") from error

    def before_writing(self) -> None:
        """Make kernels from now on run after the copies from the buffers."""
        while self._overwriting:
            try:
                self._engine.wait(self._overwriting.pop())
            except Exception:  # the blocks are unavailable for it; the next turn must not fail
                self._failed = True
                _log.debug("a copy of committed pages failed", exc_info=True)

    @property
    def is_done(self) -> bool:
        """Whether all pages hold their bytes and kernels may write to the buffers, or the device has failed."""
        is_landed = self._is_complete and self._landed == self._reads
        return self._failed or (is_landed and not self._overwriting)


def _empty_page(memory: LayerMemory | None, tokens: int) -> Page:
    if memory is None:
        nothing = torch.empty(0, tokens, 0, device="cpu")
        return Page(nothing, nothing)
    g = memory.spec
    return Page(
        new_buffer(g.k_heads, tokens, g.k_dim, dtype=g.dtype),
        new_buffer(g.v_heads, tokens, g.v_dim, dtype=g.values_dtype),
    )


def _columns(wanted: Sequence[_Wanted]) -> dict[int, tuple[int, int]]:
    """Return the columns ``[begin, end)`` that include all wanted pages, for each row."""
    rows = sorted({each.row for each in wanted})
    return {
        row: (min(w.begin for w in wanted if w.row == row), max(w.end for w in wanted if w.row == row)) for row in rows
    }


def _plan(
    memory: torch.Tensor,
    buffer: KVBuffer,
    layer: int,
    columns: Mapping[int, tuple[int, int]],
    wanted: Sequence[_Wanted],
) -> tuple[list[Pair], list[torch.Tensor], list[Pair]]:
    """Return the copies from ``buffer`` to stages in ``memory``, the stages, and the copies from them to the pages."""
    copies: list[Pair] = []
    stages: list[torch.Tensor] = []
    cut: list[Pair] = []
    at, spec = 0, buffer.spec
    for row, (begin, end) in columns.items():
        stage = KVBuffer.on_bytes(memory[at:], 1, spec, end - begin)
        at += (end - begin) * spec.token_bytes
        stages += [stage.k, stage.v]
        copies += [(stage.k[0], buffer.k[row, :, begin:end]), (stage.v[0], buffer.v[row, :, begin:end])]
        for each in wanted:
            if each.row == row:
                page, of = each.pages[layer], slice(each.begin - begin, each.end - begin)
                cut += [(page.k_htd, stage.k[0, :, of]), (page.v_htd, stage.v[0, :, of])]
    return copies, stages, cut
