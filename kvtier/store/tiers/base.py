"""The seam of tiers: where blocks live. What the store asks of a tier, and the values that pass between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol, TypeGuard, TypeVar

import numpy as np

from kvtier.errors import BlockError
from kvtier.store.block import Block, BlockReader, Entry
from kvtier.store.chain import BlockId, TokenIds

T = TypeVar("T")
Outcome = BlockReader | BlockError | None
"""What came of opening a block: a reader, an error, or None where it is not there."""


class Presence(Enum):
    """What a tier says of a block."""

    PRESENT = auto()
    """It can be opened."""
    ABSENT = auto()
    """It is not here."""
    UNAVAILABLE = auto()
    """It may be here, and cannot be reached now. Nothing of it is forgotten."""


class PutResult(Enum):
    """What came of putting a block. True where it is kept."""

    KEPT = auto()
    """It is here now, or was before."""
    NO_ROOM = auto()
    """The budget has no room for it."""
    UNAVAILABLE = auto()
    """It cannot be kept now, or could never be found: the block that it follows is not here."""

    def __bool__(self) -> bool:
        return self is PutResult.KEPT


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier.

    Attributes:
        tier: its name: ``host``, ``disk``, or that of a tier of one's own.
        nbytes: bytes that its blocks take: tensors in RAM; on disk whole allocation units, blocks being written and
            blocks that could not be deleted yet included.
        budget_bytes: what ``nbytes`` never exceeds; 0 for none.
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
    """A place where blocks live. Thread-safe.

    A block never changes: two tiers that have a block of the same key have the same one. A tier may lose any block at
    any time that is not being read.

    A turn asks all that it needs at once, so that a tier over a network answers in one round trip. It waits for
    ``presence`` and ``open_all`` no longer than ``LONGEST_ANSWER_SECONDS`` (``lower.py``); what has not come by then is
    computed. Everything else is asked behind the turn, or by the owner of the store, and must end by itself: a call
    that hangs holds up writes to disk and the store's ``close``.

    No method raises anything but what it documents; an error of any other kind is warned of once, and counts as
    unavailable.

    Attributes:
        name: what reports call it.
    """

    name: str

    def presence(self, keys: Sequence[str]) -> Future[Sequence[Presence]]:
        """Say of each of ``keys``, in order, whether the block can be opened."""

    def open_all(self, blocks: Sequence[BlockId]) -> Sequence[Future[BlockReader | None]]:
        """Open blocks for reading, each with a lease until its reader is closed; None where one is not here.

        Key, parent and root say which; the ids may be left out. Those of the reader are compared with what was asked.
        A future that is cancelled, or was not waited for, leaves no lease behind. Its exceptions are:

        - ``UnavailableError``: the block is here, and cannot be opened now.
        - ``BlockError``: it is here, and damaged.
        """

    def put(self, block: Block) -> PutResult:
        """Keep ``block``. The tier may hold on to its tensors, and never writes to them."""

    def discard_all(self, keys: Sequence[str]) -> object:
        """Forget blocks, also those that are being read; unknown keys are ignored. Readers may finish."""

    def touch(self, keys: Sequence[str], hits: Mapping[str, int]) -> None:
        """Note that a turn used these blocks now, and how often blocks were restored; unknown keys are ignored."""

    def entries(self) -> Iterable[Entry]:
        """Return what is known of every block that can be found."""

    def shrink(self, to_bytes: int) -> object:
        """Evict until all blocks take no more than ``to_bytes``, or nothing more can go."""

    def stats(self, hits: int) -> TierStats:
        """Return its numbers; ``hits`` blocks were restored from here."""

    def flush(self) -> None:
        """Wait until all that was put outlives this process, as far as it ever will. In bounded time."""

    def close(self) -> None:
        """Let go of threads, connections and files. May be called more than once."""


class OrderedTier(Tier, Protocol):
    """A tier that knows its blocks in the order of their ids, on this machine: a turn asks it step by step.

    It finds a prefix to the token. A tier without order finds whole blocks, by their keys.
    """

    def __contains__(self, key: str) -> bool:
        """Whether the block can be opened."""

    def nearest(self, parent: str, tokens: TokenIds, *, windows: bool = False) -> Sequence[BlockId]:
        """Return blocks that follow ``parent``, among them one that shares the longest run with ``tokens``.

        With ``windows`` only window blocks count. Without, window blocks are skipped: one with the same ids as a block
        of the chain never hides it.
        """

    def tails(self, parent: str, tokens: TokenIds) -> Sequence[BlockId]:
        """Return the blocks of all kinds after ``parent`` that ``tokens`` begin with, and go beyond."""

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a block that lives here."""

    def entry(self, key: str) -> Entry | None:
        """Return what is known of a block that lives here."""

    def find_all(self, keys: Sequence[str]) -> Sequence[BlockId]:
        """Return the identities of the blocks among ``keys`` that live here, in any order."""

    def kept_entries(self, keys: Sequence[str]) -> Sequence[Entry]:
        """Return the entries of blocks, also of those that no turn finds since they could not be removed."""

    def linked_entries(self) -> Iterable[Entry]:
        """Return the entries of all blocks of named chains and of those with the same parents; maybe of others."""

    def open(self, block: BlockId) -> BlockReader | None:
        """Open a block at once.

        Raises:
            UnavailableError: it is here, and cannot be opened now.
            BlockError: it is here, but not usable.
        """

    def discard(self, key: str) -> None:
        """Forget one block; an unknown key is ignored."""

    def discard_unread(self, keys: Iterable[str]) -> object:
        """Forget blocks, but for those whose bytes would stay since they are being read."""

    def withhold(self, keys: Iterable[str]) -> None:
        """Find blocks that could not be read again only after a while. Nothing of them is forgotten."""

    def expire(self) -> object:
        """Forget blocks that were not used for as long as blocks are kept."""

    def unused_since(self, since: float) -> list[str]:
        """Return the keys of blocks that were last used before ``since`` (Unix time) and are not pinned."""


def answered(value: T) -> Future[T]:
    """Return a future that has its value already."""
    future: Future[T] = Future()
    future.set_result(value)
    return future


def opened(
    open_block: Callable[[BlockId], BlockReader | None], blocks: Iterable[BlockId]
) -> list[Future[BlockReader | None]]:
    """Return a future for each block with what ``open_block`` returns or raises, now. Interrupts are raised here."""
    futures: list[Future[BlockReader | None]] = []
    for block in blocks:
        future: Future[BlockReader | None] = Future()
        try:
            future.set_result(open_block(block))
        except Exception as error:
            future.set_exception(error)
        futures.append(future)
    return futures


def is_asked_for(found: BlockId, asked: BlockId) -> bool:
    """Whether ``found`` is the block ``asked`` for; ids count where ``asked`` has some."""
    same = (found.key, found.parent, found.root) == (asked.key, asked.parent, asked.root)
    return same and (not len(asked.tokens) or np.array_equal(found.tokens, asked.tokens))


def is_open(outcome: Outcome) -> TypeGuard[BlockReader]:
    """Whether a block was opened."""
    return outcome is not None and not isinstance(outcome, BlockError)


def close_all(outcomes: Iterable[Outcome]) -> None:
    """Close the readers among ``outcomes``."""
    for outcome in outcomes:
        if is_open(outcome):
            outcome.close()
