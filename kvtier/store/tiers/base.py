"""What the store asks of a tier, and the values that pass between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtier.store.block import BlockReader, Entry
from kvtier.store.chain import BlockId, TokenIds


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier.

    Attributes:
        tier: ``host`` or ``disk``.
        nbytes: bytes that its blocks take: tensors in RAM; on disk whole allocation units, blocks being written and
            blocks that could not be deleted yet included.
        budget_bytes: what ``nbytes`` never exceeds.
        blocks: blocks that can be found.
        pinned_blocks: of those, what is never evicted.
        leased_blocks: blocks that this process is reading right now.
        hits: blocks restored from here. Like all counts below: by this process, since the store was opened.
        evictions: blocks that went to make room.
        expirations: blocks that went because nothing used them for ``ttl``.
    """

    tier: str
    nbytes: int = 0
    budget_bytes: int = 0
    blocks: int = 0
    pinned_blocks: int = 0
    leased_blocks: int = 0
    hits: int = 0
    evictions: int = 0
    expirations: int = 0


class Tier(Protocol):
    """A place where blocks live, within a byte budget. Blocks that are being read are not evicted.

    Attributes:
        name: what reports call it.
    """

    name: str

    def __contains__(self, key: str) -> bool:
        """Whether the block can be opened."""

    def nearest(self, parent: str, tokens: TokenIds) -> Sequence[BlockId]:
        """Return blocks that follow ``parent``, among them one that shares the longest run with ``tokens``."""

    def tails(self, parent: str, tokens: TokenIds) -> Sequence[BlockId]:
        """Return the blocks after ``parent`` that ``tokens`` begin with, and go beyond."""

    def entry(self, key: str) -> Entry | None:
        """Return what is known of a block that lives here."""

    def open(self, block: BlockId) -> BlockReader | None:
        """Open a block for reading, with a lease on it until it is closed; None when it is not (or no longer) here.

        Raises:
            UnavailableError: it is here, and cannot be opened now.
            BlockError: it is here, but not usable.
        """

    def discard(self, key: str) -> None:
        """Forget a block; unknown keys are ignored."""

    def discard_unread(self, keys: Iterable[str]) -> object:
        """Forget blocks, but for those whose bytes would stay since they are being read."""

    def withhold(self, keys: Iterable[str]) -> None:
        """Find blocks that could not be read again only after a while. Nothing of them is forgotten."""

    def touch(self, keys: Sequence[str], hits: Mapping[str, int]) -> None:
        """Note that a turn used these blocks now, and how often blocks were restored."""

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a block that lives here."""

    def entries(self) -> Iterable[Entry]:
        """Return what is known of every block that can be found."""

    def expire(self) -> object:
        """Forget blocks that were not used for as long as blocks are kept."""

    def shrink(self, to_bytes: int) -> object:
        """Evict until all blocks take no more than ``to_bytes``, or nothing more can go."""

    def unused_since(self, since: float) -> list[str]:
        """Return the keys of blocks that were last used before ``since`` (Unix time) and are not pinned."""

    def stats(self, hits: int) -> TierStats:
        """Return its numbers; ``hits`` blocks were restored from here."""
