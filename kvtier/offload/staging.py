"""Staging: a little host memory through which files and a device exchange pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kvtier.errors import BudgetError
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.spec import LayerSpec
from kvtier.offload.host_memory import HostPool, aligned_down
from kvtier.transfer import Fence

_PIECES = 3  # one is read into, one is copied from, one is between
_PIECE_BYTES = 4 * 2**20
_SHARE = 6  # of a small budget, a sixth for each piece leaves half for pages


class StagingBuffer:
    """A few pieces of host memory in turn. Each is used again after the copies that used it before."""

    def __init__(self, slabs: HostPool, limit_bytes: int | None, devices: int = 1) -> None:
        self._slabs = slabs
        self._devices = devices
        self._piece_bytes = (
            _PIECE_BYTES if limit_bytes is None else min(_PIECE_BYTES, aligned_down(limit_bytes // _SHARE // devices))
        )
        self._pieces: list[torch.Tensor | None] = [None] * _PIECES
        self._users: list[Sequence[Fence]] = [()] * _PIECES
        self._turn = 0

    @property
    def reserve_bytes(self) -> int:
        """Bytes that it, and as many of the same on other devices, may still have to take."""
        missing = sum(piece is None for piece in self._pieces)
        return (missing + _PIECES * (self._devices - 1)) * self._piece_bytes

    def chunks(self, first: int, last: int, token_bytes: int) -> Iterator[tuple[int, int]]:
        """Return the tokens ``[first, last)`` in steps that fit into one piece."""
        step = max(1, self._piece_bytes // token_bytes)
        return ((begin, min(begin + step, last)) for begin in range(first, last, step))

    def next(self, rows: int, tokens: int, geometry: LayerSpec) -> tuple[KVBuffer, Sequence[Fence]]:
        """Return a window on host memory, and what its first user must come after. ``used`` must follow.

        Raises:
            BudgetError: ``host_budget`` has no room for it.
        """
        nbytes = rows * tokens * geometry.token_bytes
        piece = self._pieces[self._turn]
        after: Sequence[Fence] = self._users[self._turn]
        if piece is None or piece.nbytes < nbytes:
            taken = self._slabs.take(max(nbytes, self._piece_bytes))  # a smaller one that it replaces is not given back
            if taken is None:
                raise BudgetError(
                    f"host_budget has no room for {_PIECES} pieces of {max(nbytes, self._piece_bytes)} bytes, through "
                    "which files reach the device; pass a larger host_budget"
                )
            piece = self._pieces[self._turn] = taken.memory
            after = taken.after
        return KVBuffer.on_bytes(piece, rows, geometry, tokens), after

    def used(self, fences: Sequence[Fence]) -> None:
        """Note who uses the window that ``next`` returned last; also when an interrupt came in between."""
        self._users[self._turn] = fences
        self._turn = (self._turn + 1) % _PIECES
