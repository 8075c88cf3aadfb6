"""ThreadEngine for CPUs: kernels run in the caller, threads read and write files."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

import torch

from kvtier.kv.allocation import new_buffer
from kvtier.transfer.base import CopyEngine, Fence, Pair, Task, copy_pairs
from kvtier.transfer.threads import Readers


class ThreadEngine(CopyEngine):
    """Runs operations on a few threads, which take them in the order in which they were enqueued.

    A kernel has run when the call that launched it returns: ``mark`` has always passed. An operation waits on its
    thread for the operations before it. These were enqueued earlier, so some operation can always go on.
    """

    device_is_host = True

    def __init__(self, threads: int = 2) -> None:
        self._threads = Readers(threads)
        self._passed: Future[None] = Future()
        self._passed.set_result(None)

    def copy_all(self, pairs: Sequence[Pair], after: Sequence[Fence] = ()) -> Fence:
        """Copy on a thread."""
        return self.call(partial(copy_pairs, pairs), after=after)

    def call(
        self,
        task: Task,
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        after: Sequence[Fence] = (),
    ) -> Fence:
        """Run ``task`` on a thread."""
        pending = [fence for fence in after if fence is not self._passed]

        def run() -> None:
            for fence in pending:
                fence.result()
            task()

        return self._threads.submit(run)

    def mark(self) -> Fence:
        """Return a fence that has passed."""
        return self._passed

    def wait(self, fence: Fence) -> None:
        """Block until ``fence`` has passed; kernels run in the caller."""
        fence.result()

    def settle(self, fence: Fence) -> None:
        """Block until ``fence`` has passed."""
        fence.result()

    def host_empty(self, nbytes: int) -> torch.Tensor:
        """Return pageable memory."""
        return new_buffer(nbytes, dtype=torch.uint8)

    def close(self) -> None:
        """Let running operations end, drop the rest, join the threads."""
        self._threads.close()
