"""The RAM tier: blocks as tensors."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvtier.geometry import Geometry, LayerGeometry
from kvtier.pages import Landing, Page
from kvtier.store.base import Block, Entry
from kvtier.store.chain import BlockId, TokenIds, common_run
from kvtier.store.eviction import EvictionPolicy, PolicyState, Usage
from kvtier.store.fork import Rank, take_part
from kvtier.store.lifecycle import BlockLease, Leases
from kvtier.store.pause import Withheld


class HostReader:
    """A block in RAM, open for reading, with a lease that keeps it there."""

    tier = "host"
    is_plain = True

    def __init__(self, block: Block, lease: BlockLease) -> None:
        self.id = block.id
        self.geometry = Geometry(tuple(LayerGeometry.of(page.k_htd[None], page.v_htd[None]) for page in block.pages))
        self._block = block
        self._lease = lease

    def page(self, layer: int) -> Page:
        """Return the page of ``layer``; no bytes move."""
        return self._block.pages[layer]

    def land(self, layer: int, first: int, last: int, landing: Landing, *, check: bool = True) -> None:
        """Copy tokens ``[first, last)`` of the page of ``layer``."""
        landing.take(self._block.pages[layer], first, last)

    def states(self) -> torch.Tensor | None:
        """Return the states of a snapshot; no bytes move."""
        return self._block.states

    def detach(self) -> None:
        """Nothing is held for it."""

    def close(self) -> None:
        """End the lease."""
        self._lease.end()


@dataclass(slots=True, eq=False)
class _Resident:
    """A block that is here, and what the policy knows of it."""

    block: Block
    usage: Usage
    priority: float
    used_at: float
    hits: int = 0


class HostTier:
    """Blocks in RAM. ``nbytes`` never exceeds ``budget_bytes``.

    A block that is being read, or written to disk, is not evicted. Thread-safe. An interrupt may end a call at any
    point: a block is then here, or not, and the bytes are counted anew.

    Args:
        budget_bytes: what all tensors take at most.
        policy: which leaf goes first.
        clock: Unix time.
        is_pinned: whether a block must stay.
        ttl_seconds: how long a block is kept after its last use; None for ever.
        before_waiting: called before a put waits for room: has what waits to be written written.
    """

    def __init__(
        self,
        budget_bytes: int,
        policy: EvictionPolicy,
        clock: Callable[[], float],
        is_pinned: Callable[[str], bool] = lambda key: False,
        ttl_seconds: float | None = None,
        before_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self.counts: Counter[str] = Counter()
        self.leases = Leases()
        self._policy = policy
        self._state = PolicyState()
        self._clock = clock
        self._is_pinned = is_pinned
        self._ttl_seconds = ttl_seconds
        self._before_waiting = before_waiting
        self._withheld = Withheld(clock)
        self._blocks: dict[str, _Resident] = {}
        self._children: dict[str, set[str]] = {}
        self._ghosts: dict[str, Usage] = {}  # the oldest first
        self._writing: dict[str, BlockLease] = {}
        # Entered rather than the condition: only a lock itself is taken and released without a step between.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        take_part(self, Rank.HOST)

    def before_fork(self) -> None:
        """Wait until no thread changes anything."""
        self._lock.acquire()

    def after_fork(self, in_child: bool) -> None:
        """Go on. A child forgets the blocks that its parent is writing: it cannot know when, or whether, they are."""
        if in_child:
            for key in list(self._writing):
                self.discard(key)
        self._lock.release()

    # --- storing ----------------------------------------------------------------------------------------------------

    def put(self, block: Block, *, writing: bool = False) -> bool:
        """Keep ``block``; evict others for it.

        Args:
            block: what to keep.
            writing: take a lease on it until ``written`` is called. Waits for room while others are being written.

        Returns:
            False when there is no room for it, however much were evicted.
        """
        with self._lock:
            try:
                return self._put(block, block.id.key, block.nbytes, writing)
            except BaseException:
                resident = self._blocks.get(block.id.key)
                if resident is not None and resident.block is block:
                    self.discard(block.id.key)  # half put: it might not be listed
                self._recount()
                raise

    def _put(self, block: Block, key: str, size: int, writing: bool) -> bool:
        if key in self._blocks:
            return True
        if size > self.budget_bytes:
            return False
        while self.nbytes + size > self.budget_bytes:
            victim = self._least_valued(block.id.parent)
            if victim is not None:
                self._evict(victim)
            elif writing and self._writing:
                self._before_waiting()
                self._changed.wait()
            else:
                return False
        usage = self._usage(block, size)
        priority = self._policy.priority(usage, self._state)
        self._blocks[key] = _Resident(block, usage, priority, self._clock())
        self.nbytes += size
        self._children.setdefault(block.id.parent, set()).add(key)
        if writing:
            self._writing[key] = self.leases.prepare_load(key)
        return True

    def _usage(self, block: Block, size: int) -> Usage:
        ghost = self._ghosts.pop(block.id.key, None)
        if ghost is None:
            return Usage(0, self._state.clock, len(block.id.tokens), block.depth_tokens, size)
        self._state = self._policy.returned(ghost, self._state)
        return replace(ghost, last_use=self._state.clock, nbytes=size)

    def _least_valued(self, keep: str) -> str | None:
        """Return the leaf that is to go first: not ``keep``, not leased, not pinned; None when there is none."""
        best, least = None, 0.0
        lead = self._policy.lead(self._state)
        for key, resident in self._blocks.items():
            value = resident.priority + lead if resident.usage.came_back else resident.priority
            if best is not None and value >= least:
                continue
            if key != keep and not self._children.get(key) and key not in self.leases and not self._is_pinned(key):
                best, least = key, value
        return best

    def _evict(self, key: str) -> None:
        resident = self._blocks[key]
        self._state = self._policy.evicted(resident.usage, resident.priority, self._state)
        self._ghosts[key] = resident.usage
        while len(self._ghosts) > max(len(self._blocks), 1):
            del self._ghosts[next(iter(self._ghosts))]
        self.counts["evictions"] += 1
        self.discard(key)

    def _recount(self) -> None:
        self.nbytes = sum(resident.block.nbytes for resident in self._blocks.values())

    def written(self, key: str) -> None:
        """End the lease of a block that was put with ``writing=True``. May be called more than once."""
        with self._lock:
            lease = self._writing.pop(key, None)
            if lease is not None:
                lease.end()
            self._changed.notify_all()

    # --- leaving ----------------------------------------------------------------------------------------------------

    def discard(self, key: str) -> None:
        """Forget a block; unknown keys are ignored. Who reads it may finish."""
        with self._lock:
            resident = self._blocks.get(key)
            if resident is None:
                return
            parent = resident.block.id.parent
            siblings = self._children.get(parent, set())
            siblings.discard(key)  # first: what is listed is here
            if not siblings:
                self._children.pop(parent, None)
            lease = self._writing.pop(key, None)
            if lease is not None:
                lease.end()
            try:
                del self._blocks[key]
                self.nbytes -= resident.block.nbytes
            except BaseException:
                self._recount()
                raise
            self._changed.notify_all()

    def discard_unread(self, keys: Iterable[str]) -> None:
        """Forget blocks. Who reads one may finish: its bytes are counted by whoever holds them."""
        for key in keys:
            self.discard(key)

    def withhold(self, keys: Iterable[str]) -> None:
        """Find blocks again only after a while: what a turn has for them does not fit."""
        self._withheld.add(keys)

    def shrink(self, to_bytes: int) -> list[Entry]:
        """Evict until all blocks take no more than ``to_bytes``, or nothing more can go; return what went."""
        gone = []
        with self._lock:
            while self.nbytes > to_bytes and (victim := self._least_valued("")) is not None:
                gone.append(self._entry(victim))
                self._evict(victim)
        return gone

    def unused_since(self, since: float) -> list[str]:
        """Return the keys of blocks that were last used before ``since`` (Unix time) and are not pinned."""
        with self._lock:
            return [k for k, r in self._blocks.items() if r.used_at < since and not self._is_pinned(k)]

    def expire(self) -> None:
        """Forget what nobody has used for as long as ``ttl_seconds``."""
        if self._ttl_seconds is not None:
            for key in self.unused_since(self._clock() - self._ttl_seconds):
                self.counts["expirations"] += 1
                self.discard(key)

    # --- finding ----------------------------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        resident = self._blocks.get(key)
        return resident is not None and self._is_fresh(key, resident)

    def _is_fresh(self, key: str, resident: _Resident) -> bool:
        if key in self._withheld:
            return False
        if self._ttl_seconds is None:
            return True
        return resident.used_at >= self._clock() - self._ttl_seconds or self._is_pinned(key)

    def __len__(self) -> int:
        return len(self._blocks)

    def _following(self, parent: str) -> list[BlockId]:
        with self._lock:
            found = [(key, self._blocks[key]) for key in self._children.get(parent, ())]
        return [resident.block.id for key, resident in found if self._is_fresh(key, resident)]

    def nearest(self, parent: str, tokens: TokenIds) -> Sequence[BlockId]:
        """Return the block after ``parent`` that shares the longest run with ``tokens``."""
        following = self._following(parent)
        return [max(following, key=lambda block: common_run(block.tokens, tokens))] if following else []

    def tails(self, parent: str, tokens: TokenIds) -> Sequence[BlockId]:
        """Return the blocks after ``parent`` that ``tokens`` begin with, and go beyond."""
        return [
            block
            for block in self._following(parent)
            if len(block.tokens) < len(tokens) and common_run(block.tokens, tokens) == len(block.tokens)
        ]

    def entry(self, key: str) -> Entry | None:
        """Return what is known of a block that lives here."""
        with self._lock:
            return self._entry(key) if key in self else None

    def entries(self) -> list[Entry]:
        """Return what is known of every block."""
        with self._lock:
            return [self._entry(key) for key, resident in self._blocks.items() if self._is_fresh(key, resident)]

    def _entry(self, key: str) -> Entry:
        resident = self._blocks[key]
        block, usage = resident.block.id, resident.usage
        return Entry(
            key,
            block.parent,
            block.root,
            len(block.tokens),
            usage.depth_tokens,
            resident.block.nbytes,
            len(self._children.get(key, ())),
            usage.uses,
            resident.hits,
            resident.used_at,
            self._is_pinned(key),
        )

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a block that lives here."""
        resident = self._blocks.get(key)
        return resident.block.id if resident is not None and key in self else None

    def block(self, key: str) -> Block | None:
        """Return a block that lives here."""
        resident = self._blocks.get(key)
        return resident.block if resident is not None else None

    def open(self, block: BlockId) -> HostReader | None:
        """Open a block for reading, with a lease on it; None when it is not here."""
        with self._lock:
            resident = self._blocks.get(block.key)
            if resident is None or block.key not in self:
                return None
            return HostReader(resident.block, self.leases.prepare_load(block.key))

    def touch(self, keys: Sequence[str], hits: Mapping[str, int]) -> None:
        """Note that a turn used these blocks now, and how often blocks were restored."""
        with self._lock:
            self._state = self._state.tick()
            now = self._clock()
            for key in keys:
                resident = self._blocks.get(key)
                if resident is not None:
                    resident.usage = resident.usage.used(self._state)
                    resident.priority = self._policy.priority(resident.usage, self._state)
                    resident.used_at = now
            for key, n in hits.items():
                if key in self._blocks:
                    self._blocks[key].hits += n
