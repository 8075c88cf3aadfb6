"""What a cold layer holds: full pages below, and the columns after the last of them on the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch

from kvtier.kv.allocation import new_buffer
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.page import Page, PageView
from kvtier.kv.spec import LayerSpec
from kvtier.offload.extents import Part


class ColdPages:
    """K and V of one layer for all rows.

    Pages are never changed, only forgotten, so that copies of it share them.

    Attributes:
        parts: where the full pages are, in order and without gaps.
        tail: a window of one page, for the columns from ``paged`` on.
    """

    def __init__(self, rows: int, geometry: LayerSpec, page_tokens: int, device: torch.device) -> None:
        self.parts: tuple[Part, ...] = ()
        self.tail = KVBuffer(rows, geometry, page_tokens, device)

    @property
    def paged(self) -> int:
        """Columns that are below."""
        return sum(part.tokens for part in self.parts)

    @property
    def page_tokens(self) -> int:
        """Columns of a page."""
        return self.tail.capacity

    def between(self, begin: int, end: int) -> Iterator[Part]:
        """Return the parts of the columns ``[begin, end)`` that are below."""
        at = 0
        for part in self.parts:
            first, last = max(begin - at, 0), min(end - at, part.tokens)
            if first < last:
                whole = (first, last) == (0, part.tokens)
                yield part if whole else Part(part.run, part.first + first, part.first + last, part.rows)
            at += part.tokens

    def add(self, parts: Sequence[Part]) -> None:
        """Have more full pages after those that are there."""
        self.parts = (*self.parts, *parts)

    def put_tail(self, into: KVBuffer, base: int, end: int) -> None:
        """Copy the columns ``[paged, end)`` to ``into``, whose column 0 is column ``base``."""
        paged = self.paged
        if paged < end:
            into.write(paged - base, self.tail.k[:, :, : end - paged], self.tail.v[:, :, : end - paged])

    def keep_tail(self, source: KVBuffer, base: int, begin: int, end: int) -> None:
        """Copy the columns ``[begin, end)``, none of them below, from ``source``, whose column 0 is column ``base``."""
        paged = self.paged
        begin = max(begin, paged)
        columns = slice(begin - base, end - base)
        self.tail.write(begin - paged, source.k[:, :, columns], source.v[:, :, columns])

    def crop(self, columns: int) -> None:
        """Forget the pages after the first ``columns`` columns; one that is cut becomes the unfinished one again.

        Raises:
            StreamError: the page that is cut is lost.
        """
        if columns >= self.paged:
            return
        keep = columns // self.page_tokens * self.page_tokens
        if columns > keep:
            for row in range(self.tail.rows):
                self.tail.put(row, 0, self.page(row, keep, columns))
        self.parts = tuple(self.between(0, keep))

    def select(self, rows: torch.Tensor, live: int) -> None:
        """Make row ``i`` the former row ``rows[i]``, for the first ``live`` columns. No page moves."""
        order = rows.tolist()
        self.tail.select(rows, max(0, live - self.paged))
        self.parts = tuple(
            Part(part.run, part.first, part.last, tuple(part.rows[row] for row in order)) for part in self.parts
        )

    def page(self, row: int, begin: int, end: int) -> Page:
        """Return a host copy of the columns ``[begin, end)`` of ``row``; nothing is brought up for it.

        Raises:
            StreamError: a page is lost.
        """
        g, paged = self.tail.geometry, self.paged
        k = new_buffer(g.k_heads, end - begin, g.k_dim, dtype=g.dtype)
        v = new_buffer(g.v_heads, end - begin, g.v_dim, dtype=g.values_dtype)
        landing, at = PageView.on(k, v), 0
        for part in self.between(begin, min(end, paged)):
            part.run.read(part.rows[row], part.first, part.last, landing.cut(at, at + part.tokens))
            at += part.tokens
        if at < end - begin:
            rest = self.tail.page(row, begin + at - paged, end - paged)
            landing.cut(at, end - begin).take(rest, 0, end - begin - at)
        return Page(k, v)

    def twin(self) -> ColdPages:
        """Return a copy that shares the pages."""
        twin = copy.copy(self)
        twin.tail = copy.deepcopy(self.tail)
        return twin
