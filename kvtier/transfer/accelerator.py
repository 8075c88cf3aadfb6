"""StreamEngine for accelerators: side streams, events, pinned memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from kvtier.kv.allocation import new_buffer
from kvtier.transfer.base import CopyEngine, Fence, InlineEngine, Pair, Task
from kvtier.transfer.cpu import ThreadEngine
from kvtier.transfer.threads import Readers

_log = logging.getLogger("kvtier.transfer")

_Event = torch.Event | None  # None: passed already


class SideStream:
    """A stream of a device that several threads may enter at once.

    A ``torch.Stream`` notes on entering which stream was current, for leaving: in the object, not for each thread. One
    object that two threads have entered would make the stream of one the current stream of the other.

    Raises:
        NotImplementedError: the device has no streams, or cannot note which memory a stream uses.
        RuntimeError: the same.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.Stream(device)
        torch.empty(1, device=device).record_stream(self.stream)

    def entry(self) -> torch.Stream:
        """Return another object for the same stream, to enter once."""
        stream = self.stream
        return torch.Stream(
            stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
        )


class StreamEngine(CopyEngine):
    """One stream up, one stream down, ordered against the *current* stream of the thread that marks or waits.

    A fence is the future of an event: the event exists once the copy is enqueued on its stream. A copy after a host
    task is enqueued when that task is done. Only ``settle`` blocks the host, and ``wait`` until the host tasks before
    the copy have ended. Device memory that a side stream uses is recorded with that stream, so that it is not reused
    too early when freed.

    Raises:
        NotImplementedError: the device has no usable side streams.
        RuntimeError: the same.
    """

    device_is_host = False

    def __init__(self, device: torch.device, threads: int = 2) -> None:
        # Tensors name their device with its index.
        self._device = torch.empty(0, device=device).device
        self._up = SideStream(device)
        self._down = SideStream(device)
        self._threads = Readers(threads)
        self._pinned = True

    def copy_all(self, pairs: Sequence[Pair], after: Sequence[Fence] = ()) -> Fence:
        """Copy ``pairs``, all in one direction, on a side stream; one event stands for all.

        The copy is enqueued now, or by a thread once the host tasks before it are done.
        """
        side = self._up if pairs[0][0].device == self._device else self._down

        def enqueue() -> _Event:
            with side.entry() as stream, torch.inference_mode():  # which is per thread
                for fence in after:
                    before = fence.result()
                    if before is not None:
                        stream.wait_event(before)
                for dst, src in pairs:
                    dst.copy_(src, non_blocking=True)
                    for tensor in (dst, src):
                        if tensor.device == self._device:
                            tensor.record_stream(stream)
                return stream.record_event()

        if all(fence.done() for fence in after):
            done: Future[_Event] = Future()
            try:
                done.set_result(enqueue())
            except Exception as error:
                done.set_exception(error)
            return done
        return self._threads.submit(enqueue)

    def call(
        self,
        task: Task,
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        after: Sequence[Fence] = (),
    ) -> Fence:
        """Run ``task`` on a thread; that thread blocks until the copies before it are done."""

        def run() -> _Event:
            for fence in after:
                self.settle(fence)
            task()
            return None

        return self._threads.submit(run)

    def mark(self) -> Fence:
        """Record an event on the current stream."""
        marked: Future[_Event] = Future()
        marked.set_result(self._current().record_event())
        return marked

    def wait(self, fence: Fence) -> None:
        """Make the current stream wait for the event of ``fence``."""
        event = fence.result()
        if event is not None:
            self._current().wait_event(event)

    def settle(self, fence: Fence) -> None:
        """Block the caller until the event of ``fence`` has passed."""
        event = fence.result()
        if event is not None:
            event.synchronize()

    def host_empty(self, nbytes: int) -> torch.Tensor:
        """Return pinned memory; pageable memory, with one warning, if no more can be pinned."""
        if self._pinned:
            try:
                return new_buffer(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._pinned = False
                _log.warning("cannot pin host memory (%s); copies to and from %s will be slow", error, self._device)
        return new_buffer(nbytes, dtype=torch.uint8)

    def host_nbytes(self, nbytes: int) -> int:
        """Return ``nbytes`` rounded up to a power of two if it would be pinned, as PyTorch's allocator does.

        Source: ``aten/src/ATen/core/CachingHostAllocator.h``.
        """
        return 1 << (nbytes - 1).bit_length() if self._pinned and nbytes else nbytes

    def close(self) -> None:
        """Join the threads, and wait until the copies have ended."""
        self._threads.close()
        for side in (self._up, self._down):
            side.stream.synchronize()

    def _current(self) -> torch.Stream:
        return torch.accelerator.current_stream(self._device)


def engine_for(device: torch.device) -> CopyEngine:
    """Return an engine for ``device``: threads for a CPU, streams if the device has them, else inline."""
    if device.type == "cpu":
        return ThreadEngine()
    try:
        return StreamEngine(device)
    except (RuntimeError, NotImplementedError) as error:  # MPS, for example, has no side streams
        _log.info("%s has no usable side streams (%s): copies run inline", device, error)
        return InlineEngine()
