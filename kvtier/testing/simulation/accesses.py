"""Accesses to memory by kernels and by operations, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kvtier.testing.simulation.regions import Region

V = TypeVar("V")


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


@dataclass(slots=True)
class _Touched(Generic[V]):
    """The regions of one storage, with the addresses that it spans."""

    storage: Any
    low: int
    high: int
    regions: dict[Region, V] = field(default_factory=dict)


class _ByStorage(Generic[V]):
    """What was done to each region of each storage. Storages that are gone are dropped as their number grows."""

    def __init__(self) -> None:
        self._memory: dict[int, _Touched[V]] = {}
        self._purge_at = 256

    def of(self, storage: torch.UntypedStorage) -> dict[Region, V]:
        """Return the regions of ``storage``, to read and to change."""
        touched = self._memory.get(storage._cdata)
        if touched is None:
            if len(self._memory) >= self._purge_at:
                self._memory = {key: one for key, one in self._memory.items() if not one.storage.expired()}
                self._purge_at = 2 * len(self._memory) + 256
            touched = self._memory[storage._cdata] = _Touched(weak(storage), *Region.whole(storage).bounds())
        return touched.regions

    def near(self, region: Region) -> Iterator[dict[Region, V]]:
        """Yield the regions of each storage, not gone, that may overlap ``region``."""
        low, high = region.bounds()
        for touched in self._memory.values():
            if touched.low < high and low < touched.high and not touched.storage.expired():
                yield touched.regions

    def __iter__(self) -> Iterator[dict[Region, V]]:
        return (touched.regions for touched in self._memory.values())


class KernelLog:
    """Times at which kernels last read and wrote each region; of each kind, the latest come last."""

    def __init__(self) -> None:
        self._reads = _ByStorage[tuple[int, str]]()
        self._writes = _ByStorage[tuple[int, str]]()

    def add(self, storage: torch.UntypedStorage, region: Region, time: int, kernel: str, *, writes: bool) -> None:
        """Note that ``kernel`` touched ``region`` of ``storage``, later than any before it."""
        times = (self._writes if writes else self._reads).of(storage)
        times.pop(region, None)
        times[region] = (time, kernel)

    def later(self, region: Region, time: int, *, writes: bool) -> tuple[str, str] | None:
        """Return name and access (``wrote``, ``read``) of a kernel after ``time`` that conflicts with ``region``."""
        conflicting = {"wrote": self._writes, "read": self._reads} if writes else {"wrote": self._writes}
        for did, log in conflicting.items():
            for times in log.near(region):
                for touched, (then, kernel) in reversed(times.items()):
                    if then <= time:
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
        self._accesses = _ByStorage[list[Access]]()

    def add(self, storage: torch.UntypedStorage, access: Access, before: Past) -> None:
        """Note an access of an operation with the past ``before``.

        It replaces earlier accesses that it comes after, where every access that races with them races with it too.
        """
        touched = self._accesses.of(storage)
        touched[access.region] = [
            old
            for old in touched.get(access.region, [])
            if not before.has(old.number) or (old.writes and not access.writes)
        ] + [access]

    def unordered(self, region: Region, past: Past, *, writes: bool) -> Access | None:
        """Return a conflicting access of an operation that is not in ``past``."""
        for touched in self._accesses.near(region):
            for other, accesses in touched.items():
                for access in accesses:
                    if (writes or access.writes) and not past.has(access.number) and other.overlaps(region):
                        return access
        return None

    def forget(self, past: Past) -> None:
        """Drop the accesses that all later accesses come after."""
        for touched in self._accesses:
            for region, accesses in list(touched.items()):
                left = [access for access in accesses if not past.has(access.number)]
                if left:
                    touched[region] = left
                else:
                    del touched[region]
