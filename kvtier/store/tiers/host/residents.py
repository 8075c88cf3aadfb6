"""Residents: the blocks of the RAM tier, with their sums, links and eviction queues."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from kvtier.store.block import Block
from kvtier.store.chain import BlockId, TokenIds
from kvtier.store.eviction.base import Standing, Usage
from kvtier.store.tiers.host.ranking import Leaves
from kvtier.store.tiers.host.siblings import Siblings


@dataclass(slots=True, eq=False)
class Resident:
    """A block in RAM, with its data for the policy.

    Attributes:
        block: the block.
        usage: its uses.
        standing: where the policy ranks it.
        used_at: Unix time of its last use.
        number: sequence number of its put; later puts have larger ones.
        hits: how often it was restored.
    """

    block: Block
    usage: Usage
    standing: Standing
    used_at: float
    number: int
    hits: int = 0


class Residents(Mapping[str, Resident]):
    """Blocks by key, in the order of their last use.

    An interrupt may end a call at any point: a block is then stored, or not, and the next call derives the rest anew.
    All other calls take O(log n) steps in the number of blocks, amortised. Not thread-safe, except for key lookups.

    Args:
        is_leased: whether a block is leased.
        ended: keys of blocks whose last lease has ended.
        pinned: returns the keys of blocks that must stay; a new object whenever the keys change.
    """

    def __init__(
        self, is_leased: Callable[[str], bool], ended: set[str], pinned: Callable[[], Collection[str]]
    ) -> None:
        self._blocks: OrderedDict[str, Resident] = OrderedDict()
        self._new_leaves = partial(Leaves, is_leased, ended, pinned)
        self._leaves = self._new_leaves()
        self._siblings = Siblings()
        self._nbytes = 0
        self._puts = 0
        self._in_order = True
        self._is_derived = True

    def __getitem__(self, key: str) -> Resident:
        return self._blocks[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        self._derive()
        return self._nbytes

    def add(self, block: Block, nbytes: int, usage: Usage, standing: Standing, used_at: float) -> None:
        """Add a block that is not stored."""
        self._derive()
        key, parent = block.id.key, block.id.parent
        self._is_derived = False
        self._puts += 1
        self._note_order(used_at)
        self._blocks[key] = resident = Resident(block, usage, standing, used_at, self._puts)
        self._nbytes += nbytes
        self._siblings.add(block.id)
        self._leaves.drop(parent)
        self._put_leaf(key, resident)
        self._is_derived = True

    def remove(self, key: str) -> None:
        """Remove a stored block."""
        self._derive()
        self._is_derived = False
        block = self._blocks.pop(key).block
        self._nbytes -= block.nbytes
        self._siblings.remove(block.id)
        self._leaves.drop(key)
        parent = self._blocks.get(block.id.parent)
        if parent is not None:
            self._put_leaf(block.id.parent, parent)
        self._is_derived = True

    def use(self, key: str, usage: Usage, standing: Standing, used_at: float) -> None:
        """Note that a stored block was used."""
        self._derive()
        resident = self._blocks[key]
        self._is_derived = False
        self._note_order(used_at)
        resident.usage, resident.standing, resident.used_at = usage, standing, used_at
        self._blocks.move_to_end(key)
        self._put_leaf(key, resident)
        self._is_derived = True

    def _put_leaf(self, key: str, resident: Resident) -> None:
        if not self._siblings.count(key):
            self._leaves.put(key, resident.standing, resident.number)

    def _note_order(self, used_at: float) -> None:
        """Note whether the blocks stay in order when a block used at ``used_at`` becomes the last."""
        if self._blocks and used_at < self._blocks[next(reversed(self._blocks))].used_at:
            self._in_order = False  # the clock was set back

    def _derive(self) -> None:
        if self._is_derived:
            return
        self._nbytes = sum(resident.block.nbytes for resident in self._blocks.values())
        self._siblings = Siblings(resident.block.id for resident in self._blocks.values())
        self._leaves = self._new_leaves()
        for key, resident in self._blocks.items():
            self._put_leaf(key, resident)
        self._in_order = False
        self._is_derived = True

    def children(self, key: str) -> int:
        """Return how many blocks follow ``key``."""
        self._derive()
        return self._siblings.count(key)

    def nearest(
        self, parent: str, tokens: TokenIds, is_found: Callable[[str], bool], *, windows: bool
    ) -> BlockId | None:
        """Return a block after ``parent`` with the longest common prefix with ``tokens``; None when there is none.

        Only blocks whose key passes ``is_found`` count; of them window blocks alone with ``windows``, and all others
        without.
        """
        self._derive()
        return self._siblings.nearest(parent, tokens, is_found, windows=windows)

    def tails(self, parent: str, tokens: TokenIds) -> list[BlockId]:
        """Return the blocks after ``parent`` whose ids are a proper prefix of ``tokens``."""
        self._derive()
        return list(self._siblings.tails(parent, tokens))

    def least_valued(self, lead: Callable[[int], float], keep: str) -> str | None:
        """Return the leaf to evict first: not ``keep``, not leased, not pinned; None when there is none.

        ``lead(queue)`` is added to the priorities of a queue.
        """
        self._derive()
        self._is_derived = False  # the search sets leaves aside
        found = self._leaves.least_valued(lead, keep)
        self._is_derived = True
        return found

    def used_before(self, since: float) -> Iterator[str]:
        """Yield the keys of blocks that were last used before ``since`` (Unix time). Blocks may not change meanwhile.

        If the clock was set back, or an interrupt came, the blocks are sorted first.
        """
        self._derive()
        if not self._in_order:
            self._blocks = OrderedDict(sorted(self._blocks.items(), key=lambda item: item[1].used_at))
            self._in_order = True
        for key, resident in self._blocks.items():
            if resident.used_at >= since:
                return
            yield key
