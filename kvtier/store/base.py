"""What the store asks of a tier, and the values that pass between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtier.geometry import Geometry
from kvtier.pages import Landing, Page
from kvtier.store.chain import BlockId


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The pages of all layers for the tokens of ``id``. Immutable: nobody writes to its tensors."""

    id: BlockId
    pages: tuple[Page, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(page.nbytes for page in self.pages)


class BlockReader(Protocol):
    """One block of a tier, opened for reading layer by layer. May be read by several threads at once."""

    id: BlockId
    tier: str
    geometry: Geometry

    @property
    def is_plain(self) -> bool:
        """Whether landing a page is copying it, with nothing to decode."""

    def page(self, layer: int) -> Page:
        """Return the page of ``layer``.

        Raises:
            BlockError: the bytes cannot be read or are not those that were written.
        """

    def land(self, layer: int, first: int, last: int, landing: Landing, *, check: bool = True) -> None:
        """Put the tokens ``[first, last)`` of the page of ``layer`` into ``landing``, which has their size.

        Without ``check`` the bytes are taken for those that were checked before.

        Raises:
            BlockError: as ``page``; what the landing then holds is undefined.
        """

    def close(self) -> None:
        """Release what reading needs. Pages that were returned stay valid."""


class Tier(Protocol):
    """A place where blocks live, within a byte budget."""

    def __contains__(self, key: str) -> bool:
        """Whether the block can be opened."""

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a block that lives here."""

    def children(self, parent: str) -> Sequence[BlockId]:
        """Return the blocks that follow ``parent``."""

    def open(self, key: str) -> BlockReader | None:
        """Open a block for reading; None when it is not (or no longer) here.

        Raises:
            BlockError: it is here, but not usable.
        """

    def discard(self, key: str) -> None:
        """Forget a block; unknown keys are ignored."""

    def touch(self, keys: Sequence[str]) -> None:
        """Note that these blocks were used now."""
