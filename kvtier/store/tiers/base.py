"""What the store asks of a tier, and the values that pass between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from kvtier.store.block import BlockReader, Entry
from kvtier.store.chain import BlockId, TokenIds


class Tier(Protocol):
    """A place where blocks live, within a byte budget. Blocks that are being read are not evicted."""

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
