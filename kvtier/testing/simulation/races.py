"""Races: unordered accesses to the same memory, at least one of them a write.

There is one compute stream, whose kernels run in order, one host, and any number of operations, which are ordered by
fences alone. Whether a race shows in the values depends on timing. The detector judges by the known order instead, so
that a run that happened to go well is judged like a run that failed. The rules:

R1
    a kernel touches memory that an operation writes, and compute has not waited for that operation;
R2
    a kernel writes memory that an operation reads, and compute has not waited for that operation;
R3
    an operation is enqueued that writes memory that a kernel has touched, or reads memory that a kernel has written,
    and none of the marks it comes after was taken after that kernel;
R4
    two operations touch the same bytes, one of them writes, and neither comes after the other.

A mark comes after all kernels before it, and after all operations that compute had waited for by then. Operations that
the host has settled come before everything that it enqueues later.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvtier.testing.simulation.accesses import Access, KernelLog, OperationLog, Past, weak
from kvtier.testing.simulation.regions import Region

_HERE = str(Path(__file__).parent)


class Site(NamedTuple):
    """A line that calls an engine. A call that spans lines has the line that the interpreter reports for it."""

    file: str
    line: int
    function: str = ""

    @classmethod
    def of_caller(cls) -> Site:
        """Return the innermost line that is being executed outside this package."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
            frame = frame.f_back
        return cls(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)

    def __str__(self) -> str:
        path = Path(self.file)
        return f"{path.parent.name}/{path.name}:{self.line}"


class RaceError(AssertionError):
    """Two accesses to the same memory are not ordered. ``rule`` is one of R1 to R4, see above."""

    def __init__(self, rule: str, what: str) -> None:
        super().__init__(f"{rule}: {what}")
        self.rule = rule


class Detector:
    """Tracks the known order, and raises :class:`RaceError` at the first two unordered accesses.

    Attributes:
        races: all errors that were raised.
    """

    def __init__(self) -> None:
        self.races: list[RaceError] = []
        self._time = 0  # kernels so far
        self._number = 0  # operations so far
        self._compute = Past()  # operations that compute has waited for, or the host has settled
        self._host = Past()
        self._kernels = KernelLog()
        self._operations = OperationLog()
        # Tensors of operations that compute has not waited for: while these run, their memory must not be reused.
        self._held: dict[int, tuple[torch.Tensor, ...]] = {}
        self._host_memory: dict[int, Any] = {}

    # The host and the fences

    def mark(self) -> Past:
        """Return the past of a mark that is taken now."""
        return Past(self._compute.operations, self._time)

    def waited(self, past: Past) -> None:
        """Note that compute waits for a point with ``past``."""
        self._compute = self._compute.joined((past,))
        for number in [number for number in self._held if self._compute.has(number)]:
            del self._held[number]

    def settled(self, past: Past) -> None:
        """Note that the host waits for a point with ``past``: everything enqueued from now on comes after it."""
        self._host = self._host.joined((past,))
        self._operations.forget(past)
        self.waited(past)

    def owns(self, host: torch.Tensor) -> None:
        """Note that ``host`` is new memory of the host: a kernel on host memory alone is work of the host."""
        storage = host.untyped_storage()
        self._host_memory = {key: memory for key, memory in self._host_memory.items() if not memory.expired()}
        self._host_memory[storage._cdata] = weak(storage)

    # Operations

    def enqueue(
        self, operation: str, after: Iterable[Past], reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> Past:
        """Judge a new operation; return the past of its fence.

        Args:
            operation: its name in errors.
            after: the pasts of the fences that it comes after.
            reads: its sources.
            writes: its targets.
        """
        number, before = self._number, self._host.joined(after)
        touched = [
            (tensor.untyped_storage(), Access(number, operation, region, written))
            for tensor, region, written in _touched(reads, writes)
        ]
        for _, access in touched:
            self._judge(access, before)
        self._number += 1
        for storage, access in touched:
            self._operations.add(storage, access, before)
        self._held[number] = (*reads, *writes)
        return before.joined((Past(1 << number),))

    def _judge(self, access: Access, before: Past) -> None:
        does = "writes" if access.writes else "reads"
        late = self._kernels.later(access.region, before.kernels, writes=access.writes)
        if late is not None:
            kernel, did = late
            self._race(
                "R3",
                f"{access.operation} {does} memory that the kernel {kernel} {did}, "
                "and comes after no mark that was taken after that kernel",
            )
        other = self._operations.unordered(access.region, before, writes=access.writes)
        if other is not None:
            did = "writes" if other.writes else "reads"
            self._race("R4", f"{access.operation} {does} bytes that {other.operation} {did}, and is not after it")

    # Kernels

    def kernel(self, name: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> bool:
        """Judge a kernel that is about to run; return whether it is work of the host, on memory of the host alone."""
        touched = _touched(reads, writes)
        on_host = bool(touched) and all(
            tensor.untyped_storage()._cdata in self._host_memory for tensor, _, _ in touched
        )
        who, past = ("the host", self._host) if on_host else ("compute", self._compute)
        if on_host or self._held:
            for _, region, written in touched:
                access = self._operations.unordered(region, past, writes=written)
                if access is not None:
                    does, did = ("writes" if one else "reads" for one in (written, access.writes))
                    self._race(
                        "R1" if access.writes else "R2",
                        f"the kernel {name} {does} memory that {access.operation} {did}, "
                        f"and {who} has not waited for that operation",
                    )
        if not on_host:
            self._time += 1
            for tensor, region, written in touched:
                self._kernels.add(tensor.untyped_storage(), region, self._time, name, writes=written)
        return on_host

    def produced(self, name: str, outputs: Sequence[torch.Tensor], *, on_host: bool) -> None:
        """Note the new memory that the latest kernel wrote."""
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if on_host:
                self.owns(tensor)
            else:
                self._kernels.add(storage, Region.whole(storage), self._time, name, writes=True)

    def _race(self, rule: str, what: str) -> None:
        race = RaceError(rule, what)
        self.races.append(race)
        raise race


def _touched(reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, Region, bool]]:
    """Return all tensors that have bytes, their regions, and whether they are written."""
    return [
        (tensor, Region.of(tensor), written)
        for written, tensors in ((False, reads), (True, writes))
        for tensor in tensors
        if tensor.numel()
    ]
