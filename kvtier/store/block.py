"""Blocks: the pages of all layers for some tokens of one sequence, and readers of blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvtier.kv.page import Page, PageView
from kvtier.kv.spec import KVSpec
from kvtier.store.chain import BlockId

if TYPE_CHECKING:
    import torch


def arrived() -> None:
    """Return at once: pages that were copied before they were passed on."""


Landing = Callable[[], None]
"""Reads a page into its place, once. Preparing it takes Python, calling it mostly system calls and checksums: several
threads that prepare many pages before they read them wait less for each other."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The pages of all layers for the tokens of ``id``. Immutable: its tensors are never written to.

    A checkpoint also has ``states``, which are valid only after its last token: bytes in the format of their maker, U8
    ``[bytes]``.
    """

    id: BlockId
    pages: tuple[Page, ...]
    depth_tokens: int = 0
    """Tokens before it in its chain."""
    states: torch.Tensor | None = None
    arrive: Callable[[], None] = arrived
    """Blocks until the pages hold their bytes, which may still be on their way from a device. Raises
    ``UnavailableError`` if they do not come."""

    @property
    def nbytes(self) -> int:
        """Bytes of all pages and states."""
        return sum(page.nbytes for page in self.pages) + (0 if self.states is None else self.states.nbytes)


@dataclass(frozen=True, slots=True)
class Entry:
    """The data of a tier on a block that can be found.

    Attributes:
        key: its key.
        parent: the key of the block before it, or its root.
        root: identifies everything else that decides its K and V.
        tokens: its token ids.
        depth_tokens: tokens before it in its chain.
        nbytes: the bytes that it takes.
        children: blocks of the tier whose parent it is.
        uses: turns that used it.
        hits: how often it was restored.
        used_at: Unix time of its last use.
        pinned: whether it is never evicted.
        is_window: whether it is a window block (``BlockId.is_window``).
    """

    key: str
    parent: str
    root: str
    tokens: int
    depth_tokens: int
    nbytes: int
    children: int
    uses: int
    hits: int
    used_at: float
    pinned: bool
    is_window: bool = False


class BlockReader(Protocol):
    """One block of a tier, opened for reading layer by layer. May be read by several threads at once.

    ``page``, ``states`` and what ``landing`` returns raise ``BlockError`` when the bytes cannot be read, or differ from
    the written ones.
    """

    id: BlockId
    tier: str

    @property
    def spec(self) -> KVSpec:
        """Its layers."""

    @property
    def is_plain(self) -> bool:
        """Whether pages need no decoding: landing a page is a plain copy."""

    def page(self, layer: int) -> Page:
        """Return the page of ``layer``."""

    def landing(self, layer: int, first: int, last: int, view: PageView, *, check: bool = True) -> Landing:
        """Prepare to put the tokens ``[first, last)`` of the page of ``layer`` into ``view``, which has their size.

        Without ``check`` the bytes are trusted: they were checked before. After an error ``view`` holds undefined
        values.
        """

    def states(self) -> torch.Tensor | None:
        """Return the states of a checkpoint, U8 ``[bytes]``, read only. None for other blocks."""

    def detach(self) -> None:
        """Stay open for long: hold no memory for this reader."""

    def close(self) -> None:
        """Release all resources, the lease too. Returned pages stay valid."""
