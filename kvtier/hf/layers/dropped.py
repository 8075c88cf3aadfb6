"""DroppedColumns: host copies of columns that sliding layers dropped in a turn, for its commit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from kvtier.kv.base import LayerMemory
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.page import Page
from kvtier.kv.window import Range
from kvtier.transfer.base import CopyEngine, Fence


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Copies of the columns ``[begin, end)`` of one layer.

    Attributes:
        begin: the first column.
        end: the column after the last.
        rows: which row each copy is of: a row of the prompt for columns of the prompt, else a row of the cache.
        k_rhtd: ``[rows, heads, columns, dim]`` on the host.
        v_rhtd: the same of V.
        engine: makes the copies; None where they are made.
        fence: passes when the copies have arrived.
    """

    begin: int
    end: int
    rows: tuple[int, ...]
    k_rhtd: torch.Tensor
    v_rhtd: torch.Tensor
    engine: CopyEngine | None = None
    fence: Fence | None = None

    def cut(self, index: int, begin: int, end: int) -> Page:
        """Return views of the columns ``[begin, end)`` of the row at ``index``."""
        columns = slice(begin - self.begin, end - self.begin)
        return Page(self.k_rhtd[index, :, columns], self.v_rhtd[index, :, columns])

    def settle(self) -> None:
        """Block until the copies have arrived."""
        if self.engine is not None:
            self.engine.settle(self.fence)


class DroppedColumns:
    """The columns that sliding layers dropped in one turn, as far as its commit may need them.

    Args:
        wanted: the columns to keep.
        recent: how many of the last dropped columns are kept, too: the turn may end any time.
        at_end: how many of the last columns of all are worth keeping when it ends.
        prompt_columns: columns of the prompt: rows that continue the same row of it share them.
        prompt_rows: number of rows of the cache → the row of the prompt that each of them continues.
        engine: device → what copies from it beside the computation; None where columns are copied at once.
    """

    def __init__(
        self,
        wanted: Sequence[Range],
        recent: int,
        at_end: int,
        prompt_columns: int,
        prompt_rows: Callable[[int], Sequence[int]],
        engine: Callable[[torch.device], CopyEngine | None],
    ) -> None:
        self._wanted = wanted
        self._recent = recent
        self._at_end = at_end
        self._prompt_columns = prompt_columns
        self.prompt_rows = prompt_rows
        self._engine = engine
        self._pieces: dict[int, list[Piece]] = {}
        self._have_rows_moved = False

    def rows_moved(self) -> None:
        """Note that rows of the cache have moved: columns after the prompt are no longer assigned to a row."""
        self._have_rows_moved = True
        for layer, pieces in self._pieces.items():
            self._pieces[layer] = [piece for piece in pieces if piece.end <= self._prompt_columns]

    def add(self, layer: int, memory: LayerMemory, begin: int, end: int) -> None:
        """Copy what may be needed of the columns ``[begin, end)``, which ``layer`` is about to drop."""
        kept = [piece for piece in self._pieces.get(layer, ()) if self._is_needed(piece.begin, piece.end, end)]
        for first, last in self._parts(begin, end):
            if self._is_needed(first, last, end):
                kept.append(self._copy(memory, first, last))
        self._pieces[layer] = kept

    def worth_keeping(self, columns: int) -> tuple[Range, ...]:
        """Return the columns before ``columns`` that a turn keeps which ends there."""
        return (*self._wanted, (max(0, columns - self._at_end), columns))

    def _is_needed(self, begin: int, end: int, dropped: int) -> bool:
        if begin >= self._prompt_columns and self._have_rows_moved:
            return False
        return end > dropped - self._recent or any(first < end and begin < last for first, last in self._wanted)

    def _parts(self, begin: int, end: int) -> Iterator[Range]:
        """Yield the columns ``[begin, end)`` in parts that are each needed, or not, as a whole."""
        cuts = {begin, end, self._prompt_columns, end - self._recent, *(cut for each in self._wanted for cut in each)}
        inside = sorted(cut for cut in cuts if begin <= cut <= end)
        yield from pairwise(inside)

    def _copy(self, memory: LayerMemory, begin: int, end: int) -> Piece:
        rows = list(range(memory.rows))
        if begin < self._prompt_columns:  # one of the rows that continue the same row of the prompt
            row_of = list(self.prompt_rows(memory.rows))
            names = tuple(sorted(set(row_of)))
            rows = [row_of.index(row) for row in names]
        else:
            names = tuple(rows)
        spec, columns = memory.spec, end - begin
        engine = self._engine(memory.device) if isinstance(memory, KVBuffer) else None
        if engine is None:
            host = KVBuffer(len(rows), spec, columns, "cpu")
            for at, row in enumerate(rows):
                host.put(at, 0, memory.page(row, begin, end))
            return Piece(begin, end, names, host.k, host.v)
        host = KVBuffer.on_bytes(engine.host_empty(len(rows) * columns * spec.token_bytes), len(rows), spec, columns)
        # Copied on the device first: the side stream holds on to these columns alone, not to the buffer.
        k, v = (torch.stack([part[row] for row in rows]) for part in memory.contents(end, begin))
        pairs = [(host.k, k), (host.v, v)]
        return Piece(begin, end, names, host.k, host.v, engine, engine.copy_all(pairs, after=[engine.mark()]))

    def of(self, layer: int, row: int, prompt_row: int) -> Iterator[tuple[Piece, int]]:
        """Yield the pieces with columns of a row of the cache, and the index of the row in each."""
        for piece in self._pieces.get(layer, ()):
            name = prompt_row if piece.begin < self._prompt_columns else row
            if name in piece.rows:
                yield piece, piece.rows.index(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> DroppedColumns:
        """Share the copies, which are never written to again."""
        twin = copy.copy(self)
        twin._pieces = {layer: list(pieces) for layer, pieces in self._pieces.items()}
        return twin
