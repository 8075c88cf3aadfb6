"""Machine: the one test device of a process, with its memory, its streams, and counts of its copies."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from kvtier.testing.device.memory import Allocator, Passed, poisoned
from kvtier.testing.device.sites import calling_file
from kvtier.testing.device.streams import Scheduler
from kvtier.testing.simulation.accesses import weak
from kvtier.testing.simulation.races import RaceError


class Machine:
    """A device whose memory is host memory.

    Attributes:
        memory: allocates, and counts held and peak bytes.
        streams: queue copies and run them in a random permitted order.
        blocking: how often the host waited for a copy between the device and the host, by the file that asked for it:
            copies that are not ``non_blocking``, and copies from or to pageable memory.
        queued: copies that ran behind the host.
    """

    def __init__(self) -> None:
        self.streams = Scheduler(random.Random(0), lazy=False)
        self.memory = Allocator(self._fence)
        self.blocking: Counter[str] = Counter()
        self.queued = 0
        self._pinned: dict[int, tuple[Callable[[], bool], int]] = {}  # by address: whether it is gone, and its bytes

    def restart(self, seed: int = 0, *, lazy: bool = False) -> None:
        """Run what is queued; then begin with other schedules and without races.

        Args:
            seed: decides which copies run early.
            lazy: run copies only when something waits for them.
        """
        self.streams.restart(random.Random(seed), lazy=lazy)

    @property
    def races(self) -> list[RaceError]:
        """Unordered accesses since the last restart."""
        return self.streams.detector.races

    @contextmanager
    def blocking_copies(self) -> Iterator[Counter[str]]:
        """Yield the counts of ``blocking`` for the block of code, complete at its end."""
        before, counts = self.blocking.copy(), Counter[str]()
        yield counts
        counts.update(self.blocking - before)

    # Copies

    def copy(self, dst: torch.Tensor, src: torch.Tensor, host: torch.Tensor | None, non_blocking: bool) -> None:
        """Copy ``src`` to ``dst``, both host aliases of their memory.

        Args:
            dst: target.
            src: source.
            host: the one of both that is host memory; None if both are on the device.
            non_blocking: whether the caller does not wait.
        """
        reads, writes = [x for x in (src,) if x is not host], [x for x in (dst,) if x is not host]
        streams = self.streams
        if host is None:
            if not streams.queue(streams.current).computes:
                streams.copy("copy", reads, writes, partial(_copy, dst, src))
                return
            streams.launch("copy", reads, writes)
        elif non_blocking and self.is_pinned(host):
            self.queued += 1
            streams.copy("copy", reads, writes, partial(_copy, dst, src))
            return
        else:
            self.blocks()
            streams.launch("copy", reads, writes)
        _copy(dst, src)

    def blocks(self) -> None:
        """Count that the caller waits for bytes from or to the host."""
        self.blocking[calling_file()] += 1

    # Host memory

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Return poisoned pinned memory."""
        memory = poisoned(max(1, nbytes))[:nbytes]
        storage = memory.untyped_storage()
        self._pinned[storage.data_ptr()] = weak(storage).expired, 1 << (nbytes - 1).bit_length() if nbytes else 0
        return memory

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned memory, each piece rounded up to a power of two."""
        self._pinned = {
            address: (is_gone, nbytes) for address, (is_gone, nbytes) in self._pinned.items() if not is_gone()
        }
        return sum(nbytes for _, nbytes in self._pinned.values())

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a host tensor is in pinned memory."""
        known = self._pinned.get(tensor.untyped_storage().data_ptr())
        return known is not None and not known[0]()

    def _fence(self, numbers: Sequence[int]) -> Passed:
        points = [self.streams.record(number) for number in numbers]
        return lambda: all(self.streams.has_passed(point) for point in points)


def _copy(dst: torch.Tensor, src: torch.Tensor) -> None:
    with torch.inference_mode():
        dst.copy_(src)
