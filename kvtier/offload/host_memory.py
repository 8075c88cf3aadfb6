"""Host memory for pages: a pool of large slabs, and staging buffers between files and a device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from kvtier.errors import BudgetError
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.spec import LayerSpec
from kvtier.offload.accounting import MemoryBudget
from kvtier.transfer.base import Fence

_PIECES = 3  # one is read into, one is copied from, one is in between
_PIECE_BYTES = 4 * 2**20
_SHARE = 6  # of a small budget, a sixth for each piece leaves half for pages


class StagingBuffer:
    """A few pieces of host memory, used in turn. A piece is reused after the copies that used it before."""

    def __init__(self, host_pool: HostPool, limit_bytes: int | None, devices: int = 1) -> None:
        self._host_pool = host_pool
        self._devices = devices
        self._piece_bytes = (
            _PIECE_BYTES if limit_bytes is None else min(_PIECE_BYTES, rounded_down(limit_bytes // _SHARE // devices))
        )
        self._pieces: list[torch.Tensor | None] = [None] * _PIECES
        self._users: list[Sequence[Fence]] = [()] * _PIECES
        self._turn = 0

    @property
    def reserve_bytes(self) -> int:
        """Bytes that this buffer, and the buffers of the other devices, may still have to take."""
        missing = sum(piece is None for piece in self._pieces)
        return (missing + _PIECES * (self._devices - 1)) * self._piece_bytes

    def chunks(self, first: int, last: int, token_bytes: int) -> Iterator[tuple[int, int]]:
        """Return the tokens ``[first, last)`` in steps that fit into one piece."""
        step = max(1, self._piece_bytes // token_bytes)
        return ((begin, min(begin + step, last)) for begin in range(first, last, step))

    def next(self, rows: int, tokens: int, spec: LayerSpec) -> tuple[KVBuffer, Sequence[Fence]]:
        """Return a buffer in host memory, and the fences that its first user must come after. ``used`` must follow.

        Raises:
            BudgetError: ``host_budget`` has no room for it.
        """
        nbytes = rows * tokens * spec.token_bytes
        piece = self._pieces[self._turn]
        after: Sequence[Fence] = self._users[self._turn]
        if piece is None or piece.nbytes < nbytes:
            taken = self._host_pool.take(
                max(nbytes, self._piece_bytes)
            )  # a smaller piece that it replaces is not given back
            if taken is None:
                raise BudgetError(
                    f"host_budget has no room for {_PIECES} pieces of {max(nbytes, self._piece_bytes)} bytes, through "
                    "which files reach the device; pass a larger host_budget"
                )
            piece = self._pieces[self._turn] = taken.memory
            after = taken.after
        return KVBuffer.on_bytes(piece, rows, spec, tokens), after

    def used(self, fences: Sequence[Fence]) -> None:
        """Note the uses of the last buffer from ``next``; must be called after an interrupt too."""
        self._users[self._turn] = fences
        self._turn = (self._turn + 1) % _PIECES


_SLAB_BYTES = 64 * 2**20  # pinning a few GB at once fails on many drivers; a power of two, which allocators round to
_FIRST_SLAB_BYTES = 2**20
_ALIGNMENT = 256


def rounded_down(nbytes: int) -> int:
    """Return ``nbytes`` rounded down to a power of two, so that an allocator of pinned memory wastes none."""
    return 1 << nbytes.bit_length() - 1 if nbytes >= _ALIGNMENT else 0


@dataclass(slots=True, eq=False)
class _Slab:
    memory: torch.Tensor
    begin: int = 0
    live: int = 0
    before: tuple[Fence, ...] = ()  # uses of the memory before it was last reused
    users: list[Fence] = field(default_factory=list)  # uses of the slices given back since


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """``memory``: bytes of a slab. The first write to them must come after ``after``."""

    memory: torch.Tensor
    after: tuple[Fence, ...]
    slab: _Slab


class HostPool:
    """Host memory within a budget.

    A slab is reused from its beginning when all of its slices were given back; the next use comes after the copies
    that used them. Memory is counted by slabs, not by slices.

    Args:
        make: returns the given number of bytes of host memory, pinned where that helps.
        ledger: counts and limits the bytes.
        taken: returns how many bytes ``make`` takes from the machine for the given number.
    """

    def __init__(
        self,
        make: Callable[[int], torch.Tensor],
        ledger: MemoryBudget,
        slab_bytes: int = _SLAB_BYTES,
        taken: Callable[[int], int] = int,
    ) -> None:
        self._make = make
        self._taken = taken
        self._ledger = ledger
        self._slab_bytes = slab_bytes
        self._host_pool: list[_Slab] = []
        self._given: deque[tuple[_Slab, Sequence[Fence]]] = deque()

    def take(self, nbytes: int, leave: int = 0) -> Slice | None:
        """Return ``nbytes``; None when the budget has no room for them and ``leave`` more."""
        self._collect()
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        slab = self._with_room(size) or self._fresh(size, leave)
        if slab is None:
            return None
        memory = slab.memory[slab.begin : slab.begin + nbytes]
        slab.begin += size
        slab.live += 1
        return Slice(memory, slab.before, slab)

    def _with_room(self, size: int) -> _Slab | None:
        return next((slab for slab in self._host_pool if slab.begin + size <= slab.memory.nbytes), None)

    def _fresh(self, size: int, leave: int) -> _Slab | None:
        """Return a new slab, as large as all before it: few slabs for large needs, little memory for small needs."""
        held = sum(slab.memory.nbytes for slab in self._host_pool)
        for wanted in (max(size, min(self._slab_bytes, max(held, _FIRST_SLAB_BYTES))), size):
            nbytes = self._taken(wanted)
            if not self._ledger.fits(nbytes + leave):  # empty slabs are too small, or they would have been used
                self._host_pool = [slab for slab in self._host_pool if slab.begin]
                self._count()
            if self._ledger.fits(nbytes + leave):
                slab = _Slab(self._make(nbytes))
                self._host_pool.append(slab)
                self._count()
                return slab
        return None

    def give(self, piece: Slice, users: Sequence[Fence]) -> None:
        """Take ``piece`` back, which the copies ``users`` may still be using. May be called by a garbage collector."""
        self._given.append((piece.slab, users))

    def _collect(self) -> None:
        while self._given:
            slab, users = self._given.popleft()
            slab.users.extend(users)
            slab.live -= 1
            if slab.live == 0:
                slab.begin, slab.before, slab.users = 0, tuple(slab.users), []

    def _count(self) -> None:
        self._ledger.set(id(self), sum(slab.memory.nbytes for slab in self._host_pool))
