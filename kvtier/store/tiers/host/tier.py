"""HostTier: blocks in RAM, as tensors."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from kvtier.kv.page import Page, PageView
from kvtier.kv.spec import KVSpec
from kvtier.platform.fork_safety import Rank, take_part
from kvtier.store.block import Block, BlockReader, Entry, Landing
from kvtier.store.chain import BlockId, TokenIds
from kvtier.store.eviction.base import EvictionPolicy, SavedSeconds, nothing_known
from kvtier.store.tiers.backoff import Withheld
from kvtier.store.tiers.base import Presence, PutResult, TierStats, answered, opened
from kvtier.store.tiers.host.ranking import RamValuation
from kvtier.store.tiers.host.residents import Resident, Residents
from kvtier.store.tiers.leases import BlockLease, Leases

if TYPE_CHECKING:
    import torch

LONGEST_WAIT_SECONDS = 2.0
"""How long a put waits in total for writes of other blocks, which never end on a drive that hangs."""


class HostReader:
    """A block in RAM, open for reading, with a lease that keeps it there."""

    tier = "host"
    is_plain = True

    def __init__(self, block: Block, lease: BlockLease) -> None:
        self.id = block.id
        self.spec = KVSpec(tuple(page.spec for page in block.pages))
        # Views of tensors are made here, in one thread: the threads that land pages would wait for each other.
        self._views = tuple(PageView.on(page.k_htd, page.v_htd) for page in block.pages)
        self._block = block
        self._lease = lease

    def page(self, layer: int) -> Page:
        """Return the page of ``layer``, without a copy.

        Raises:
            UnavailableError: its bytes do not arrive from the device.
        """
        self._block.arrive()
        return self._block.pages[layer]

    def landing(self, layer: int, first: int, last: int, view: PageView, *, check: bool = True) -> Landing:
        """Prepare to copy tokens ``[first, last)`` of the page of ``layer``.

        The result raises ``UnavailableError`` if its bytes do not arrive from the device.
        """
        arrive, page = self._block.arrive, self._views[layer].cut(first, last)

        def land() -> None:
            arrive()
            view.copy(page)

        return land

    def states(self) -> torch.Tensor | None:
        """Return the states of a checkpoint, without a copy."""
        return self._block.states

    def detach(self) -> None:
        """Do nothing: no memory is held for this reader."""

    def close(self) -> None:
        """End the lease."""
        self._lease.end()


class HostTier:
    """Blocks in RAM. ``nbytes`` never exceeds ``budget_bytes``.

    A block that is being read, or written to disk, is not evicted. Thread-safe. An interrupt may end a call at any
    point: a block is then stored, or not, and the next call counts and sorts all blocks anew.

    All other calls except ``entries`` take O(log n) steps for each block that they name, evict or expire, amortised.
    Expired and withheld siblings are skipped one by one; so are pinned blocks in ``unused_since``.

    Args:
        budget_bytes: upper limit for the bytes of all tensors.
        policy: decides which leaf is evicted first.
        clock: Unix time.
        pinned: returns the keys of blocks that must stay; a new object whenever the keys change.
        ttl_seconds: how long a block is kept after its last use; None for ever.
        before_waiting: called before a put waits for room; runs waiting writes soon.
        longest_wait_seconds: how long a put waits in total for writes of other blocks.
        saved_seconds: what loading a block instead of computing it saves.
    """

    name = "host"

    def __init__(
        self,
        budget_bytes: int,
        policy: EvictionPolicy,
        clock: Callable[[], float],
        pinned: Callable[[], Collection[str]] = frozenset,
        ttl_seconds: float | None = None,
        before_waiting: Callable[[], None] = lambda: None,
        longest_wait_seconds: float = LONGEST_WAIT_SECONDS,
        saved_seconds: SavedSeconds = nothing_known,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.counts: Counter[str] = Counter()
        ended: set[str] = set()
        self.leases = Leases(ended.add)
        self._valuation = RamValuation(policy, saved_seconds)
        self._clock = clock
        self._pinned = pinned
        self._ttl_seconds = ttl_seconds
        self._before_waiting = before_waiting
        self._longest_wait_seconds = longest_wait_seconds
        self._withheld = Withheld(clock)
        self._blocks = Residents(self.leases.__contains__, ended, pinned)
        self._writing: dict[str, BlockLease] = {}
        # Code enters the lock, not the condition: only a lock is taken and released in one step, without interrupts.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        take_part(self, Rank.HOST)

    def before_fork(self) -> None:
        """Wait until no thread changes anything."""
        self._lock.acquire()

    def after_fork(self, in_child: bool) -> None:
        """Release the lock. A child forgets blocks that its parent is writing: it cannot know whether that succeeds."""
        if in_child:
            for key in list(self._writing):
                self.discard(key)
        self._lock.release()

    # --- storing ----------------------------------------------------------------------------------------------------

    def put(self, block: Block, *, writing: bool = False) -> PutResult:
        """Store ``block``; evict others to make room.

        Args:
            block: the block to store.
            writing: take a lease on it until ``written`` is called, even if it is stored already. Waits for room while
                other blocks are being written, for ``longest_wait_seconds`` at most.

        Returns:
            ``NO_ROOM`` if eviction cannot make room, or not in time. There is no lease then. Otherwise ``KEPT``.
        """
        with self._lock:
            try:
                kept = self._put(block, block.id.key, block.nbytes, writing)
                return PutResult.KEPT if kept else PutResult.NO_ROOM
            except BaseException:
                resident = self._blocks.get(block.id.key)
                if resident is not None and resident.block is block:
                    self.discard(block.id.key)
                elif writing:
                    self.written(block.id.key)
                raise

    def _put(self, block: Block, key: str, size: int, writing: bool) -> bool:
        if key not in self._blocks and not self._make_room(block, size, writing):
            return False
        if key not in self._blocks:  # another thread may have put it during a wait
            usage, standing = self._valuation.entered(block, size)
            self._blocks.add(block, size, usage, standing, self._clock())
        if writing and key not in self._writing:
            self._writing[key] = self.leases.prepare_load(key)
        return True

    def _make_room(self, block: Block, size: int, may_wait: bool) -> bool:
        """Evict blocks, but not the one that it needs, until ``block`` fits; return whether it does."""
        if size > self.budget_bytes:
            return False
        wait_until: float | None = None
        keep = block.id.stays(self._blocks.__contains__)
        while self._blocks.nbytes + size > self.budget_bytes:
            victim = self._least_valued(keep)
            if victim is not None:
                self._evict(victim)
                continue
            if not may_wait or not self._writing:
                return False
            now = time.monotonic()
            wait_until = now + self._longest_wait_seconds if wait_until is None else wait_until
            if now >= wait_until:
                return False
            self._before_waiting()
            self._changed.wait(wait_until - now)
        return True

    def _least_valued(self, keep: str) -> str | None:
        return self._blocks.least_valued(self._valuation.lead, keep)

    def _evict(self, key: str) -> None:
        resident = self._blocks[key]
        self._valuation.evicted(key, resident.usage, most_ghosts=len(self._blocks))
        self.counts["evictions"] += 1
        self.discard(key)

    def written(self, key: str) -> None:
        """End the lease of a block that was put with ``writing=True``. May be called more than once."""
        with self._lock:
            lease = self._writing.pop(key, None)
            if lease is not None:
                lease.end()
            self._changed.notify_all()

    # --- leaving ----------------------------------------------------------------------------------------------------

    def discard(self, key: str) -> None:
        """Forget a block; unknown keys are ignored. Readers may finish."""
        with self._lock:
            if key not in self._blocks:
                return
            lease = self._writing.pop(key, None)
            if lease is not None:
                lease.end()
            self._blocks.remove(key)
            self._changed.notify_all()

    def discard_all(self, keys: Iterable[str]) -> None:
        """Forget blocks. Readers may finish: they hold the tensors, which are no longer counted here."""
        for key in keys:
            self.discard(key)

    discard_unread = discard_all

    def withhold(self, keys: Iterable[str]) -> None:
        """Hide blocks from lookups for a while: they do not fit the layers of a turn."""
        self._withheld.add(keys)

    def shrink(self, to_bytes: int) -> list[Entry]:
        """Evict until all blocks take at most ``to_bytes``, or no more can be evicted; return their entries."""
        gone = []
        with self._lock:
            while self._blocks.nbytes > to_bytes and (victim := self._least_valued("")) is not None:
                gone.append(self._entry(victim))
                self._evict(victim)
        return gone

    def unused_since(self, since: float) -> list[str]:
        """Return the keys of blocks that were last used before ``since`` (Unix time) and are not pinned."""
        with self._lock:
            pinned = self._pinned()
            return [*(key for key in self._blocks.used_before(since) if key not in pinned)]

    def expire(self) -> None:
        """Forget blocks that were not used for ``ttl_seconds``."""
        if self._ttl_seconds is not None:
            for key in self.unused_since(self._clock() - self._ttl_seconds):
                self.counts["expirations"] += 1
                self.discard(key)

    # --- finding ----------------------------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        resident = self._blocks.get(key)
        return resident is not None and self._is_fresh(key, resident)

    def presence(self, keys: Sequence[str]) -> Future[Sequence[Presence]]:
        """Say of each of ``keys`` whether the block can be opened."""
        return answered([Presence.PRESENT if key in self else Presence.ABSENT for key in keys])

    def _is_fresh(self, key: str, resident: Resident) -> bool:
        if key in self._withheld:
            return False
        if self._ttl_seconds is None:
            return True
        return resident.used_at >= self._clock() - self._ttl_seconds or key in self._pinned()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def is_writing(self) -> bool:
        """Whether any block is leased until it is written."""
        return bool(self._writing)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of all blocks."""
        with self._lock:
            return self._blocks.nbytes

    def nearest(self, parent: str, tokens: TokenIds, *, windows: bool = False) -> Sequence[BlockId]:
        """Return the block after ``parent`` with the longest common prefix with ``tokens``.

        Only window blocks count with ``windows``, and all others without.
        """
        with self._lock:
            found = self._blocks.nearest(parent, tokens, self.__contains__, windows=windows)
        return [found] if found is not None else []

    def tails(self, parent: str, tokens: TokenIds) -> Sequence[BlockId]:
        """Return the blocks after ``parent`` whose ids are a proper prefix of ``tokens``."""
        with self._lock:
            return [*(block for block in self._blocks.tails(parent, tokens) if block.key in self)]

    def entry(self, key: str) -> Entry | None:
        """Return the entry of a block that can be opened."""
        with self._lock:
            return self._entry(key) if key in self else None

    def entries(self) -> list[Entry]:
        """Return the entries of all blocks that can be opened."""
        with self._lock:
            return [*(self._entry(key) for key, resident in self._blocks.items() if self._is_fresh(key, resident))]

    def _entry(self, key: str) -> Entry:
        resident = self._blocks[key]
        block, usage = resident.block.id, resident.usage
        place = (key, block.parent, block.root, len(block.tokens), usage.depth_tokens, resident.block.nbytes)
        uses = (self._blocks.children(key), usage.uses, resident.hits, resident.used_at)
        return Entry(*place, *uses, pinned=key in self._pinned(), is_window=block.is_window)

    linked_entries = entries

    def kept_entries(self, keys: Sequence[str]) -> list[Entry]:
        """Return the entries of the blocks among ``keys`` that can be opened."""
        return [entry for key in keys if (entry := self.entry(key)) is not None]

    def stats(self, hits: int) -> TierStats:
        """Return the statistics of this tier; ``hits`` is the number of blocks restored from it."""
        pinned = self._pinned()
        return TierStats(
            self.name,
            nbytes=self.nbytes,
            budget_bytes=self.budget_bytes,
            blocks=len(self),
            pinned_blocks=sum(key in self for key in pinned),
            leased_blocks=len(self.leases),
            hits=hits,
            evictions=self.counts["evictions"],
            expirations=self.counts["expirations"],
        )

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a block that can be opened."""
        resident = self._blocks.get(key)
        return resident.block.id if resident is not None and key in self else None

    def find_all(self, keys: Sequence[str]) -> list[BlockId]:
        """Return the identities of the blocks among ``keys`` that can be opened."""
        return [block for key in keys if (block := self.find(key)) is not None]

    def block(self, key: str) -> Block | None:
        """Return a stored block, even if it is expired or withheld."""
        resident = self._blocks.get(key)
        return resident.block if resident is not None else None

    def open(self, block: BlockId) -> HostReader | None:
        """Open a block for reading, with a lease on it; None when it cannot be opened."""
        with self._lock:
            resident = self._blocks.get(block.key)
            if resident is None or block.key not in self:
                return None
            return HostReader(resident.block, self.leases.prepare_load(block.key))

    def open_all(self, blocks: Sequence[BlockId]) -> list[Future[BlockReader | None]]:
        """Open blocks for reading."""
        return opened(self.open, blocks)

    def touch(self, keys: Sequence[str], hits: Mapping[str, int]) -> None:
        """Note that a turn used these blocks now, and how often blocks were restored."""
        with self._lock:
            self._valuation.tick()
            now = self._clock()
            for key in keys:
                resident = self._blocks.get(key)
                if resident is not None:
                    self._blocks.use(key, *self._valuation.used(resident.block, resident.usage), now)
            for key, n in hits.items():
                resident = self._blocks.get(key)
                if resident is not None:
                    resident.hits += n

    def flush(self) -> None:
        """Do nothing: no block outlives the process."""

    def close(self) -> None:
        """Do nothing: the tier holds only memory."""
