"""CopyEngine: copies of a device that run beside the computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from kvtier.kv.allocation import new_buffer

Fence = Any
"""A point in time to order operations after. Opaque: only the engine that made it can wait for it."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Target and source."""

Task = Callable[[], None]


class CopyEngine(Protocol):
    """Copies and host tasks, ordered by fences only.

    An operation reads its sources and writes its targets at some time after all fences of ``after`` have passed. Its
    own fence passes when it is done. Two operations without a fence between them may run at once or in any order. So
    may an operation and the kernels of the compute stream. An operation that fails, or comes after a failed operation,
    raises the error wherever its fence is waited for.

    Attributes:
        device_is_host: whether kernels read host memory, so that files can be read into buffers without a copy.
    """

    device_is_host: bool

    def copy(self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Fence] = ()) -> Fence:
        """Copy ``src`` to ``dst``, of the same shape and dtype, when ``after`` has passed."""
        return self.copy_all([(dst, src)], after)

    def copy_all(self, pairs: Sequence[Pair], after: Sequence[Fence] = ()) -> Fence:
        """Copy the second of each pair to the first, as ``copy`` does; one fence stands for all."""

    def call(
        self,
        task: Task,
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        after: Sequence[Fence] = (),
    ) -> Fence:
        """Run ``task`` on a thread of the host when ``after`` has passed.

        Args:
            task: work on host memory and files.
            reads: the host tensors that it reads.
            writes: the host tensors that it writes.
            after: fences that must have passed before.
        """

    def mark(self) -> Fence:
        """Return a fence that passes when everything enqueued on the current compute stream so far has run."""

    def wait(self, fence: Fence) -> None:
        """Make everything that is enqueued on the current compute stream from now on run after ``fence``."""

    def settle(self, fence: Fence) -> None:
        """Block the caller until ``fence`` has passed."""

    def host_empty(self, nbytes: int) -> torch.Tensor:
        """Return ``nbytes`` of host memory that this device copies from and to at full speed."""

    def host_nbytes(self, nbytes: int) -> int:
        """Return how many bytes ``host_empty(nbytes)`` takes from the machine."""
        return nbytes

    def close(self) -> None:
        """Finish running operations and release threads and streams. May be called more than once."""


class _Passed:
    """A fence that has passed, perhaps with an error."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def check(self) -> None:
        if self.error is not None:
            raise self.error


class InlineEngine(CopyEngine):
    """Runs operations at once, in the caller: for devices without side streams. Nothing can be out of order."""

    def __init__(self, *, device_is_host: bool = False) -> None:
        self.device_is_host = device_is_host

    def copy_all(self, pairs: Sequence[Pair], after: Sequence[Fence] = ()) -> Fence:
        """Copy now."""
        return self.call(partial(copy_pairs, pairs), after=after)

    def call(
        self,
        task: Task,
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        after: Sequence[Fence] = (),
    ) -> Fence:
        """Run ``task`` now."""
        for fence in after:
            if fence.error is not None:
                return fence
        try:
            task()
        except Exception as error:
            return _Passed(error)
        return _Passed()

    def mark(self) -> Fence:
        """Return a fence that has passed."""
        return _Passed()

    def wait(self, fence: Fence) -> None:
        """Raise the error of ``fence``, if there is one."""
        fence.check()

    def settle(self, fence: Fence) -> None:
        """Raise the error of ``fence``, if there is one."""
        fence.check()

    def host_empty(self, nbytes: int) -> torch.Tensor:
        """Return pageable memory."""
        return new_buffer(nbytes, dtype=torch.uint8)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def copy_pairs(pairs: Sequence[Pair]) -> None:
    """Copy the second of each pair to the first, also for tensors made in inference mode."""
    with torch.inference_mode():
        for dst, src in pairs:
            dst.copy_(src)
