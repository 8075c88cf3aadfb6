"""Bytes of a tensor as 64-bit sums of blocks of 2 KiB, and SHA-256 over these.

Only tensors whose bytes lie in ordinary memory in a known form are read. ``why_unreadable`` gives the reason for all
other tensors, before a PyTorch operation can fail on them or crash the process.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvtier.hf.identity.weights.block_sums import (
    BLOCK_BYTES,
    BLOCK_WORDS,
    FACTORS,
    WORD_BYTES,
    Sums,
    all_block_sums,
    block_sums,
)

_SMALL_BYTES = 16 * 1024
# An expanded tensor is copied to be read: up to this size.
_REPEATED_BYTES = 64 * 1024 * 1024
# On an accelerator, the products of so many blocks exist at a time.
_DEVICE_BLOCKS_AT_ONCE = 64 * 1024 * 1024 // BLOCK_BYTES
# Sums and tails that are fetched from an accelerator together.
_FETCHED_BYTES = 64 * 1024 * 1024
# On a CPU, gathered blocks stay in the cache until they are summed up.
_BLOCKS_AT_ONCE = 256


class Values(NamedTuple):
    """Digest and summary of a tensor's bytes: all bytes of a small tensor, 8 bytes per 2 KiB of a large one."""

    digest: bytes
    sums: Sums
    tail: bytes
    """The bytes after the last whole block; of a small tensor, all bytes."""


def why_unreadable(tensor: torch.Tensor) -> str | None:
    """Return why the bytes of ``tensor`` cannot be read, or do not determine its values; else None."""
    if tensor.is_nested:
        return "it is a nested tensor"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}"
    if tensor.is_quantized:
        return f"its dtype is {tensor.dtype}, whose scales are kept apart"
    if tensor._is_zerotensor():
        return "it is a zero tensor without memory"
    storage = tensor.untyped_storage()
    if storage.device.type == "meta":  # of fake tensors, too
        return "it is on the meta device, without values"
    if storage.nbytes() < _extent_bytes(tensor):
        return "its memory was released"
    if storage.device.type == "cpu" and tensor.numel() and not tensor.data_ptr():
        return "it has no memory of its own"
    if tensor.nbytes > max(storage.nbytes(), _REPEATED_BYTES):
        return f"it repeats {storage.nbytes()} bytes to {tensor.nbytes}"
    return None


class UnreadableError(Exception):
    """The tensor at ``index`` does not offer its bytes, for the reason ``cause``."""

    def __init__(self, index: int, cause: Exception) -> None:
        super().__init__(index, cause)
        self.index, self.cause = index, cause


