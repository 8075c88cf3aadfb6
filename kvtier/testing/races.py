"""Races: accesses to the same memory, at least one of them a write, that nothing orders.

There is one compute stream, whose kernels run in order, one host, and any number of operations, which are ordered by
fences alone. Whether a race shows in the values depends on timing; here it is told by what is known to come before
what, so that a run that happened to go well is judged like one that did not. The rules:

R1
    a kernel touches memory that an operation writes, and compute has not waited for that operation;
R2
    a kernel writes memory that an operation reads, and compute has not waited for that operation;
R3
    an operation is enqueued that writes memory that a kernel has touched, or reads memory that a kernel has written,
    and none of the marks it comes after was taken after that kernel;
R4
    two operations touch the same bytes, one of them writes, and neither comes after the other.

A mark comes after all kernels before it, and after all that compute had waited for by then. What the host has settled
comes before everything that it enqueues later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kvtier.testing.regions import Region

_weak: Any = StorageWeakRef  # torch gives it no types


class RaceError(AssertionError):
    """Two accesses to the same memory are not ordered. ``rule`` is one of R1 to R4, see :mod:`kvtier.testing.races`."""

    def __init__(self, rule: str, what: str) -> None:
        super().__init__(f"{rule}: {what}")
        self.rule = rule


class Past(NamedTuple):
    """What is known to have ended at some point.

    Attributes:
        operations: bit *n* is set when operation *n* is among it.
        kernels: how many kernels are, counted from the first one.
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


@dataclass(slots=True, eq=False)
class _Access:
    """One tensor of one operation. Holds the tensor until compute has waited, so that its address stays taken."""

    number: int
    operation: str
    region: Region
    writes: bool
    storage: Any
    tensor: torch.Tensor | None

    def alive(self) -> bool:
        return self.tensor is not None or not self.storage.expired()


