"""Accesses to memory by kernels and by operations, in order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kvtier.testing.simulation.regions import Region


def weak(storage: torch.UntypedStorage) -> Any:
    """Return a reference that does not keep the memory alive, but keeps the storage's number from being reused."""
    reference: Any = StorageWeakRef
    return reference(storage)


class Past(NamedTuple):
    """The operations and kernels that are known to have ended at some point.

    Attributes:
        operations: bit *n* is set when operation *n* has ended.
        kernels: how many kernels have ended, counted from the first one.
    """

    operations: int = 0
    kernels: int = 0

    def joined(self, others: Iterable[Past]) -> Past:
        """Return the past of a point that comes after this one and ``others``."""
        operations, kernels = self
        for other in others:
            operations |= other.operations
            kernels = max(kernels, other.kernels)
        return Past(operations, kernels)

    def has(self, number: int) -> bool:
        """Whether operation ``number`` has ended."""
        return bool(self.operations >> number & 1)


class KernelLog:
    """Times at which kernels last read and wrote each region."""

    def __init__(self) -> None:
        self._memory: dict[int, _Kernels] = {}
        self._purge_at = 256

    def add(self, storage: torch.UntypedStorage, region: Region, time: int, kernel: str, *, writes: bool) -> None:
        """Note that ``kernel`` touched ``region`` of ``storage``, later than any before it."""
        touched = self._memory.get(storage._cdata)
        if touched is None:
            if len(self._memory) >= self._purge_at:
                self._memory = {key: one for key, one in self._memory.items() if not one.storage.expired()}
                self._purge_at = 2 * len(self._memory) + 256
            touched = self._memory[storage._cdata] = _Kernels(storage)
        times = touched.writes if writes else touched.reads
        times.pop(region, None)
        times[region] = (time, kernel)

    def later(self, region: Region, time: int, *, writes: bool) -> tuple[str, str] | None:
        """Return name and access (``wrote``, ``read``) of a kernel after ``time`` that conflicts with ``region``."""
        low, high = region.bounds()
        for touched in self._memory.values():
            if touched.low < high and low < touched.high:
                kernel = touched.later(region, time, writes=writes)
                if kernel is not None and not touched.storage.expired():
                    return kernel
        return None


class _Kernels:
    """The accesses to one storage; of each kind, the latest come last."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = weak(storage)
        self.low, self.high = Region.whole(storage).bounds()
        self.reads: dict[Region, tuple[int, str]] = {}
        self.writes: dict[Region, tuple[int, str]] = {}

    def later(self, region: Region, time: int, *, writes: bool) -> tuple[str, str] | None:
        for did, times in (("wrote", self.writes), ("read", self.reads)):
            for touched, (then, kernel) in reversed(times.items()):
                if then <= time or (did == "read" and not writes):
                    break
                if touched.overlaps(region):
                    return kernel, did
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Access:
    """One tensor of one operation."""

    number: int
    operation: str
    region: Region
    writes: bool


class OperationLog:
    """The accesses of operations, as far as later accesses may still race with them."""

    def __init__(self) -> None:
        self._memory: dict[int, _Operations] = {}
        self._purge_at = 256

    def add(self, storage: torch.UntypedStorage, access: Access, before: Past) -> None:
        """Note an access of an operation with the past ``before``.

        It replaces earlier accesses that it comes after, where every access that races with them races with it too.
        """
        touched = self._memory.get(storage._cdata)
        if touched is None:
            if len(self._memory) >= self._purge_at:
                self._memory = {key: one for key, one in self._memory.items() if not one.storage.expired()}
                self._purge_at = 2 * len(self._memory) + 256
            touched = self._memory[storage._cdata] = _Operations(storage)
        same = touched.accesses.get(access.region, [])
        touched.accesses[access.region] = [
            old for old in same if not before.has(old.number) or (old.writes and not access.writes)
        ] + [access]

    def unordered(self, region: Region, past: Past, *, writes: bool) -> Access | None:
        """Return a conflicting access of an operation that is not in ``past``."""
        low, high = region.bounds()
        for touched in self._memory.values():
            if touched.low < high and low < touched.high and not touched.storage.expired():
                for other, accesses in touched.accesses.items():
                    for access in accesses:
                        if (writes or access.writes) and not past.has(access.number) and other.overlaps(region):
                            return access
        return None

    def forget(self, past: Past) -> None:
        """Drop the accesses that all later accesses come after."""
        for touched in self._memory.values():
            touched.forget(past)


class _Operations:
    """The accesses to one storage."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = weak(storage)
        self.low, self.high = Region.whole(storage).bounds()
        self.accesses: dict[Region, list[Access]] = {}

    def forget(self, past: Past) -> None:
        for region, accesses in list(self.accesses.items()):
            left = [access for access in accesses if not past.has(access.number)]
            if left:
                self.accesses[region] = left
            else:
                del self.accesses[region]
