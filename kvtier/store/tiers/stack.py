"""TierStack: the tiers of one store, the fastest first. No other module knows their number or order.

A store has two tiers of its own, RAM and files. Both are ordered: they find a prefix to the token, and names, pins and
sums refer to them. Custom tiers may lie below. They know blocks only by key: they keep a copy of each full block, and
are asked for blocks that the store's own tiers lack.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Any, TypeVar

import numpy as np

from kvtier.errors import BlockError, GoneError, StoreError, UnavailableError
from kvtier.store.block import Block, BlockReader, Entry
from kvtier.store.chain import BlockId, TokenIds
from kvtier.store.eviction.base import EvictionPolicy
from kvtier.store.tiers.base import OrderedTier, Outcome, Presence, Tier, TierStats, close_all, is_asked_for, is_open
from kvtier.store.tiers.disk.catalog.connection import Connect
from kvtier.store.tiers.disk.catalog.database import Database
from kvtier.store.tiers.disk.catalog.ranking import Place
from kvtier.store.tiers.disk.folder import StoreFolder
from kvtier.store.tiers.disk.names import Names
from kvtier.store.tiers.disk.recovery import OpenedFolder, open_folder
from kvtier.store.tiers.disk.tier import DiskTier
from kvtier.store.tiers.disk.writes import DiskSettings
from kvtier.store.tiers.host.tier import HostTier
from kvtier.store.tiers.lower import LowerTier

Found = TypeVar("Found", BlockId, Entry)

_log = logging.getLogger("kvtier.store")
_FIRST_BLOCKS = 4  # of a chain that are asked for first
_MORE_BLOCKS = 8  # how many times as many are asked for next


class TierStack:
    """RAM, files where a folder is given, and custom tiers below.

    Reads ask the fastest tier first. Writes go to RAM at once; ``put_below`` writes to the tiers below, behind the
    caller. Names refer to the blocks of ``last``. A failing durable tier raises nothing in a turn: it warns once, and
    its blocks are misses.

    Args:
        folder: holds the files; None keeps everything in RAM.
        host_budget_bytes: upper limit for the bytes of all tensors in RAM.
        disk: settings of the file tier.
        policy: decides which block is evicted first.
        connect: opens connections to the catalog.
        clock: Unix time.
        lower: custom tiers below, the nearest first.
        block_size: tokens of a full block; ``lower`` tiers keep no others.
        before_waiting: called before a put waits for room in RAM; runs waiting writes soon.
        saved_seconds: what loading a block from a tier, by its name, saves: see ``SavedSeconds`` of eviction.

    Attributes:
        block_size: see above.
        host: the RAM tier.
        tiers: the store's own tiers.
        last: the last of them, to whose blocks names refer.
        is_durable: whether there are files: names and blocks then outlive the process.
        has_lower: whether there are tiers below the store's own.
        writes_behind: whether there is a tier below RAM, which is written behind the caller.
        names: names of chains.
        database: the rows behind names and files.
        opened: the folder, open; None without one.

    Raises:
        StoreError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: StoreFolder | None,
        host_budget_bytes: int,
        disk: DiskSettings,
        policy: EvictionPolicy,
        connect: Connect,
        clock: Callable[[], float],
        lower: Sequence[Tier],
        block_size: int,
        before_waiting: Callable[[], None],
        saved_seconds: Callable[[str, str, int, int, int], float],
    ) -> None:
        self.block_size = block_size
        self._lower = [LowerTier(tier, clock) for tier in lower]
        self._pinned: frozenset[str] = frozenset()  # used without a folder: files are pinned by their rows
        self.opened: OpenedFolder | None = None
        self._disk: DiskTier | None = None
        if folder is None:
            self.database = Database(None)
            self.names = Names(self.database, None, clock)
        else:
            saved = partial(saved_seconds, DiskTier.name)
            self.opened = opened = open_folder(folder, policy, clock, connect, saved, disk.progress)
            self.database, self.names = opened.database, opened.names
            self._disk = DiskTier(folder, opened.catalog, opened.owner, disk, clock)
            self._disk.expire()
            self._disk.trim()
        self.host = HostTier(
            host_budget_bytes,
            policy,
            clock,
            lambda: self._pinned,
            disk.ttl_seconds,
            before_waiting,
            saved_seconds=partial(saved_seconds, HostTier.name),
        )
        self.tiers: tuple[OrderedTier, ...] = (self.host, self._disk) if self._disk is not None else (self.host,)
        self._all: tuple[OrderedTier | LowerTier, ...] = (*self.tiers, *self._lower)
        self.last = self.tiers[-1]
        self.is_durable, self.has_lower = folder is not None, bool(lower)
        self.writes_behind = self.is_durable or self.has_lower

    # --- finding ----------------------------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        """Whether one of the store's own tiers has a block that can be opened."""
        return any(key in tier for tier in self.tiers)

    def nearest(self, parent: str, tokens: TokenIds, *, windows: bool = False) -> Iterator[BlockId]:
        """Yield blocks after ``parent``, among them one with the longest common prefix with ``tokens``.

        Only window blocks count with ``windows``, and all others without.
        """
        for tier in self.tiers:
            yield from tier.nearest(parent, tokens, windows=windows)

    def tails(self, parent: str, tokens: TokenIds) -> Iterator[BlockId]:
        """Yield the blocks of all kinds after ``parent`` whose ids are a proper prefix of ``tokens``."""
        for tier in self.tiers:
            yield from tier.tails(parent, tokens)

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a block of the store's own tiers."""
        return next((found for tier in self.tiers if (found := tier.find(key)) is not None), None)

    def find_all(self, keys: Iterable[str]) -> dict[str, BlockId]:
        """Return the identities of the blocks among ``keys`` that the store's own tiers have, by key."""
        return _first_of([tier.find_all for tier in self.tiers], keys)

    def find_below(self, block: Entry | BlockId) -> BlockId | None:
        """Return the identity of a block of the lower tiers; it is opened to read its ids.

        Raises:
            StoreError: it cannot be opened now.
        """
        block = BlockId(block.key, block.parent, block.root, np.empty(0, dtype=np.int64))
        for tier in self._lower:
            (outcome,) = tier.open_all([block])
            if isinstance(outcome, UnavailableError) and not isinstance(outcome, GoneError):
                raise StoreError(f"a block below cannot be read now: {outcome}; try again later") from outcome
            if is_open(outcome):
                outcome.close()
                return outcome.id
        return None

    def present_run(self, chain: Iterator[BlockId], *, below: bool = True) -> list[BlockId]:
        """Return the blocks that ``chain`` begins with, up to the first that no tier can open.

        Without ``below``, only the store's own tiers are asked.

        A lower tier is asked once, for the whole chain at once. Where there is none, the chain is hashed and asked for
        piece by piece: most prompts that are not stored differ early.
        """
        run: list[BlockId] = []
        sizes = iter([sys.maxsize]) if self._lower and below else (_FIRST_BLOCKS * _MORE_BLOCKS**n for n in count())
        for size in sizes:
            piece = list(islice(chain, size))
            if not piece:
                break
            present = self.present([block.key for block in piece], below=below)
            for block in piece:
                if block.key not in present:
                    return run
                run.append(block)
        return run

    def present(self, keys: Sequence[str], *, below: bool = True) -> set[str]:
        """Return the subset of ``keys`` that some tier can open, or one of the store's own. Each tier is asked once."""
        found: set[str] = set()
        for tier in self._all if below else self.tiers:
            left = [key for key in keys if key not in found]
            if not left:
                break
            answer = tier.presence(left) if isinstance(tier, LowerTier) else tier.presence(left).result()
            found.update(key for key, it in zip(left, answer, strict=True) if it is Presence.PRESENT)
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

    def open_all(self, blocks: Sequence[BlockId]) -> dict[str, Outcome]:
        """Open blocks for reading, each in the fastest tier that has it.

        Returns:
            By key: a reader, an error, or None when no tier has the block.
        """
        found: dict[str, Outcome] = {}
        try:
            for block in blocks:
                found[block.key] = self._open_here(block)
            for tier in self._lower:
                left = [*(block for block in blocks if not is_open(found[block.key]))]
                for block, outcome in zip(left, tier.open_all(left), strict=True):
                    here = found[block.key]
                    if is_open(outcome) or here is None:
                        found[block.key] = outcome
                    if is_open(outcome) and isinstance(here, BlockError) and not isinstance(here, UnavailableError):
                        _log.warning("a stored block was removed: %s; it is read from the tier %r", here, tier.name)
                        self.discard([block.key])  # it is damaged here
        except BaseException:
            close_all(found.values())
            raise
        return found

    def _open_here(self, block: BlockId) -> Outcome:
        for tier in self.tiers:
            try:
                reader = tier.open(block)
            except BlockError as error:
                return error
            if reader is None:
                continue
            if not is_asked_for(reader.id, block):
                reader.close()
                return BlockError(f"block {block.key[:12]} holds other tokens than its key says")
            return reader
        return None

    # --- entries ----------------------------------------------------------------------------------------------------

    def entries_of(self, key: str) -> list[Entry | None]:
        """Return the entry of a block in each of the store's own tiers, the last first."""
        return [tier.entry(key) for tier in reversed(self.tiers)]

    def linked(self) -> list[Mapping[str, Entry]]:
        """Return the blocks of named chains, and those beside them, by key: of each own tier, the last first."""
        return [{entry.key: entry for entry in tier.linked_entries()} for tier in reversed(self.tiers)]

    def entries(self, *, all_or_nothing: bool = False) -> Iterable[Entry]:
        """Return one entry for every block: that of files first, then RAM, then the lower tiers.

        Raises:
            StoreError: a lower tier cannot list its blocks, and ``all_or_nothing`` is asked for.
        """
        found: dict[str, Entry] = {}
        for lower in self._lower:
            listed = lower.entries()
            if listed is None and all_or_nothing:
                raise StoreError(f"the tier {lower.name!r} cannot list its blocks now; try again later")
            found.update((entry.key, entry) for entry in listed or ())
        for tier in self.tiers:
            found.update((entry.key, entry) for entry in tier.entries())
        return found.values()

    def kept_entries(self, keys: Iterable[str]) -> dict[str, Entry]:
        """Return the entries of blocks, by key, even if their removal failed and lookups no longer find them."""
        return _first_of([tier.kept_entries for tier in reversed(self.tiers)], keys)

    def description(self, root: str) -> Mapping[str, Any]:
        """Return the description of ``root``; empty when the durable tier has none."""
        return self._disk.description(root) if self._disk is not None else {}

    def describe_root(self, root: str, manifest: Mapping[str, Any], *, anew: bool) -> None:
        """Store the description of ``root`` in the durable tier; without ``anew`` an existing one stays."""
        if self._disk is not None:
            self._disk.describe_root(root, manifest, anew=anew)

    def costs(self, root: str) -> Mapping[str, Any]:
        """Return what the durable tier has kept of the costs of ``root``."""
        return self._disk.costs(root) if self._disk is not None else {}

    def keep_costs(self, root: str, costs: Mapping[str, Any]) -> None:
        """Keep the costs of ``root`` in the durable tier."""
        if self._disk is not None:
            self._disk.keep_costs(root, costs)

    def lookup_below(self) -> tuple[str, float] | None:
        """Return the name of the first lower tier, and for how long lookups below have waited lately; None for none."""
        if not self._lower:
            return None
        return self._lower[0].name, sum(tier.lookup_seconds for tier in self._lower)

    def where(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the name of the tier that each block would be read from; those that none has are left out.

        Blocks of a lower tier are not looked for again: they are taken to be in the first of them.
        """
        found: dict[str, str] = {}
        for tier in self.tiers:
            left = [key for key in keys if key not in found]
            answer = tier.presence(left).result() if left else ()
            found.update((key, tier.name) for key, it in zip(left, answer, strict=True) if it is Presence.PRESENT)
        if self._lower:
            found |= {key: self._lower[0].name for key in keys if key not in found}
        return found

    # --- keeping ----------------------------------------------------------------------------------------------------

    def put_below(self, block: Block, *, in_turn: bool = False) -> bool:
        """Write a block to disk, and to the lower tiers if it is full and has no states.

        ``in_turn``: the caller is a turn, not a thread behind it.

        Returns whether a tier that outlives RAM has it, or RAM where there is no disk.
        """
        try:
            block.arrive()
        except UnavailableError as error:
            _log.warning("a block is not written: %s", error)
            return False
        kept = [bool(self._disk.put(block, in_turn=in_turn))] if self._disk is not None else [block.id.key in self.host]
        below = [bool(tier.put(block)) for tier in self._lower] if self._goes_below(block) else []
        return any(kept) or (self._disk is None and any(below))

    def _goes_below(self, block: Block) -> bool:
        return len(block.id.tokens) == self.block_size and block.states is None

    def absent_below(self, keys: Sequence[str]) -> list[str]:
        """Return the blocks of RAM among ``keys`` that a tier below should have and lacks, in order.

        A tier that fails lacks none.
        """
        absent = set(self._disk.absent(keys)) if self._disk is not None else set()
        full = [key for key in keys if (block := self.host.block(key)) is not None and self._goes_below(block)]
        for tier in self._lower:
            absent.update(k for k, it in zip(full, tier.presence(full), strict=True) if it is Presence.ABSENT)
        return [key for key in keys if key in absent]

    def touch_below(self, keys: Sequence[str], hits: Mapping[str, int]) -> None:
        """Note below RAM that a turn used these blocks now, and how often blocks were restored."""
        if self._disk is not None:
            self._disk.touch(keys, hits)
        for tier in self._lower:
            tier.touch(keys, hits)

    def flush_below(self) -> None:
        """Wait until the blocks of the lower tiers outlive this process, and overwrite removed rows."""
        self.database.finish_overwriting()
        for tier in self._lower:
            tier.flush()

    def tell_names(self, tell: Callable[[Names], None]) -> None:
        """Change names in a turn; where they have files, a failure is warned about once."""
        if self._disk is None:
            tell(self.names)
            self.refresh_pins()
            return
        try:
            self._disk.ask(lambda: tell(self.names), None)
        except OSError as error:
            self._disk.failures.warn("names", f"cannot write the file of a name in {self._disk.folder.path} ({error})")

    # --- leaving ----------------------------------------------------------------------------------------------------

    def withhold(self, keys: Iterable[str]) -> None:
        """Hide unreadable blocks from lookups for a while. They stay stored."""
        keys = list(keys)
        for tier in self._all:
            tier.withhold(keys)

    def discard(self, keys: Iterable[str]) -> None:
        """Forget damaged blocks of the store's own tiers. A lower tier forgets its own."""
        for key in keys:
            for tier in self.tiers:
                tier.discard(key)

    def discard_unread(self, keys: Sequence[str]) -> None:
        """Forget blocks, except blocks being read whose bytes would stay."""
        for tier in self.tiers:
            tier.discard_unread(keys)

    def remove(self, keys: Sequence[str], below: Sequence[str] = ()) -> list[str]:
        """Remove blocks for the owner of the store, in all tiers; ``below`` in the lower tiers alone.

        Returns the names of lower tiers that could not be told.

        Raises:
            OSError: the folder fails.
            sqlite3.Error: the catalog fails, or is locked.
        """
        self.host.discard_unread(keys)
        every = list(dict.fromkeys([*keys, *below]))
        untold = [tier.name for tier in self._lower if every and not tier.discard_all(every)]
        if self._disk is not None and keys:
            self._disk.remove(keys)
        return untold

    def expire(self) -> None:
        """Forget the expired blocks of the store's own tiers."""
        for tier in self.tiers:
            tier.expire()

    def shrink(self, to_bytes: int) -> None:
        """Evict in every tier until its blocks take no more than ``to_bytes``, or no more can be evicted.

        Raises:
            sqlite3.Error: the catalog fails.
        """
        for tier in self._all:
            tier.shrink(to_bytes)

    def would_evict(self, nbytes: int) -> list[Place]:
        """Return the files that would be evicted next to free ``nbytes``, in order; none without a folder."""
        return self._disk.would_evict(nbytes) if self._disk is not None else []

    def expired(self) -> list[str]:
        """Return the keys of files that were not used for as long as blocks are kept."""
        return self._disk.expired() if self._disk is not None else []

    def refresh_pins(self) -> None:
        """Pass the pinned blocks to the RAM tier; with a disk tier, its rows hold the pins."""
        if self._disk is None:
            pinned = frozenset(self.names.pinned_blocks()) if len(self.names) else frozenset[str]()
            if pinned != self._pinned:
                self._pinned = pinned

    # --- care -------------------------------------------------------------------------------------------------------

    def stats(self, tally: Mapping[str, int]) -> tuple[TierStats, ...]:
        """Return the statistics of each tier; ``tally`` has ``hits.<tier>``."""
        return tuple(tier.stats(tally.get(f"hits.{tier.name}", 0)) for tier in self._all)

    @property
    def counts(self) -> Mapping[str, int]:
        """Counts of writes and failures below RAM."""
        found = Counter(self._disk.counts if self._disk is not None else ())
        for tier in self._lower:
            found.update(tier.counts)
        return found

    @property
    def paused(self) -> str | None:
        """Why writes to the durable tier are paused; None when they are not."""
        return self._disk.paused if self._disk is not None else None

    def warn_of_stall(self) -> None:
        """Count that the durable tier does not keep up, and warn once."""
        if self._disk is not None:
            self._disk.failures.count("errors.write")
            self._disk.failures.warn("stall", f"writing to {self._disk.folder.path} hangs; new blocks stay in RAM only")

    def close(self) -> None:
        """End leases, and release files."""
        for tier in self._lower:
            tier.close()
        if self._disk is not None:
            self._disk.close()
        self.database.close()
        if self.opened is not None:
            self.opened.owner.close()


def _first_of(asked: Iterable[Callable[[Sequence[str]], Iterable[Found]]], keys: Iterable[str]) -> dict[str, Found]:
    """Return what is found under ``keys``, by key. Each of ``asked`` is asked for what those before it lack."""
    wanted = list(keys)
    found: dict[str, Found] = {}
    for ask in asked:
        left = [key for key in wanted if key not in found]
        found.update((each.key, each) for each in (ask(left) if left else ()))
    return found