def read_values(tensors: Sequence[torch.Tensor]) -> list[Values]:
    """Read all bytes of readable tensors, in the order of their elements.

    Sums of tensors on an accelerator are fetched together: a transfer for each would wait for the device each time.

    Raises:
        UnreadableError: an error of any kind, from a subclass of tensors.
    """
    found: list[Values | None] = [None] * len(tensors)
    waiting: dict[torch.device, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    in_memory: list[tuple[int, torch.Tensor]] = []
    for index, tensor in enumerate(tensors):
        try:
            data = byte_view(tensor)
            if is_host(data.device):
                if data.data_ptr() == tensor.data_ptr() and data.data_ptr() % WORD_BYTES == 0:
                    in_memory.append((index, data))
                else:  # a copy is read at once: all of them together might not fit into memory
                    found[index] = _host_values(data)
                continue
            done = _summed_bytes(data)
            aligned = data if data.data_ptr() % WORD_BYTES == 0 else data.clone()
            of_device = waiting.setdefault(data.device, [])
            of_device.append((index, _device_sums(aligned[:done]), data[done:]))
            if sum(sums.nbytes + tail.numel() for _, sums, tail in of_device) > _FETCHED_BYTES:
                _fetch(waiting.pop(data.device), found)
        except Exception as error:
            raise UnreadableError(index, error) from error
    for of_device in waiting.values():
        _fetch(of_device, found)
    wholes = [memory(data.data_ptr(), data.numel()) for _, data in in_memory]
    sizes = [_summed_bytes(data) for _, data in in_memory]
    all_sums = all_block_sums([whole[:size] for whole, size in zip(wholes, sizes, strict=True)])
    for (index, _), whole, size, sums in zip(in_memory, wholes, sizes, all_sums, strict=True):
        found[index] = _values(sums, whole[size:].tobytes())
    return [values for values in found if values is not None]


def _fetch(waiting: Sequence[tuple[int, torch.Tensor, torch.Tensor]], found: list[Values | None]) -> None:
    """Fetch the sums and tails of tensors of one device with one transfer."""
    parts = [part for _, sums, tail in waiting for part in (sums.view(torch.uint8), tail)]
    fetched = torch.cat(parts).cpu().numpy()
    at = 0
    for index, sums, tail in waiting:
        middle, end = at + sums.nbytes, at + sums.nbytes + tail.numel()
        found[index] = _values(fetched[at:middle].copy().view(np.int64), fetched[middle:end].tobytes())
        at = end


def _host_values(data: torch.Tensor) -> Values:
    done = _summed_bytes(data)
    host = memory(data.data_ptr(), data.numel())
    aligned = host if data.data_ptr() % WORD_BYTES == 0 else host.copy()
    return _values(block_sums(aligned[:done]), host[done:].tobytes())


def _summed_bytes(data: torch.Tensor) -> int:
    return data.numel() // BLOCK_BYTES * BLOCK_BYTES if data.numel() > _SMALL_BYTES else 0


def _values(sums: Sums, tail: bytes) -> Values:
    digest = hashlib.sha256(sums)
    digest.update(tail)
    return Values(digest.digest(), sums, tail)


def is_host(device: torch.device) -> bool:
    """Whether tensors of ``device`` lie in main memory."""
    return device.type == "cpu"


def memory(address: int, size_bytes: int) -> npt.NDArray[np.uint8]:
    """Return a read-only view of main memory from ``address`` on: uint8 ``[size_bytes]``. The caller keeps it alive.

    ``Tensor.numpy`` would forbid any later resizing of the storage.
    """
    if not size_bytes:  # whose address may be 0, which NumPy before 2.3 refuses
        return np.empty(0, dtype=np.uint8)
    view: npt.NDArray[np.uint8] = np.asarray(_Memory(address, size_bytes))
    return view


class _Memory:
    def __init__(self, address: int, size_bytes: int) -> None:
        self.__array_interface__: dict[str, Any] = {
            "data": (address, True),
            "shape": (size_bytes,),
            "typestr": "|u1",
            "version": 3,
        }


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a readable tensor as uint8 ``[bytes]``: a view where it is contiguous."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def rows_differ(table: torch.Tensor, values: Values, rows: npt.ArrayLike) -> bool:
    """Whether any byte of the blocks that hold ``rows`` of a contiguous ``table`` differs from ``values``.

    Args:
        table: ``[rows, …]``.
        values: the result of ``read_values`` for the table.
        rows: row indices; indices out of range are left out.
    """
    row_bytes = table[:1].numel() * table.element_size()
    chosen = np.asarray(rows, dtype=np.int64)
    chosen = _distinct(chosen[(chosen >= 0) & (chosen < len(table))], len(table))
    if row_bytes == 0 or len(chosen) == 0:
        return False
    data = byte_view(table)
    begins, ends = chosen * row_bytes // BLOCK_BYTES, ((chosen + 1) * row_bytes - 1) // BLOCK_BYTES
    reach = np.arange(int((ends - begins).max()) + 1)
    blocks = _distinct(np.minimum(begins[:, None] + reach, ends[:, None]), int(ends.max()) + 1)
    whole = blocks[blocks < len(values.sums)]
    done = len(values.sums) * BLOCK_BYTES
    if data.device.type == "cpu":
        host = memory(data.data_ptr(), data.numel())
        if len(whole) < len(blocks) and host[done:].tobytes() != values.tail:
            return True
        rows_of_blocks = host[:done].reshape(-1, BLOCK_BYTES)
        for begin in range(0, len(whole), _BLOCKS_AT_ONCE):
            some = whole[begin : begin + _BLOCKS_AT_ONCE]
            if (block_sums(rows_of_blocks.take(some, axis=0)) != values.sums[some]).any():
                return True
        return False
    if len(whole) < len(blocks) and data[done:].cpu().numpy().tobytes() != values.tail:
        return True
    gathered = data[:done].view(-1, BLOCK_BYTES).index_select(0, torch.from_numpy(whole).to(data.device))
    return bool((_device_sums(gathered).cpu().numpy() != values.sums[whole]).any())


def _distinct(indices: npt.NDArray[np.int64], below: int) -> npt.NDArray[np.int64]:
    """Return the different values of ``indices``, all smaller than ``below``, in order.

    The first call of ``np.unique`` in a process imports masked arrays, which takes 10 ms.
    """
    seen = np.zeros(below, dtype=np.bool_)
    seen[indices] = True
    return np.flatnonzero(seen)


def _extent_bytes(tensor: torch.Tensor) -> int:
    """Return how many bytes of its storage a strided tensor reaches into."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


@functools.lru_cache(maxsize=64)
def _factors_on(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(FACTORS).to(device)


def _device_sums(data: torch.Tensor) -> torch.Tensor:
    """Return the same sums for bytes on an accelerator, or on any device, where they stay."""
    blocks = data.view(torch.int64).view(-1, BLOCK_WORDS)
    factors = _factors_on(blocks.device)
    begins = range(0, len(blocks), _DEVICE_BLOCKS_AT_ONCE)
    parts = [(blocks[begin : begin + _DEVICE_BLOCKS_AT_ONCE] * factors).sum(dim=1) for begin in begins]
    return torch.cat([blocks.new_empty(0), *parts])
