"""Mutants: an engine without one of the waits or fences that a caller asks for, to prove that each is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kvtier.testing.sites import Site
from kvtier.transfer.engine import CopyEngine, Fence, Pair, Task


class Drop(NamedTuple):
    """One thing to leave out at one site: ``wait``, ``settle``, all of ``after``, or the element ``after[i]``.

    A negative ``i`` counts from the end.
    """

    site: Site
    what: str

    def __str__(self) -> str:
        return f"{self.what} at {self.site}"


class Recorder:
    """Passes everything to ``engine`` and notes what could be dropped. Other attributes are the engine's own."""

    def __init__(self, engine: CopyEngine) -> None:
        self.seen: dict[Drop, int] = {}
        self._engine = engine

    @property
    def device_is_host(self) -> bool:
        """What the engine says."""
        return self._engine.device_is_host

    def copy(self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Fence] = ()) -> Fence:
        """Pass it on."""
        return self._engine.copy(dst, src, after=self._after(after))

    def copy_all(self, pairs: Sequence[Pair], after: Sequence[Fence] = ()) -> Fence:
        """Pass it on."""
        return self._engine.copy_all(pairs, after=self._after(after))

    def call(
        self,
        task: Task,
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        after: Sequence[Fence] = (),
    ) -> Fence:
        """Pass it on."""
        return self._engine.call(task, reads=reads, writes=writes, after=self._after(after))

    def mark(self) -> Fence:
        """Pass it on."""
        return self._engine.mark()

    def wait(self, fence: Fence) -> None:
        """Pass it on."""
        if self._keeps("wait"):
            self._engine.wait(fence)

    def settle(self, fence: Fence) -> None:
        """Pass it on."""
        if self._keeps("settle"):
            self._engine.settle(fence)

    def host_empty(self, nbytes: int) -> torch.Tensor:
        """Pass it on."""
        return self._engine.host_empty(nbytes)

    def close(self) -> None:
        """Pass it on."""
        self._engine.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _after(self, after: Sequence[Fence]) -> Sequence[Fence]:
        if not after:
            return after
        everything = self._keeps("after")
        count = len(after)
        kept = [
            fence
            for index, fence in enumerate(after)
            if self._keeps(f"after[{index}]") and self._keeps(f"after[{index - count}]")
        ]
        return kept if everything else ()

    def _keeps(self, what: str) -> bool:
        drop = Drop(Site.of_caller(), what)
        self.seen[drop] = self.seen.get(drop, 0) + 1
        return True


class Mutant(Recorder):
    """Passes everything to ``engine`` but for what is dropped.

    Attributes:
        dropped: how often that happened; a run in which it is 0 proves nothing.
    """

    def __init__(self, engine: CopyEngine, drop: Drop) -> None:
        super().__init__(engine)
        self.drop = drop
        self.dropped = 0

    def _keeps(self, what: str) -> bool:
        super()._keeps(what)
        if Drop(Site.of_caller(), what) != self.drop:
            return True
        self.dropped += 1
        return False


def drops(recorder: Recorder) -> list[Drop]:
    """Return everything that could be dropped in a recorded run, by file, line and kind.

    All of ``after`` is left out where it never had more than one element: that element stands for it.
    """
    several = {drop.site for drop in recorder.seen if drop.what == "after[1]"}
    return sorted(drop for drop in recorder.seen if drop.what != "after" or drop.site in several)
