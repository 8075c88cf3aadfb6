"""Mutants: an engine without one of its waits or fences, to prove that each is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kvtier.testing.simulation.races import Site
from kvtier.transfer.base import CopyEngine, Fence, Pair, Task


class Drop(NamedTuple):
    """One wait or fence to leave out.

    Attributes:
        site: the line that calls the engine.
        what: ``wait``, ``settle``, ``after`` for all fences of that argument, ``after[0]`` or ``after[-1]``.
        origin: only fences that were made at this place, such as ``copy at offload/prefetch.py:80``; empty for all.
    """

    site: Site
    what: str
    origin: str = ""

    def __str__(self) -> str:
        return f"{self.what} ({self.origin or 'all'}) at {self.site}"


class Recorder:
    """Passes all calls to ``engine`` and notes possible drops. Other attributes are the engine's own.

    Attributes:
        seen: how often each possible drop occurred.
    """

    def __init__(self, engine: CopyEngine) -> None:
        self.seen: Counter[Drop] = Counter()
        self._engine = engine
        self._origins: dict[int, tuple[Fence, str]] = {}  # with the fence, so that its id is not reused

    @property
    def device_is_host(self) -> bool:
        """The engine's value."""
        return self._engine.device_is_host

    def copy(self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Fence] = ()) -> Fence:
        """Pass the call on."""
        return self._made("copy", self._engine.copy(dst, src, after=self._after(after)))

    def copy_all(self, pairs: Sequence[Pair], after: Sequence[Fence] = ()) -> Fence:
        """Pass the call on."""
        return self._made("copy", self._engine.copy_all(pairs, after=self._after(after)))

    def call(
        self,
        task: Task,
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        after: Sequence[Fence] = (),
    ) -> Fence:
        """Pass the call on."""
        return self._made("call", self._engine.call(task, reads=reads, writes=writes, after=self._after(after)))

    def mark(self) -> Fence:
        """Pass the call on."""
        return self._made("mark", self._engine.mark())

    def wait(self, fence: Fence) -> None:
        """Pass the call on."""
        if self._keeps("wait", fence):
            self._engine.wait(fence)

    def settle(self, fence: Fence) -> None:
        """Pass the call on."""
        if self._keeps("settle", fence):
            self._engine.settle(fence)

    def host_empty(self, nbytes: int) -> torch.Tensor:
        """Pass the call on."""
        return self._engine.host_empty(nbytes)

    def host_nbytes(self, nbytes: int) -> int:
        """Pass the call on."""
        return self._engine.host_nbytes(nbytes)

    def close(self) -> None:
        """Pass the call on."""
        self._engine.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _made(self, kind: str, fence: Fence) -> Fence:
        self._origins.setdefault(id(fence), (fence, f"{kind} at {Site.of_caller()}"))
        return fence

    def _after(self, after: Sequence[Fence]) -> Sequence[Fence]:
        kept = []
        for index, fence in enumerate(after):
            keeps = self._keeps("after", fence)
            if index == 0:
                keeps &= self._keeps("after[0]")
            if index == len(after) - 1:
                keeps &= self._keeps("after[-1]")
            if keeps:
                kept.append(fence)
        return kept

    def _keeps(self, what: str, fence: Fence = None) -> bool:
        """Return whether this use of ``fence`` is passed on."""
        site = Site.of_caller()
        uses = [Drop(site, what)]
        if fence is not None:
            known = self._origins.get(id(fence))
            uses.append(Drop(site, what, "elsewhere" if known is None else known[1]))
        self.seen.update(uses)
        return not any(self._drops(use) for use in uses)

    def _drops(self, use: Drop) -> bool:
        return False


class Mutant(Recorder):
    """Passes all calls to ``engine``, except ``drop``.

    Attributes:
        dropped: how often ``drop`` was left out; a run in which it is 0 proves nothing.
    """

    def __init__(self, engine: CopyEngine, drop: Drop) -> None:
        super().__init__(engine)
        self.drop = drop
        self.dropped = 0

    def _drops(self, use: Drop) -> bool:
        drops = use == self.drop
        self.dropped += drops
        return drops


def drops(*recorders: Recorder) -> list[Drop]:
    """Return the possible drops in recorded runs, by file, line and kind, each mutant once.

    Drops by origin are left out where there is only one origin, drops of elements where there is only one element.
    """
    seen = sum((recorder.seen for recorder in recorders), Counter[Drop]())
    origins = Counter((drop.site, drop.what) for drop in seen if drop.origin)
    found = []
    for drop, count in seen.items():
        if drop.origin:
            tells = origins[drop.site, drop.what] > 1
        else:
            tells = drop.what in ("wait", "settle", "after") or count < seen[Drop(drop.site, "after")]
        if tells:
            found.append(drop)
    return sorted(found)
