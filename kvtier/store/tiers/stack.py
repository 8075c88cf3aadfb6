"""TierStack: the tiers of one store, the fastest first. It alone knows which there are, and in which order.

A store has two tiers of its own, RAM and files. Both are ordered: they find a prefix to the token, and names, pins and
sums are about them. Below may be tiers of others, which only know blocks by their keys: they keep a copy of each full
block, and are asked for what the store's own tiers do not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from kvtier.errors import BlockError, UnavailableError
from kvtier.store.block import Block, BlockReader, Entry
from kvtier.store.chain import BlockId, TokenIds
from kvtier.store.eviction.base import EvictionPolicy
from kvtier.store.tiers.base import OrderedTier, Presence, Tier, TierStats
from kvtier.store.tiers.disk.catalog.connection import Connect
from kvtier.store.tiers.disk.catalog.database import Database
from kvtier.store.tiers.disk.folder import StoreFolder
from kvtier.store.tiers.disk.names import Names
from kvtier.store.tiers.disk.opened import OpenedFolder, open_folder
from kvtier.store.tiers.disk.tier import DiskSettings
from kvtier.store.tiers.disk.verify import Progress, VerifyReport, verify
from kvtier.store.tiers.host.tier import HostTier
from kvtier.store.tiers.lower import LowerTier

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HostSettings:
    """What the RAM tier keeps to.

    Attributes:
        budget_bytes: what all tensors take at most.
        before_waiting: called before a put waits for room: has what waits to be written written.
    """

    budget_bytes: int
    before_waiting: Callable[[], None]


class TierStack:
    """RAM and, where a folder is given, files.

    Reads ask the fastest tier first. Writes go to RAM at once; ``put_below`` writes to the durable tier, behind the
    caller. Names hold on to what the last tier has. Nothing is raised in a turn when the durable tier fails: it warns
    once, and what it had is a miss.

    Args:
        folder: of the files; None keeps everything in RAM.
        host: what the RAM tier keeps to.
        disk: what the file tier keeps to.
        policy: which block is evicted first.
        connect: what connects to the catalog.
        clock: Unix time.
        lower: tiers below, the nearest first.
        block_size: tokens of the blocks that these keep.

    Attributes:
        host: the RAM tier.
        names: names of chains.
        database: the rows behind names and files.

    Raises:
        StoreError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: StoreFolder | None,
        host: HostSettings,
        disk: DiskSettings,
        policy: EvictionPolicy,
        connect: Connect,
        clock: Callable[[], float],
        lower: Sequence[Tier] = (),
        block_size: int = 0,
    ) -> None:
        self._block_size = block_size
        self._lower = [LowerTier(tier, clock) for tier in lower]
        self._pinned: frozenset[str] = frozenset()  # of a store without folder: files are pinned by their rows
        self._folder: OpenedFolder | None = None
        if folder is None:
            self.database = Database(None)
            self.names = Names(self.database, None, clock)
        else:
            self._folder = open_folder(folder, disk, policy, connect, clock)
            self.database, self.names = self._folder.database, self._folder.names
        self.host = HostTier(
            host.budget_bytes, policy, clock, lambda: self._pinned, disk.ttl_seconds, host.before_waiting
        )
        self._disk = self._folder.tier if self._folder is not None else None
        self.tiers: tuple[OrderedTier, ...] = (self.host, self._disk) if self._disk is not None else (self.host,)

    @property
    def _all(self) -> tuple[OrderedTier | LowerTier, ...]:
        return (*self.tiers, *self._lower)

    @property
    def is_durable(self) -> bool:
        """Whether there are files: names and blocks then outlive the process."""
        return self._disk is not None

    @property
    def writes_behind(self) -> bool:
        """Whether there is a tier below RAM, which is written behind the caller."""
        return self._disk is not None or bool(self._lower)

    @property
    def last(self) -> OrderedTier:
        """The tier that names hold on to."""
        return self.tiers[-1]

    # --- finding ----------------------------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        """Whether any tier has a block that can be opened."""
        return any(key in tier for tier in self.tiers)

    def nearest(self, parent: str, tokens: TokenIds) -> Iterator[BlockId]:
        """Yield blocks that follow ``parent``, among them one that shares the longest run with ``tokens``."""
        for tier in self.tiers:
            yield from tier.nearest(parent, tokens)

    def tails(self, parent: str, tokens: TokenIds) -> Iterator[BlockId]:
        """Yield the blocks after ``parent`` that ``tokens`` begin with, and go beyond."""
        for tier in self.tiers:
            yield from tier.tails(parent, tokens)

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a block of the store's own tiers."""
        return next((found for tier in self.tiers if (found := tier.find(key)) is not None), None)

    def find_below(self, entry: Entry) -> BlockId | None:
        """Return the identity of a block that a lower tier has told of: it is opened for its ids."""
        block = BlockId(entry.key, entry.parent, entry.root, np.empty(0, dtype=np.int64))
        for tier in self._lower:
            (outcome,) = tier.open_all([block])
            if outcome is not None and not isinstance(outcome, BlockError):
                outcome.close()
                return outcome.id
        return None

    def present(self, keys: Sequence[str]) -> set[str]:
        """Return those of ``keys`` that can be opened in some tier. Each tier is asked once, for all at once."""
        found: set[str] = set()
        for answer in (*(_local(tier) for tier in self.tiers), *(tier.presence for tier in self._lower)):
            left = [key for key in keys if key not in found]
            found.update(key for key, it in zip(left, answer(left), strict=True) if it is Presence.PRESENT)
        return found

    def open(self, block: BlockId) -> BlockReader | None:
        """Open a block for reading in the fastest tier that has it; None when none has.

        Raises:
            UnavailableError: it cannot be opened now.
            BlockError: it is not usable.
        """
        found = self.open_all([block])[block.key]
        if isinstance(found, BlockError):
            raise found
        return found

    def open_all(self, blocks: Sequence[BlockId]) -> dict[str, BlockReader | BlockError | None]:
        """Open blocks for reading, each in the fastest tier that has it.

        Returns:
            By key: its reader, what is wrong with it, or None when no tier has it.
        """
        found: dict[str, BlockReader | BlockError | None] = {}
        try:
            for block in blocks:
                found[block.key] = self._open_here(block)
            for tier in self._lower:
                left = [block for block in blocks if _may_be_below(found[block.key])]
                for block, outcome in zip(left, tier.open_all(left), strict=True):
                    if outcome is not None:
                        found[block.key] = outcome
        except BaseException:
            for reader in found.values():
                if reader is not None and not isinstance(reader, BlockError):
                    reader.close()
            raise
        return {block.key: _as_asked(found[block.key], block) for block in blocks}

    def _open_here(self, block: BlockId) -> BlockReader | BlockError | None:
        for tier in self.tiers:
            try:
                reader = tier.open(block)
            except BlockError as error:
                return error
            if reader is not None:
                return reader
        return None

    # --- what is known of blocks ------------------------------------------------------------------------------------

    def entries_of(self, key: str, linked: Mapping[str, Entry] | None = None) -> list[Entry | None]:
        """Return what each tier knows of a block, the last tier first.

        Args:
            key: of the block.
            linked: what ``linked`` has returned, to be asked in the place of the last tier.
        """
        found: list[Entry | None] = [tier.entry(key) for tier in reversed(self.tiers[:-1])]
        return [self.last.entry(key) if linked is None else linked.get(key), *found]

    def linked(self) -> Mapping[str, Entry]:
        """Return what the last tier knows of all blocks that names are about, asked for at once."""
        return {entry.key: entry for entry in self.last.linked_entries()}

    def entries(self) -> Iterable[Entry]:
        """Return what is known of every block; what the store's own tiers know counts, files first."""
        found: dict[str, Entry] = {}
        last_counts: tuple[OrderedTier | LowerTier, ...] = (*self._lower, *self.tiers)
        for tier in last_counts:
            found.update((entry.key, entry) for entry in tier.entries())
        return found.values()

    def kept_entry(self, key: str) -> Entry | None:
        """Return what is known of a block, also of one that no turn finds any more since it could not be removed."""
        found = (tier.kept_entry(key) for tier in reversed(self.tiers))
        return next((entry for entry in found if entry is not None), None)

    def description(self, root: str) -> Mapping[str, Any]:
        """Return what ``root`` stands for; empty when the durable tier does not tell."""
        return self._disk.description(root) if self._disk is not None else {}

    def describe_root(self, root: str, manifest: Mapping[str, Any], *, anew: bool) -> None:
        """Note what ``root`` stands for in the durable tier; without ``anew`` what is noted there stays."""
        if self._disk is not None:
            self._disk.describe_root(root, manifest, anew=anew)

    # --- keeping ----------------------------------------------------------------------------------------------------

    def put_below(self, block: Block) -> bool:
        """Write a block to the tiers below RAM, a full one to all of them; return whether files, or names, have it."""
        kept = bool(self._disk.put(block)) if self._disk is not None else block.id.key in self.host
        if len(block.id.tokens) == self._block_size and block.states is None:
            for tier in self._lower:
                tier.put(block)
        return kept

    def absent_below(self, keys: Sequence[str]) -> list[str]:
        """Return those of ``keys`` that the durable tier neither has nor is writing; none when it fails."""
        return self._disk.absent(keys) if self._disk is not None else []

    def touch_below(self, keys: Sequence[str], hits: Mapping[str, int]) -> None:
        """Note below RAM that a turn used these blocks now, and how often blocks were restored."""
        if self._disk is not None:
            self._disk.touch(keys, hits)
        for tier in self._lower:
            tier.touch(keys, hits)

    def flush_below(self) -> None:
        """Wait until what was put into the lower tiers outlives this process, and overwrite what was removed."""
        self.database.finish_overwriting()
        for tier in self._lower:
            tier.flush()

    def tell_names(self, tell: Callable[[Names], None]) -> None:
        """Change names in a turn; where they have files, a failure is warned about once."""
        if self._disk is None:
            tell(self.names)
            return
        try:
            self._disk.ask(lambda: tell(self.names), None)
        except OSError as error:
            self._disk.warn("names", f"cannot write the file of a name in {self._disk.folder.path} ({error})")

    # --- leaving ----------------------------------------------------------------------------------------------------

    def withhold(self, keys: Iterable[str]) -> None:
        """Find blocks that could not be read again only after a while. Nothing of them is forgotten."""
        keys = list(keys)
        for tier in self._all:
            tier.withhold(keys)

    def discard(self, keys: Iterable[str]) -> None:
        """Forget damaged blocks in every tier."""
        keys = list(keys)
        for key in keys:
            for tier in self.tiers:
                tier.discard(key)
        if keys:
            self._discard_below(keys)

    def _discard_below(self, keys: Sequence[str]) -> None:
        for tier in self._lower:
            tier.discard_all(keys)

    def discard_unread(self, keys: Sequence[str]) -> None:
        """Forget blocks, but for those whose bytes would stay since they are being read."""
        for tier in self.tiers:
            tier.discard_unread(keys)

    def remove(self, keys: Sequence[str]) -> None:
        """Remove blocks for their owner.

        Raises:
            OSError: the folder fails.
            sqlite3.Error: the catalog fails, or is locked.
        """
        self.host.discard_unread(keys)
        self._discard_below(keys)
        if self._disk is not None and keys:
            self._disk.remove(keys)

    def expire(self) -> None:
        """Forget in every tier what nobody has used for as long as blocks are kept."""
        for tier in self.tiers:
            tier.expire()

    def shrink(self, to_bytes: int) -> None:
        """Evict in every tier until its blocks take no more than ``to_bytes``, or nothing more can go.

        Raises:
            sqlite3.Error: the catalog fails.
        """
        for tier in self._all:
            tier.shrink(to_bytes)

    def refresh_pins(self) -> None:
        """Let RAM know which blocks are pinned, where nothing else does."""
        if self._disk is None:
            self._pinned = frozenset(self.names.pinned_blocks())

    # --- care -------------------------------------------------------------------------------------------------------

    def stats(self, tally: Mapping[str, int]) -> tuple[TierStats, ...]:
        """Return the numbers of each tier; ``tally`` has ``hits.<tier>``."""
        return tuple(tier.stats(tally.get(f"hits.{tier.name}", 0)) for tier in self._all)

    @property
    def counts(self) -> Mapping[str, int]:
        """What was written below RAM, and what failed there."""
        found = Counter(self._disk.counts if self._disk is not None else ())
        for tier in self._lower:
            found.update(tier.counts)
        return found

    @property
    def paused(self) -> str | None:
        """Why nothing is written to the durable tier at the moment; None when writing goes on."""
        return self._disk.paused if self._disk is not None else None

    def warn_of_stall(self) -> None:
        """Count and warn, once, that the durable tier does not keep up."""
        if self._disk is not None:
            self._disk.count("errors.write")
            self._disk.warn(
                "stall", f"writing to {self._disk.folder.path} hangs; what is computed now is kept in RAM alone"
            )

    def verify(self, *, repair: bool, progress: Progress | None) -> VerifyReport:
        """Read every file, and compare files, catalog and accounting; with ``repair`` put right what can be."""
        opened = self._folder
        if opened is None:
            return VerifyReport(len(self.host), self.host.nbytes, 0.0, ())
        folder, catalog = opened.tier.folder, opened.tier.catalog
        return verify(folder, self.database, catalog, opened.audit, repair=repair, progress=progress)

    def close(self) -> None:
        """End leases, and let go of files."""
        for tier in self._lower:
            tier.close()
        if self._folder is not None:
            self._folder.tier.close()
        self.database.close()
        if self._folder is not None:
            self._folder.owner.close()


def _local(tier: OrderedTier) -> Callable[[Sequence[str]], Sequence[Presence]]:
    """Return what answers for a tier that waits for nobody."""
    return lambda keys: tier.presence(keys).result()


def _may_be_below(outcome: BlockReader | BlockError | None) -> bool:
    """Whether to ask the next tier."""
    return outcome is None or isinstance(outcome, UnavailableError)


def _as_asked(outcome: BlockReader | BlockError | None, block: BlockId) -> BlockReader | BlockError | None:
    """Return ``outcome`` if it is ``block``: ids are compared, whatever a key says."""
    if outcome is None or isinstance(outcome, BlockError):
        return outcome
    if outcome.id.root != block.root or not np.array_equal(outcome.id.tokens, block.tokens):
        outcome.close()
        return BlockError(f"block {block.key[:12]} holds other tokens than its key says")
    return outcome