class _Log:
    """When kernels last read and wrote the regions of one storage; of each kind, the latest come last."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = _weak(storage)
        self.low = storage.data_ptr()
        self.high = self.low + storage.nbytes()
        self.reads: dict[Region, tuple[int, str]] = {}
        self.writes: dict[Region, tuple[int, str]] = {}

    def latest(self, region: Region, *, writes: bool, since: int) -> tuple[str, str] | None:
        """Return a kernel later than ``since`` that conflicts with an access to ``region``, and what it did."""
        for did, log in (("wrote", self.writes), ("read", self.reads)):
            if did == "read" and not writes:
                continue
            for touched, (time, kernel) in reversed(log.items()):
                if time <= since:
                    break
                if touched.overlaps(region):
                    return kernel, did
        return None


class Detector:
    """Knows what is ordered, and raises :class:`RaceError` at the first two accesses that are not."""

    def __init__(self) -> None:
        self.races: list[RaceError] = []
        self._operations = 0
        self._kernels = 0
        self._compute = Past()  # includes what the host has settled
        self._host = Past()
        self._accesses: list[_Access] = []  # of operations that the host has not settled
        self._open: list[_Access] = []  # of operations that compute has not waited for
        self._logs: dict[int, _Log] = {}
        self._purge_at = 256
        self._host_memory: dict[int, Any] = {}

    # The host and the fences

    def mark(self) -> Past:
        """Return the past of a mark that is taken now."""
        return Past(self._compute.operations, self._kernels)

    def waited(self, past: Past) -> None:
        """Let compute wait for a point with ``past``."""
        self._compute = self._compute.joined((past,))
        for access in self._open:
            if self._compute.has(access.number):
                access.tensor = None
        self._open = [access for access in self._open if access.tensor is not None]

    def settled(self, past: Past) -> None:
        """Let the host wait for a point with ``past``: everything that is enqueued from now on comes after it."""
        self._host = self._host.joined((past,))
        self.waited(past)
        self._accesses = [access for access in self._accesses if not self._host.has(access.number)]

    def owns(self, host: torch.Tensor) -> None:
        """Note that ``host`` is new memory of the host: what touches nothing else is work of the host."""
        storage = host.untyped_storage()
        self._host_memory[storage._cdata] = _weak(storage)

    # Operations

    def enqueue(
        self, operation: str, after: Iterable[Past], reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> Past:
        """Return the past of the fence of a new operation.

        Args:
            operation: what to call it in errors.
            after: the pasts of what it comes after.
            reads: its sources.
            writes: its targets.
        """
        number = self._operations
        before = self._host.joined(after)
        new = [
            _Access(number, operation, Region.of(tensor), written, _weak(tensor.untyped_storage()), tensor)
            for written, tensors in ((False, reads), (True, writes))
            for tensor in tensors
            if tensor.numel()
        ]
        for access in new:
            self._check_kernels(access, before)
            self._check_operations(access, before)
        self._operations += 1
        self._accesses = [old for old in self._accesses if not _replaced(old, new, before)] + new
        self._open += new
        return before.joined((Past(1 << number),))

    def _check_kernels(self, access: _Access, before: Past) -> None:
        low, high = access.region.bounds()
        for log in self._logs.values():
            if log.low >= high or low >= log.high:
                continue
            late = log.latest(access.region, writes=access.writes, since=before.kernels)
            if late is not None and not log.storage.expired():
                kernel, did = late
                does = "writes" if access.writes else "reads"
                self._race(
                    "R3",
                    f"{access.operation} {does} memory that the kernel {kernel} {did}, "
                    "and comes after no mark that was taken after that kernel",
                )

    def _check_operations(self, access: _Access, before: Past) -> None:
        for old in self._accesses:
            if (
                (access.writes or old.writes)
                and not before.has(old.number)
                and old.region.overlaps(access.region)
                and old.alive()
            ):
                does, did = ("writes" if one.writes else "reads" for one in (access, old))
                self._race(
                    "R4", f"{access.operation} {does} bytes that {old.operation} {did}, and does not come after it"
                )

    # Kernels

    def kernel(self, name: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> bool:
        """Judge a kernel that is about to run; return whether it is work of the host, on memory of the host alone."""
        touched = [
            (tensor, Region.of(tensor), written)
            for written, tensors in ((False, reads), (True, writes))
            for tensor in tensors
            if tensor.numel()
        ]
        on_host = bool(touched) and all(self._is_host(tensor) for tensor, _, _ in touched)
        for _, region, written in touched:
            for access in self._accesses if on_host else self._open:
                if (access.writes or written) and access.region.overlaps(region) and access.alive():
                    self._race_of_kernel(name, written, access, "the host has not settled" if on_host else None)
        if not on_host:
            self._kernels += 1
            for tensor, region, written in touched:
                self._touch(tensor.untyped_storage(), region, name, written=written)
        return on_host

    def produced(self, name: str, outputs: Sequence[torch.Tensor], *, on_host: bool) -> None:
        """Note the new memory that the latest kernel wrote."""
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if on_host:
                self.owns(tensor)
            else:
                self._touch(storage, Region.whole(storage), name, written=True)

    def _race_of_kernel(self, name: str, written: bool, access: _Access, why: str | None) -> None:
        does, did = ("writes" if one else "reads" for one in (written, access.writes))
        why = why or "compute has not waited for"
        self._race(
            "R1" if access.writes else "R2",
            f"the kernel {name} {does} memory that {access.operation} {did}, and {why} that operation",
        )

    def _touch(self, storage: torch.UntypedStorage, region: Region, name: str, *, written: bool) -> None:
        log = self._logs.get(storage._cdata)  # weakly referenced: no other storage can have this number meanwhile
        if log is None:
            self._purge()
            log = self._logs[storage._cdata] = _Log(storage)
        times = log.writes if written else log.reads
        times.pop(region, None)
        times[region] = (self._kernels, name)

    def _is_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._host_memory

    def _purge(self) -> None:
        if len(self._logs) + len(self._host_memory) < self._purge_at:
            return
        self._logs = {key: log for key, log in self._logs.items() if not log.storage.expired()}
        self._host_memory = {key: weak for key, weak in self._host_memory.items() if not weak.expired()}
        self._purge_at = 2 * (len(self._logs) + len(self._host_memory)) + 256

    def _race(self, rule: str, what: str) -> None:
        race = RaceError(rule, what)
        self.races.append(race)
        raise race


def _replaced(old: _Access, new: Sequence[_Access], before: Past) -> bool:
    """Whether whatever races with ``old`` from now on also races with an access that comes after it, or cannot be."""
    if not old.alive():
        return True
    return before.has(old.number) and any(one.region == old.region and (one.writes or not old.writes) for one in new)
