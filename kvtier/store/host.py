"""The RAM tier: blocks as tensors, least recently used first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from kvtier.geometry import Geometry, LayerGeometry
from kvtier.pages import Landing, Page
from kvtier.store.base import Block
from kvtier.store.chain import BlockId
from kvtier.store.eviction import leaf_first_lru
from kvtier.store.fork import take_part


class HostReader:
    """A block in RAM, open for reading. Holds the tensors, so an eviction cannot take them away."""

    tier = "host"
    is_plain = True

    def __init__(self, block: Block) -> None:
        self.id = block.id
        self.geometry = Geometry(tuple(LayerGeometry.of(page.k_htd[None], page.v_htd[None]) for page in block.pages))
        self._block = block

    def page(self, layer: int) -> Page:
        """Return the page of ``layer``; no bytes move."""
        return self._block.pages[layer]

    def land(self, layer: int, first: int, last: int, landing: Landing, *, check: bool = True) -> None:
        """Copy tokens ``[first, last)`` of the page of ``layer``."""
        landing.take(self._block.pages[layer], first, last)

    def close(self) -> None:
        """Nothing to release."""


class HostTier:
    """Blocks in RAM. ``nbytes`` never exceeds ``budget_bytes``; a block that is being written is not evicted.

    Thread-safe. An interrupt may end a call at any point: a block is then here, or not, and the bytes are counted anew.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self._blocks: OrderedDict[str, Block] = OrderedDict()
        self._children: dict[str, set[str]] = {}
        self._writing: set[str] = set()
        # Entered rather than the condition: only a lock itself is taken and released without a step between.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        take_part(self)

    def before_fork(self) -> None:
        """Wait until no thread changes anything."""
        self._lock.acquire()

    def after_fork(self, in_child: bool) -> None:
        """Go on. A child forgets the blocks that its parent is writing: it cannot know when, or whether, they are."""
        if in_child:
            for key in list(self._writing):
                self.discard(key)
        self._lock.release()

    def __contains__(self, key: str) -> bool:
        return key in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def put(self, block: Block, *, writing: bool = False) -> bool:
        """Keep ``block``; evict others for it.

        Args:
            block: what to keep.
            writing: protect it until ``written`` is called. Waits for room while other blocks are being written.

        Returns:
            False when there is no room for it, however much were evicted.
        """
        with self._lock:
            try:
                return self._put(block, block.id.key, block.nbytes, writing)
            except BaseException:
                if self._blocks.get(block.id.key) is block:
                    self.discard(block.id.key)  # half put: it might not be listed
                self._recount()
                raise

    def _put(self, block: Block, key: str, size: int, writing: bool) -> bool:
        if key in self._blocks:
            return True
        if size > self.budget_bytes:
            return False
        while self.nbytes + size > self.budget_bytes:
            victim = leaf_first_lru(
                self._blocks,
                lambda k: bool(self._children.get(k)),
                # the parent of the new block would be left without its child's reason to be kept
                lambda k: k in self._writing or k == block.id.parent,
            )
            if victim is not None:
                self.discard(victim)
            elif writing and self._writing:
                self._changed.wait()
            else:
                return False
        self._blocks[key] = block
        self.nbytes += size
        self._children.setdefault(block.id.parent, set()).add(key)
        if writing:
            self._writing.add(key)
        return True

    def _recount(self) -> None:
        self.nbytes = sum(block.nbytes for block in self._blocks.values())

    def written(self, key: str) -> None:
        """Allow the eviction of a block that was put with ``writing=True``. May be called more than once."""
        with self._lock:
            self._writing.discard(key)
            self._changed.notify_all()

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a block that lives here."""
        block = self._blocks.get(key)
        return block.id if block else None

    def children(self, parent: str) -> Sequence[BlockId]:
        """Return the blocks that follow ``parent``."""
        with self._lock:
            return [self._blocks[key].id for key in self._children.get(parent, ())]

    def open(self, key: str) -> HostReader | None:
        """Open a block for reading; None when it is not here."""
        block = self._blocks.get(key)
        return HostReader(block) if block else None

    def discard(self, key: str) -> None:
        """Forget a block; unknown keys are ignored."""
        with self._lock:
            block = self._blocks.get(key)
            if block is None:
                return
            siblings = self._children.get(block.id.parent, set())
            siblings.discard(key)  # first: what is listed is here
            if not siblings:
                self._children.pop(block.id.parent, None)
            self._writing.discard(key)
            try:
                del self._blocks[key]
                self.nbytes -= block.nbytes
            except BaseException:
                self._recount()
                raise
            self._changed.notify_all()

    def touch(self, keys: Sequence[str]) -> None:
        """Note that these blocks were used now."""
        with self._lock:
            for key in keys:
                if key in self._blocks:
                    self._blocks.move_to_end(key)
