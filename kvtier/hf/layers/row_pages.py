"""RowPages: the pages of one row of the cache, as its commit reads them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from kvtier.hf.layers.dropped import DroppedColumns, Piece
from kvtier.hf.layers.gather import Gather
from kvtier.kv.base import LayerMemory
from kvtier.kv.page import Page


@dataclass(frozen=True, slots=True, eq=False)
class RowPages:
    """Pages of the tokens of one row, split into those of sliding layers and those of all others.

    Attributes:
        memories: the memory of each layer; None for layers that no forward pass has filled.
        sliding: the places of sliding layers among them.
        dropped: columns that sliding layers have dropped in this turn.
        row: the row of the cache.
        prompt_row: the row of the prompt that it continues.
        pad: the column of its first token.
        gather: reads pages beside the computation; None where they are copied at once.
    """

    memories: Sequence[LayerMemory | None]
    sliding: Collection[int]
    dropped: DroppedColumns | None
    row: int
    prompt_row: int
    pad: int
    gather: Gather | None = None
    _pieces: dict[int, list[tuple[Piece, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dropped is not None:
            for layer in self.sliding:
                self._pieces[layer] = list(self.dropped.of(layer, self.row, self.prompt_row))

    def ranges(self, layer: int, columns: int) -> list[tuple[int, int]]:
        """Return the columns before ``columns`` that a sliding layer has or has had in this turn."""
        memory = self.memories[layer]
        held = [(memory.base, columns)] if memory is not None else []
        return held + [(piece.begin, piece.end) for piece, _ in self._pieces.get(layer, ())]

    def read(self, start: int, stop: int) -> tuple[Page, ...]:
        """Return the pages of the tokens ``[start, stop)``, empty for sliding layers."""
        return self._read({layer for layer in range(len(self.memories)) if layer not in self.sliding}, start, stop)

    def read_window(self, start: int, stop: int) -> tuple[Page, ...]:
        """Return the pages of sliding layers of the tokens ``[start, stop)``, empty for all other layers."""
        return self._read(set(self.sliding), start, stop)

    def _read(self, layers: Collection[int], start: int, stop: int) -> tuple[Page, ...]:
        begin, end = self.pad + start, self.pad + stop
        if self.gather is not None:
            return self.gather.read(self.row, begin, end, layers, self._pieces)
        return tuple(
            self._page(layer, memory, begin, end) if memory is not None and layer in layers else Page.empty(end - begin)
            for layer, memory in enumerate(self.memories)
        )

    def _page(self, layer: int, memory: LayerMemory, begin: int, end: int) -> Page:
        if begin >= memory.base:
            return memory.page(self.row, begin, end)
        page = Page.like(memory.spec, end - begin)
        for piece, index in self._pieces.get(layer, ()):
            first, last = max(begin, piece.begin), min(end, piece.end)
            if first < last:
                piece.settle()
                page.put(first - begin, piece.cut(index, first, last))
        if end > memory.base:
            page.put(memory.base - begin, memory.page(self.row, memory.base, end))
        return page
