"""KVBuffer: contiguous K and V of one layer, appended in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvtier.kv.allocation import empty_rows, new_buffer, writable_results
from kvtier.kv.copy_on_write import CopyOnWrite
from kvtier.kv.page import Page, PageView
from kvtier.kv.room import ON_DEMAND, Growth
from kvtier.kv.spec import LayerSpec

_SELECTED_TOGETHER = 512


class KVBuffer:
    """K ``[rows, k_heads, columns, k_dim]`` and V ``[rows, v_heads, columns, v_dim]``, from column ``base`` on.

    Owns both buffers, or shares them with its twins. A twin that writes columns that another twin reads takes a copy
    first. Memory beyond the written columns is only reserved: on the CPU it costs address space.

    Methods take columns of the sequence. They ignore what is written to columns before ``base``, and return none.

    Attributes:
        base: the first column held; a buffer of a sliding layer has dropped the ones before it.

    Args:
        rows: sequences.
        spec: spec of the layer.
        capacity: columns to reserve now.
        device: device of the buffers.
        room: decides how many columns are reserved when more are needed.
        base: the first column to be held.
    """

    _tenants: CopyOnWrite | None = None  # None: these buffers are not shared

    def __init__(
        self,
        rows: int,
        spec: LayerSpec,
        capacity: int,
        device: torch.device | str,
        room: Growth = ON_DEMAND,
        base: int = 0,
    ) -> None:
        self.spec = spec
        self.base = base
        self._growth = room
        g = spec
        self.k = new_buffer(rows, g.k_heads, capacity, g.k_dim, dtype=g.dtype, device=device)
        self.v = new_buffer(rows, g.v_heads, capacity, g.v_dim, dtype=g.values_dtype, device=device)
        self._room = capacity

    @classmethod
    def on_bytes(cls, memory: torch.Tensor, rows: int, spec: LayerSpec, capacity: int, base: int = 0) -> KVBuffer:
        """Return an empty buffer of ``capacity`` columns whose tensors lie in ``memory``, ``[bytes]``."""
        g, k_bytes, v_bytes = spec, rows * capacity * spec.k_bytes, rows * capacity * spec.v_bytes
        buffer = cls.__new__(cls)
        buffer.spec, buffer._growth, buffer._room, buffer.base = spec, ON_DEMAND, capacity, base
        buffer.k = memory[:k_bytes].view(g.dtype).view(rows, g.k_heads, capacity, g.k_dim)
        buffer.v = memory[k_bytes : k_bytes + v_bytes].view(g.values_dtype).view(rows, g.v_heads, capacity, g.v_dim)
        return buffer

    @classmethod
    def like(cls, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, room: Growth = ON_DEMAND) -> KVBuffer:
        """Return an empty buffer for K and V like these, without memory yet."""
        return cls(k_bhtd.shape[0], LayerSpec.of(k_bhtd, v_bhtd), 0, k_bhtd.device, room)

    @property
    def rows(self) -> int:
        """Sequences held."""
        return self.k.shape[0]

    @property
    def capacity(self) -> int:
        """The column after the last that both buffers have room for."""
        return self.base + self._room

    @property
    def device(self) -> torch.device:
        """The device of the buffers."""
        return self.k.device

    def takes(self, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> bool:
        """Whether K and V like these can be appended as they are."""
        return (
            self.rows == k_bhtd.shape[0] and self.device == k_bhtd.device and self.spec == LayerSpec.of(k_bhtd, v_bhtd)
        )

    def share(self, live: int, room: Growth = ON_DEMAND) -> KVBuffer:
        """Return a twin that holds the same ``live`` columns and no memory of its own yet; ``room`` is for its growth.

        Both may be written and grow independently. If both append, the first to append stays in place.
        """
        twin = KVBuffer.__new__(KVBuffer)
        twin.spec, twin.k, twin.v, twin._room, twin.base = self.spec, self.k, self.v, self._room, self.base
        twin._growth = room
        if self._tenants is None:
            self._tenants = CopyOnWrite()
        twin._tenants = self._tenants
        self._tenants.join(self, twin, live)
        return twin

    def reserve(self, columns: int, live: int) -> None:
        """Make room for the columns before ``columns``; those before ``live`` keep their values."""
        if columns <= self.capacity:
            return
        needed = columns - self.base
        capacity = self.base + self._growth.capacity(needed, self.rows * self.spec.token_bytes, self.device)
        try:
            self.grow(capacity, live)
        except torch.OutOfMemoryError:
            if capacity == columns:
                raise
            self.grow(columns, live)

    def grow(self, capacity: int, live: int) -> None:
        """Make room for the columns before ``capacity``; those before ``live`` keep their values.

        Raises:
            OutOfMemoryError: the device has no room. The buffer still holds what it held.
        """
        self._replace(lambda buffer: _grown(buffer, capacity - self.base, max(live - self.base, 0)))

    def begin_at(self, base: int) -> None:
        """Let an empty buffer without memory hold columns from ``base`` on."""
        assert not self._room
        self.base = base

    def trim(self, base: int, live: int) -> KVBuffer:
        """Return a buffer with the columns ``[base, live)`` alone, in memory of its own; this one is to be closed."""
        trimmed = KVBuffer(self.rows, self.spec, 0, self.device, self._growth, base)
        trimmed.reserve(live, live=base)
        trimmed.write(base, *self.contents(live, base))
        return trimmed

    def _replace(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace K and V by ``make`` of each, which no twin shares. First K, so that only one of them exists twice."""
        # An interrupt may come in between: the smaller buffer decides the capacity.
        k = make(self.k)
        self._room = min(self._room, k.shape[2])
        self.k = k
        del k
        self.v = make(self.v)
        self._room = self.k.shape[2]
        if self._tenants is not None:  # only after the buffers were replaced
            self._tenants.leave(self)
            self._tenants = None

    def _make_writable(self, begin: int, end: int, live: int | None = None) -> None:
        """Make ``[begin, end)`` writable, by a copy if shared; the first ``live`` columns or all keep their values."""
        tenants = self._tenants
        if tenants is not None and not tenants.may_write(self, begin, end):
            self.grow(self.capacity, min(self.capacity, tenants.columns) if live is None else live)

    def append(
        self, begin: int, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put K and V into the columns from ``begin`` on, growing if needed; return the columns from ``first`` on."""
        columns = k_bhtd.shape[2]
        end = begin + columns
        if end > self.capacity:
            self.reserve(end, live=begin)
        if self._tenants is not None:
            self._make_writable(begin, end, live=begin)
        k, v = self.k, self.v  # `narrow` costs half as much as a slice, and this runs for each layer and token
        at, seen = begin - self.base, first - self.base
        k.narrow(2, at, columns).copy_(k_bhtd)
        v.narrow(2, at, columns).copy_(v_bhtd)
        return k.narrow(2, seen, end - first), v.narrow(2, seen, end - first)

    def contents(self, columns: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of the columns from ``first`` on that are held, before column ``columns``, as views."""
        held = self._held(first, columns)
        return self.k[:, :, held], self.v[:, :, held]

    def _held(self, begin: int, end: int) -> slice:
        """Return the place of the held columns among ``[begin, end)``."""
        first = max(begin - self.base, 0)
        return slice(first, max(end - self.base, first))

    def write(self, begin: int, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> None:
        """Put K and V into the columns from ``begin`` on, all of which must be held."""
        end = begin + k_bhtd.shape[2]
        self._make_writable(begin, end)
        held = self._held(begin, end)
        self.k[:, :, held] = k_bhtd
        self.v[:, :, held] = v_bhtd

    def copy(self, row: int, begin: int, end: int, source: KVBuffer, source_row: int, source_begin: int) -> None:
        """Put columns of another buffer into the columns ``[begin, end)`` of ``row``."""
        skipped = max(self.base - begin, 0)
        begin, source_begin = begin + skipped, source_begin + skipped
        if begin < end:
            self._make_writable(begin, end)
            held, columns = self._held(begin, end), source._held(source_begin, source_begin + end - begin)
            self.k[row, :, held] = source.k[source_row, :, columns]
            self.v[row, :, held] = source.v[source_row, :, columns]

    def clear(self, row: int, begin: int, end: int) -> None:
        """Zero padding columns: they are masked out, but must be finite."""
        held = self._held(begin, end)
        if held.start < held.stop:
            self._make_writable(max(begin, self.base), end)
            self.k[row, :, held] = 0
            self.v[row, :, held] = 0

    def put(self, row: int, begin: int, page: Page) -> None:
        """Put a page into the columns of ``row`` from ``begin`` on."""
        end = begin + page.k_htd.shape[1]
        self._make_writable(begin, end)
        held, skipped = self._held(begin, end), max(self.base - begin, 0)
        self.k[row, :, held] = page.k_htd[:, skipped:].to(self.device)
        self.v[row, :, held] = page.v_htd[:, skipped:].to(self.device)

    def is_host(self, spec: LayerSpec) -> bool:
        """Whether pages of ``spec`` can be read directly into this buffer."""
        return self.device.type == "cpu" and self.spec == spec

    def view(self, row: int, begin: int) -> PageView:
        """Return a view of ``row`` from column ``begin`` on, to read pages into. The buffer must be on the host."""
        return PageView.on(*self.columns(row, begin, self.capacity))

    def columns(self, row: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V ``[heads, tokens, dim]`` of the columns ``[begin, end)`` of ``row``, as views to write to."""
        self._make_writable(begin, end)
        held = self._held(begin, end)
        return self.k[row, :, held], self.v[row, :, held]

    def page(self, row: int, begin: int, end: int) -> Page:
        """Return a host copy of the columns ``[begin, end)`` of ``row``."""
        held = self._held(begin, end)
        k, v = (buffer[row, :, held].to("cpu", copy=True).contiguous() for buffer in (self.k, self.v))
        return Page(k, v)

    def select(self, rows: torch.Tensor, live: int, columns: int = 0) -> None:
        """Make row ``i`` the former row ``rows[i]``, for the columns before ``live``.

        Args:
            rows: indices, or one truth value for each row.
            live: column after the last that keeps its values.
            columns: other memory gets room for the columns before this one; 0 for the room that there was.
        """
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        in_place = len(rows) == self.rows and (self._tenants is None or self._tenants.may_write(self, 0, self.capacity))
        rows, live = rows.to(self.device), live - self.base
        if in_place:
            for buffer in (self.k, self.v):
                _select(buffer, rows, live, buffer)
            return
        room = columns - self.base if columns else self._room
        self._replace(lambda buffer: _select(buffer, rows, live, _empty(buffer, len(rows), room)))

    def close(self) -> None:
        """Leave shared buffers to the other twins."""
        if self._tenants is not None:
            self._tenants.leave(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVBuffer:
        """Copy the buffers."""
        twin = KVBuffer.__new__(KVBuffer)
        with writable_results():
            twin.spec, twin.k, twin.v, twin._room = self.spec, self.k.clone(), self.v.clone(), self._room
            twin._growth, twin.base = self._growth, self.base
        return twin


def _empty(like: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
    return empty_rows(like, rows, (like.shape[1], capacity, like.shape[3]))


def _grown(buffer: torch.Tensor, capacity: int, live: int) -> torch.Tensor:
    grown = _empty(buffer, buffer.shape[0], capacity)
    grown[:, :, :live] = buffer[:, :, :live]
    return grown


def _select(buffer: torch.Tensor, rows: torch.Tensor, live: int, target: torch.Tensor) -> torch.Tensor:
    for begin in range(0, live, _SELECTED_TOGETHER):  # in pieces: a second copy of all would need as much memory again
        columns = slice(begin, min(begin + _SELECTED_TOGETHER, live))
        target[:, :, columns] = buffer[:, :, columns].index_select(0, rows)
    return target
