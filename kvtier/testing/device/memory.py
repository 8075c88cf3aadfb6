"""Memory of the test device: a caching allocator that poisons, counts, and reuses as early as it may."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtier.testing.device.dlpack import Capsules

_ROUND_BYTES = 512  # as CUDA's caching allocator rounds
_CACHED_BYTES = 2**26  # free blocks beyond this are given back
_POISON = 0xFF  # NaN in every floating point type

Passed = Callable[[], bool]
"""Whether the work of other streams on a block has ended."""


@dataclass(eq=False)
class Block:
    """Memory of one allocation.

    Attributes:
        memory: the bytes. Alive as long as anything may still touch them.
        storage: a storage over these bytes that belongs to this allocation alone.
        stream: number of the stream that was current when it was allocated.
        used_by: numbers of the other streams that were recorded with it.
    """

    memory: torch.Tensor
    storage: torch.UntypedStorage
    stream: int
    used_by: set[int] = field(default_factory=set)

    @property
    def nbytes(self) -> int:
        """Bytes, rounded."""
        return self.memory.nbytes


class Allocator:
    """Blocks of host memory for tensors of the device.

    A freed block is reused first, at once for the stream that allocated it: work that another stream has queued finds
    poison there, or writes into another tensor. Blocks recorded with other streams wait for what these had queued.

    Attributes:
        peak: the most bytes held after an allocation since ``reset_peak``.
    """

    def __init__(self, fence: Callable[[Sequence[int]], Passed]) -> None:
        self.peak = 0
        self._fence = fence
        self._live: dict[int, Block] = {}  # by address
        self._capsules = Capsules()
        self._waiting: list[tuple[Block, Passed]] = []
        self._cached: defaultdict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)  # by size and stream
        self._cached_bytes = 0
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes of live blocks, and of freed blocks that other streams may still use."""
        self._take_freed()
        return self._held

    @property
    def reserved(self) -> int:
        """Bytes of all blocks, cached ones included."""
        return self.held + self._cached_bytes

    def reset_peak(self) -> None:
        """Begin a new peak at what is held now."""
        self.peak = self.held

    def bytes(self, nbytes: int, stream: int) -> torch.Tensor:
        """Return poisoned bytes on the device, as ``[nbytes]`` of ``uint8``."""
        self._take_freed()
        rounded = max(1, -(-nbytes // _ROUND_BYTES)) * _ROUND_BYTES
        cached = self._cached[rounded, stream]
        if cached:
            memory = cached.pop()
            self._cached_bytes -= rounded
        else:
            with torch.inference_mode(False):  # it is poisoned and used again in any mode
                memory = poisoned(rounded)
        address = memory.data_ptr()
        make: Any = torch._C
        storage = make._construct_storage_from_data_pointer(address, torch.device("cpu"), rounded)
        self._live[address] = Block(memory, storage, stream)
        self._held += rounded
        self.peak = max(self.peak, self._held)
        return self._capsules.bytes_at(address, nbytes)

    def block(self, tensor: torch.Tensor) -> Block:
        """Return the block of a tensor of the device that has bytes."""
        return self._live[tensor.untyped_storage().data_ptr()]

    def _take_freed(self) -> None:
        for address in self._capsules.gone():
            block = self._live.pop(address)
            if block.used_by:
                self._waiting.append((block, self._fence(sorted(block.used_by))))
            else:
                self._release(block)
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for block, passed in waiting:
                if passed():
                    self._release(block)
                else:
                    self._waiting.append((block, passed))

    def _release(self, block: Block) -> None:
        self._held -= block.nbytes
        block.memory.fill_(_POISON)
        if self._cached_bytes + block.nbytes <= _CACHED_BYTES:
            self._cached[block.nbytes, block.stream].append(block.memory)
            self._cached_bytes += block.nbytes


def poisoned(nbytes: int) -> torch.Tensor:
    """Return ``nbytes`` of poisoned host memory."""
    return torch.full((nbytes,), _POISON, dtype=torch.uint8, device="cpu")
