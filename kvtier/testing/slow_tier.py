"""SlowTier: a tier behind a link of a set bandwidth and latency, to see what a store does when loading is slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future

import torch

from kvtier.kv.page import Page, PageView
from kvtier.store.block import Block, BlockReader, Entry, Landing
from kvtier.store.chain import BlockId
from kvtier.store.tiers.base import Presence, PutResult, Tier, TierStats, answered


class Link:
    """A link that carries one answer after another; the wait for the first byte of several overlaps. Thread-safe.

    Whoever waits sleeps: the link uses no core.

    Args:
        bytes_per_second: its bandwidth.
        latency_seconds: from a request to the first byte of its answer.
        now: monotonic seconds.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        bytes_per_second: float,
        latency_seconds: float,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.bytes_per_second = bytes_per_second
        self.latency_seconds = latency_seconds
        self.carried_bytes = 0
        self._now, self._sleep = now, sleep
        self._free_at = 0.0
        self._lock = threading.Lock()

    def carry(self, nbytes: int) -> None:
        """Wait for as long as an answer of ``nbytes`` takes."""
        with self._lock:
            asked = self._now()
            self._free_at = max(self._free_at, asked + self.latency_seconds) + nbytes / self.bytes_per_second
            self.carried_bytes += nbytes
            left = self._free_at - asked
        self._sleep(left)


class _SlowReader:
    """A block that comes over the link as a whole, when its first page is asked for."""

    def __init__(self, reader: BlockReader, tier: str, link: Link) -> None:
        self.id, self.spec, self.tier = reader.id, reader.spec, tier
        self.is_plain = reader.is_plain
        self._reader = reader
        self._link = link
        self._came = False
        self._lock = threading.Lock()

    def _come(self) -> None:
        with self._lock:
            if not self._came:
                self._link.carry(len(self.id.tokens) * sum(spec.token_bytes for spec in self.spec.layers))
                self._came = True

    def page(self, layer: int) -> Page:
        self._come()
        return self._reader.page(layer)

    def landing(self, layer: int, first: int, last: int, view: PageView, *, check: bool = True) -> Landing:
        land = self._reader.landing(layer, first, last, view, check=check)

        def come_and_land() -> None:
            self._come()
            land()

        return come_and_land

    def states(self) -> torch.Tensor | None:
        self._come()
        return self._reader.states()

    def detach(self) -> None:
        self._reader.detach()

    def close(self) -> None:
        self._reader.close()


class SlowTier:
    """``tier``, behind ``link``: lookups and each block that is read take their time. Writing takes none.

    ``close`` leaves ``tier`` open: it may be behind other links too.

    Args:
        tier: has the blocks.
        link: is waited for.
        name: what reports call it.
    """

    def __init__(self, tier: Tier, link: Link, name: str = "slow") -> None:
        self.name = name
        self._tier = tier
        self._link = link

    def presence(self, keys: Sequence[str]) -> Future[Sequence[Presence]]:
        """Say of each of ``keys`` whether the block can be opened."""
        self._link.carry(len(keys))
        return self._tier.presence(keys)

    def open_all(self, blocks: Sequence[BlockId]) -> Sequence[Future[BlockReader | None]]:
        """Open blocks. None of their bytes comes yet."""
        found = [future.result() for future in self._tier.open_all(blocks)]
        return [answered(_SlowReader(each, self.name, self._link) if each is not None else None) for each in found]

    def put(self, block: Block) -> PutResult:
        """Keep ``block``."""
        return self._tier.put(block)

    def discard_all(self, keys: Sequence[str]) -> object:
        """Forget blocks."""
        return self._tier.discard_all(keys)

    def touch(self, keys: Sequence[str], hits: Mapping[str, int]) -> None:
        """Note that a turn used these blocks."""
        self._tier.touch(keys, hits)

    def entries(self) -> Iterable[Entry]:
        """Return what is known of every block."""
        return self._tier.entries()

    def shrink(self, to_bytes: int) -> object:
        """Evict until all blocks take no more than ``to_bytes``."""
        return self._tier.shrink(to_bytes)

    def stats(self, hits: int) -> TierStats:
        """Return the numbers of the tier."""
        return self._tier.stats(hits)

    def flush(self) -> None:
        """Wait until all that was put outlives this process."""
        self._tier.flush()

    def close(self) -> None:
        """Do nothing."""
