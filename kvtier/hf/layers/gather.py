"""Gather: host copies of committed pages of a device, made beside the computation."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from kvtier.errors import UnavailableError
from kvtier.hf.layers.dropped import Piece
from kvtier.kv.base import LayerMemory
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.page import Page
from kvtier.transfer.base import CopyEngine, Fence, Pair, copy_pairs

_log = logging.getLogger("kvtier.hf")
_STAGE_BYTES = 256 * 2**20  # pinned memory for a commit; more would be slow to pin
_LEAST_STAGES = 3
_LONGEST_WAIT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Pages of some layers for the columns ``[begin, end)`` of a row; ``pieces`` have columns that left the buffers."""

    row: int
    begin: int
    end: int
    pages: tuple[Page, ...]
    pieces: Mapping[int, Sequence[tuple[Piece, int]]]


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

    def read(
        self,
        row: int,
        begin: int,
        end: int,
        layers: Collection[int],
        pieces: Mapping[int, Sequence[tuple[Piece, int]]],
    ) -> tuple[Page, ...]:
        """Return pages of the columns ``[begin, end)`` of a row, empty for all but ``layers``.

        They hold their bytes only after ``wait``.

        Args:
            row: a row of the buffers.
            begin: the first column.
            end: the column after the last.
            layers: which layers.
            pieces: for each layer, copies of columns that the buffer has dropped, and the index of the row in each.
        """
        pages = tuple(
            Page.like(memory.spec, end - begin) if memory is not None and layer in layers else Page.empty(end - begin)
            for layer, memory in enumerate(self._memories)
        )
        self._wanted.append(_Wanted(row, begin, end, pages, pieces))
        self._reads += 1
        return pages

    def launch(self, *, is_last: bool = True) -> None:
        """Enqueue the copies of the pages that were read so far. After the last launch nothing more is read."""
        wanted, self._wanted = self._wanted, []
        held = [
            (i, memory, of_layer)
            for i, memory in enumerate(self._memories)
            if isinstance(memory, KVBuffer) and (of_layer := [each for each in wanted if each.pages[i].nbytes])
        ]
        with self._lock:
            self._left += len(held)
            self._launched = self._reads
        layer_bytes = max((_stage_bytes(memory, of_layer) for _, memory, of_layer in held), default=0)
        depth = min(len(held), max(_LEAST_STAGES, _STAGE_BYTES // max(1, layer_bytes)))
        stages = [self._engine.host_empty(layer_bytes) for _ in range(depth)]
        cuts: list[Fence] = []
        for number, (layer, memory, of_layer) in enumerate(held):
            free = [cuts[number - depth]] if number >= depth else []
            copies, reads, cut = _plan(stages[number % depth], memory, layer, of_layer)
            after = [
                piece.fence for each in of_layer for piece, _ in each.pieces.get(layer, ()) if piece.fence is not None
            ]
            if copies:
                copied = self._engine.copy_all(copies, after=[self._ready, *free])
                self._overwriting.append(copied)
                after.append(copied)
            cuts.append(self._engine.call(partial(self._cut, cut), reads=reads, after=after))
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


def _columns(memory: KVBuffer, wanted: Sequence[_Wanted]) -> dict[int, tuple[int, int]]:
    """Return, for each row, the columns ``[begin, end)`` of the buffer that include all wanted ones that it holds."""
    columns: dict[int, tuple[int, int]] = {}
    for each in wanted:
        begin, end = max(each.begin, memory.base), each.end
        if begin < end:
            first, last = columns.get(each.row, (begin, end))
            columns[each.row] = min(first, begin), max(last, end)
    return columns


def _stage_bytes(memory: KVBuffer, wanted: Sequence[_Wanted]) -> int:
    return memory.spec.token_bytes * sum(end - begin for begin, end in _columns(memory, wanted).values())


def _plan(
    memory: torch.Tensor, buffer: KVBuffer, layer: int, wanted: Sequence[_Wanted]
) -> tuple[list[Pair], list[torch.Tensor], list[Pair]]:
    """Return the copies from ``buffer`` to stages in ``memory``, what is read on the host, and the copies to pages."""
    copies: list[Pair] = []
    reads: list[torch.Tensor] = []
    cut: list[Pair] = []
    at, spec = 0, buffer.spec
    for row, (begin, end) in _columns(buffer, wanted).items():
        stage = KVBuffer.on_bytes(memory[at:], 1, spec, end - begin, begin)
        at += (end - begin) * spec.token_bytes
        reads += [stage.k, stage.v]
        k, v = buffer.contents(end, begin)
        copies += [(stage.k[0], k[row]), (stage.v[0], v[row])]
        for each in wanted:
            if each.row == row and (first := max(each.begin, begin)) < each.end:
                cut += _pairs(each.pages[layer], first - each.begin, *stage.columns(0, first, each.end))
    for each in wanted:
        for piece, index in each.pieces.get(layer, ()):
            first, last = max(each.begin, piece.begin), min(each.end, piece.end, max(buffer.base, each.begin))
            if first < last:
                part = piece.cut(index, first, last)
                reads += [part.k_htd, part.v_htd]
                cut += _pairs(each.pages[layer], first - each.begin, part.k_htd, part.v_htd)
    return copies, reads, cut


def _pairs(page: Page, first: int, k_htd: torch.Tensor, v_htd: torch.Tensor) -> list[Pair]:
    """Return the copies of K and V to the tokens of ``page`` from ``first`` on."""
    tokens = slice(first, first + k_htd.shape[1])
    return [(page.k_htd[:, tokens], k_htd), (page.v_htd[:, tokens], v_htd)]
