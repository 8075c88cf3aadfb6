"""SimulatedEngine: an accelerator on which every order that the fences allow may happen."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from kvtier.testing.simulation.accesses import Past
from kvtier.testing.simulation.kernels import Watch
from kvtier.testing.simulation.races import Detector, Site
from kvtier.testing.simulation.regions import Region
from kvtier.transfer.base import Fence, Pair, Task, copy_pairs

Fail = Callable[[str, int], None]


class SimulatedEngine:
    """A copy engine for tests: everything that the contract leaves open goes wrong here sooner or later.

    - Each call may run any of the operations whose fences have passed, in any order. ``wait`` and ``settle`` run all
      operations that their fence depends on. Everything happens in the caller's thread.
    - From when an operation may begin until it runs, its targets hold bytes of ones: NaN in every floating point type.
    - Its sources are read when it runs.
    - Unordered operations raise :class:`~kvtier.testing.RaceError` when the second one is enqueued. Inside
      :meth:`watching`, so do unordered operations and kernels.

    ``close`` runs pending operations, but no code may rely on that order: an accelerator's streams go on by themselves.

    Args:
        choices: decides which operations run when; a seeded ``random.Random``, or hypothesis' ``st.randoms()``.
        lazy: run operations only when a ``wait``, ``settle`` or ``close`` forces them.
        device_is_host: the value to report. If false, memory of :meth:`host_empty` is host memory and all other memory
            is the device's: kernels on host memory alone are work of the host, for which only ``settle`` is a wait.
        fail: called as ``fail(step, ordinal)``; may raise. In the steps ``enqueue``, ``mark``, ``wait`` and ``settle``
            the error reaches the caller, before anything was done; they are numbered together from 0. ``copy`` and
            ``call`` are steps of running operations: the operation fails; its ordinal is that of its enqueue step.

    Attributes:
        copies: copies enqueued so far.
        bytes_copied: their bytes.
        calls: host tasks enqueued so far.
    """

    def __init__(
        self,
        choices: random.Random | None = None,
        *,
        lazy: bool = False,
        device_is_host: bool = False,
        fail: Fail | None = None,
    ) -> None:
        self.device_is_host = device_is_host
        self.copies = 0
        self.bytes_copied = 0
        self.calls = 0
        self._choices = choices or random.Random(0)
        self._lazy = lazy
        self._fail = fail or (lambda step, ordinal: None)
        self._detector = Detector()
        self._steps = 0
        self._pending: list[_Operation] = []
        self._busy = False

    @property
    def pending(self) -> int:
        """Operations that have not run."""
        return len(self._pending)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the kernels that this thread runs. A race that the code inside swallowed is raised at the end."""
        with Watch(self._detector, lambda: self._busy):
            yield
        if self._detector.races:
            raise self._detector.races[0]

    # The contract of an engine

    def copy(self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Fence] = ()) -> Fence:
        """Enqueue a copy. Raises ``ValueError`` if shapes or dtypes differ: not every engine converts."""
        return self.copy_all([(dst, src)], after)

    def copy_all(self, pairs: Sequence[Pair], after: Sequence[Fence] = ()) -> Fence:
        """Enqueue copies as one operation."""
        for dst, src in pairs:
            if dst.shape != src.shape or dst.dtype != src.dtype:
                raise ValueError(
                    f"dst is {dst.dtype} {list(dst.shape)}, src {src.dtype} {list(src.shape)}: must be equal"
                )

        def task() -> None:
            with torch.inference_mode():
                copy_pairs(pairs)

        fence = self._enqueue("copy", task, [src for _, src in pairs], [dst for dst, _ in pairs], after)
        self.copies += 1
        self.bytes_copied += sum(dst.nbytes for dst, _ in pairs)
        return fence

    def call(
        self,
        task: Task,
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        after: Sequence[Fence] = (),
    ) -> Fence:
        """Enqueue a task."""
        fence = self._enqueue("call", task, reads, writes, after)
        self.calls += 1
        return fence

    def mark(self) -> Fence:
        """Return a fence after all kernels so far."""
        self._step("mark")
        self._run_some()
        return _Mark(self, self._detector.mark())

    def wait(self, fence: Fence) -> None:
        """Run all operations that ``fence`` depends on; note that compute has waited."""
        self._step("wait")
        self._finish(fence, self._detector.waited)

    def settle(self, fence: Fence) -> None:
        """Run all operations that ``fence`` depends on; note that the host has waited."""
        self._step("settle")
        self._finish(fence, self._detector.settled)

    def host_empty(self, nbytes: int) -> torch.Tensor:
        """Return memory of the host, poisoned."""
        with self._unwatched():
            memory = torch.full((nbytes,), 0xFF, dtype=torch.uint8, device="cpu")
        if not self.device_is_host:
            self._detector.owns(memory)
        return memory

    def host_nbytes(self, nbytes: int) -> int:
        """Return ``nbytes`` rounded up to a power of two, as for pinned memory."""
        return nbytes if self.device_is_host or not nbytes else 1 << (nbytes - 1).bit_length()

    def close(self) -> None:
        """Run pending operations; errors stay in the fences."""
        while self._pending:
            self._run_one_of(self._pending)

    # Scheduling

    def _step(self, step: str) -> int:
        ordinal = self._steps
        self._steps += 1
        self._fail(step, ordinal)
        return ordinal

    def _enqueue(
        self,
        kind: str,
        task: Task,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        after: Sequence[Fence],
    ) -> _Operation:
        ordinal = self._step("enqueue")
        fences = [self._own(fence) for fence in after]
        name = f"{kind} #{ordinal} ({Site.of_caller()})"
        with self._unwatched():
            past = self._detector.enqueue(name, [fence.past for fence in fences], reads, writes)
            sources, targets = [[Region.of(tensor) for tensor in tensors] for tensors in (reads, writes)]
            before = [*(fence for fence in fences if isinstance(fence, _Operation))]
            operation = _Operation(self, past, kind, ordinal, task, tuple(writes), sources, targets, before)
            self._pending.append(operation)
            self._poison()
        self._run_some()
        return operation

    def _own(self, fence: Fence) -> _Mark | _Operation:
        if not isinstance(fence, (_Mark, _Operation)) or fence.engine is not self:
            raise ValueError(f"{fence!r} is no fence of this engine")
        return fence

    def _run_some(self) -> None:
        if self._lazy:
            return
        while self._pending and self._choices.randrange(2):
            self._run_one_of(self._pending)

    def _run_one_of(self, operations: Sequence[_Operation]) -> None:
        ready = [operation for operation in operations if operation.is_ready()]
        self._run(ready[self._choices.randrange(len(ready))])

    def _finish(self, fence: Fence, tell: Callable[[Past], None]) -> None:
        last = self._own(fence)
        if isinstance(last, _Operation):
            needed = last.unfinished()
            while not last.ended:
                self._run_one_of(needed)
                needed = [operation for operation in needed if not operation.ended]
            if last.error is not None:
                tell(Past(last.number_bit))  # it has ended; operations before it need not have
                raise last.error
        tell(last.past)
        self._run_some()

    def _run(self, operation: _Operation) -> None:
        with self._unwatched():
            operation.run(self._fail)
            self._pending.remove(operation)
            self._poison()

    def _poison(self) -> None:
        """Poison the targets of operations that may have begun: no earlier pending operation uses that memory."""
        for index, operation in enumerate(self._pending):
            if not operation.poisoned and not any(earlier.shares_with(operation) for earlier in self._pending[:index]):
                operation.poison()

    @contextlib.contextmanager
    def _unwatched(self) -> Iterator[None]:
        busy, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = busy


