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

    Thread-safe.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self._blocks: OrderedDict[str, Block] = OrderedDict()
        self._children: dict[str, set[str]] = {}
        self._writing: set[str] = set()
        self._changed = threading.Condition(threading.RLock())

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
        key, size = block.id.key, block.nbytes
        with self._changed:
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
            self._children.setdefault(block.id.parent, set()).add(key)
            self.nbytes += size
            if writing:
                self._writing.add(key)
            return True

    def written(self, key: str) -> None:
        """Allow the eviction of a block that was put with ``writing=True``."""
        with self._changed:
            self._writing.discard(key)
            self._changed.notify_all()

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a block that lives here."""
        block = self._blocks.get(key)
        return block.id if block else None

    def children(self, parent: str) -> Sequence[BlockId]:
        """Return the blocks that follow ``parent``."""
        with self._changed:
            return [self._blocks[key].id for key in self._children.get(parent, ())]

    def open(self, key: str) -> HostReader | None:
        """Open a block for reading; None when it is not here."""
        block = self._blocks.get(key)
        return HostReader(block) if block else None

    def discard(self, key: str) -> None:
        """Forget a block; unknown keys are ignored."""
        with self._changed:
            block = self._blocks.pop(key, None)
            if block is None:
                return
            self.nbytes -= block.nbytes
            self._writing.discard(key)
            siblings = self._children[block.id.parent]
            siblings.discard(key)
            if not siblings:
                del self._children[block.id.parent]
            self._changed.notify_all()

    def touch(self, keys: Sequence[str]) -> None:
        """Note that these blocks were used now."""
        with self._changed:
            for key in keys:
                if key in self._blocks:
                    self._blocks.move_to_end(key)