@dataclass(eq=False, repr=False)
class _Mark:
    """A point on the compute stream."""

    engine: SimulatedEngine
    past: Past


@dataclass(eq=False, repr=False)
class _Operation:
    """A copy or a task, and its fence."""

    engine: SimulatedEngine
    past: Past
    kind: str
    ordinal: int
    task: Task | None
    writes: Sequence[torch.Tensor]
    sources: Sequence[Region]
    targets: Sequence[Region]
    after: Sequence[_Operation]
    poisoned: bool = False
    ended: bool = False
    error: BaseException | None = None

    @property
    def number_bit(self) -> int:
        """Its bit in a past: the highest bit of its own past."""
        return 1 << self.past.operations.bit_length() - 1

    def is_ready(self) -> bool:
        """Whether it may run now, or fail because an operation before it has failed."""
        return all(before.ended for before in self.after) or any(before.error is not None for before in self.after)

    def unfinished(self) -> list[_Operation]:
        """Return the operations that must run before this one is done, itself included."""
        found, queue = {self: None}, [self]
        while queue:
            for before in queue.pop().after:
                if before not in found:
                    found[before] = None
                    queue.append(before)
        return [operation for operation in found if not operation.ended]

    def shares_with(self, later: _Operation) -> bool:
        """Whether it uses memory that ``later`` writes."""
        return any(ours.overlaps(target) for ours in (*self.sources, *self.targets) for target in later.targets)

    def poison(self) -> None:
        """Fill the targets with ones, except targets that overlap sources."""
        self.poisoned = True
        for tensor, target in zip(self.writes, self.targets, strict=True):
            if not any(target.overlaps(source) for source in self.sources):
                _poison(tensor)

    def run(self, fail: Fail) -> None:
        """Run the task, or fail like a failed operation before it; then drop the task and its tensors."""
        task, self.task = self.task, None
        assert task is not None
        errors = [before.error for before in self.after if before.error is not None]
        try:
            if errors:
                raise errors[0]
            fail(self.kind, self.ordinal)
            with torch.inference_mode(False), torch.enable_grad():  # as on another thread
                task()
        except BaseException as error:
            self.error = error
        finally:
            self.ended = True
            self.writes, self.after = (), []


def _poison(tensor: torch.Tensor) -> None:
    with torch.inference_mode():
        if tensor.dtype.is_complex:
            tensor = torch.view_as_real(tensor)
        if tensor.dtype == torch.bool:  # other bytes than 0 and 1 are no truth values
            tensor.fill_(True)
        else:
            tensor.view(_INTEGERS[tensor.element_size()]).fill_(-1)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
