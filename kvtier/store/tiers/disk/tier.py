"""DiskTier: one safetensors file for each block, under a byte budget, found through the catalog."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from kvtier.errors import BlockError, GoneError
from kvtier.platform.fork_safety import Rank, take_part
from kvtier.store.block import Block, BlockReader, Entry
from kvtier.store.chain import BlockId, TokenIds
from kvtier.store.format.block_file import BlockFile, encode_block
from kvtier.store.tiers.backoff import Backoff, Withheld, is_full, is_locked
from kvtier.store.tiers.base import Presence, PutResult, TierStats, answered, opened
from kvtier.store.tiers.disk.catalog.blocks import Catalog
from kvtier.store.tiers.disk.catalog.ranking import Place
from kvtier.store.tiers.disk.eviction import Eviction
from kvtier.store.tiers.disk.failures import Failures
from kvtier.store.tiers.disk.file_leases import FileLeases
from kvtier.store.tiers.disk.folder import COSTS_BYTES, MANIFEST_BYTES, StoreFolder, read_record
from kvtier.store.tiers.disk.owners import Owner
from kvtier.store.tiers.disk.writes import DiskSettings, NoRoom, Writes
from kvtier.store.tiers.leases import Leases
from kvtier.store.tiers.shared_reads import ReadCoalescer, SharedReader

_log = logging.getLogger("kvtier.store.disk")


class DiskTier:
    """Blocks as files of ``folder``, within the limits of ``settings``.

    A write that fails is warned about once and undone, and the block is not stored; nothing is raised in a turn. A
    block that any process is reading is not evicted. ``counts`` and ``ask`` are those of ``failures``.

    Args:
        folder: the files.
        catalog: the rows.
        owner: marks writes and deletions that this tier has begun.
        settings: limits and codec.
        clock: Unix time.
    """

    name = "disk"

    def __init__(
        self, folder: StoreFolder, catalog: Catalog, owner: Owner, settings: DiskSettings, clock: Callable[[], float]
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.catalog = catalog
        self.leases = Leases()
        self.failures = Failures(folder)
        self.counts, self.ask = self.failures.counts, self.failures.ask
        self._owner = owner
        self._clock = clock
        self._between = FileLeases(folder.leases)  # leases between processes
        self._loads = ReadCoalescer(self.leases)
        self._backoff = Backoff(clock)
        self._lost: set[str] = set()  # blocks that a failing catalog could not forget
        self._withheld = Withheld(clock)
        self._eviction = Eviction(folder, catalog, owner, self.leases, self._between, self.failures)
        self._writes = Writes(folder, catalog, owner, settings, self._eviction, self.failures)
        take_part(self, Rank.DISK)

    def before_fork(self) -> None:
        """Do nothing: writes go on, and do not concern the child."""

    def after_fork(self, in_child: bool) -> None:
        """Drop, in a child, the locks and unfinished writes of its parent's threads."""
        if in_child:
            self.failures.begin_anew()
            self._writes.begin_anew()

    @property
    def paused(self) -> str | None:
        """Why writes are paused; None when they are not."""
        return self._backoff.reason

    # --- storing ----------------------------------------------------------------------------------------------------

    def description(self, root: str) -> Mapping[str, Any]:
        """Return the description of ``root``; empty when there is none, or it cannot be read."""
        try:
            found = read_record(self.folder.root(root), MANIFEST_BYTES)
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def describe_root(self, root: str, manifest: Mapping[str, Any], *, anew: bool = True) -> None:
        """Write the description of ``root`` to ``roots/``; a failure is warned about once.

        An existing description that differs is damaged, since a root is derived from its description; it is written
        anew. Without ``anew`` it stays, if it can be read.
        """
        path = self.folder.root(root)
        wanted = json.loads(json.dumps(dict(manifest), default=str))
        try:
            try:
                if read_record(path, MANIFEST_BYTES) == wanted or not anew:
                    return
                self.failures.warn(str(path), f"{path} does not match its root; rewritten")
            except FileNotFoundError:
                pass
            except (ValueError, RecursionError) as error:
                self.failures.warn(str(path), f"{path} is damaged ({error}); written anew")
            self.folder.write_json(path, manifest)
        except OSError as error:
            self._cannot_write(error)

    def costs(self, root: str) -> Mapping[str, Any]:
        """Return what was kept of the costs of ``root``; empty when there is nothing, or it cannot be read."""
        try:
            found = read_record(self.folder.costs(root), COSTS_BYTES)
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def keep_costs(self, root: str, costs: Mapping[str, Any]) -> None:
        """Keep the costs of ``root`` for other processes; a failure is warned about once."""
        try:
            self.folder.write_json(self.folder.costs(root), costs)
        except OSError as error:
            self._cannot_write(error)

    def _cannot_write(self, error: BaseException) -> None:
        self.failures.count("errors.write")
        self.failures.warn("write", f"cannot write to {self.folder.path} ({error}); new blocks are not kept on disk")

    def put(self, block: Block, *, in_turn: bool = False) -> PutResult:
        """Write ``block`` unless it is stored.

        ``in_turn``: the caller is a turn, which must not wait for a choice of the codec.
        """
        if self._backoff.holds() and not (self._backoff.told and self._has_room()):
            return PutResult.UNAVAILABLE
        try:
            choose = self.settings.choose
            codec = self.settings.codec if choose is None or in_turn else choose(block)
            kept = self._writes.write(block.id, encode_block(block, codec))
        except NoRoom as error:
            self.failures.warn("budget", f"{error}; the rest of such sequences is not kept in {self.folder.path}")
            return PutResult.NO_ROOM
        except (BlockError, OSError, sqlite3.Error) as error:
            if is_full(error):
                self._backoff.begin(f"the drive is full ({error})", told=not self._has_room())
            elif is_locked(error):
                self._backoff.begin(f"another process holds the catalog ({error})", told=False)
            self._cannot_write(error)
            return PutResult.UNAVAILABLE
        if self._backoff.end():
            _log.info("writing to %s goes on", self.folder.path)
        self._lost.discard(block.id.key)
        return PutResult.KEPT if kept else PutResult.UNAVAILABLE

    def _has_room(self) -> bool:
        """Whether the drive has free space; quotas and inode limits do not show there."""
        try:
            return self.folder.free_bytes() > self.settings.floor_bytes
        except OSError:
            return False

    # --- leaving ----------------------------------------------------------------------------------------------------

    def discard(self, key: str) -> None:
        """Forget a block and delete its file; unknown keys are ignored."""
        self.discard_all([key])

    def discard_unread(self, keys: Iterable[str]) -> list[Place]:
        """Forget blocks and delete their files, except blocks being read; return the forgotten ones.

        A file deleted during a read takes its bytes until the read ends, uncounted.
        """
        gone: list[Place] = []
        for key in keys:
            if not self._eviction.is_read(key):
                try:
                    gone += self.discard_all([key])
                finally:
                    self._between.unclaim(key)
        return gone

    def discard_all(self, keys: Sequence[str]) -> list[Place]:
        """Forget blocks and delete their files, even if they are being read; return the forgotten ones."""
        try:
            return self.remove(keys)
        except (OSError, sqlite3.Error) as error:
            self.failures.count("errors.delete")
            self.failures.warn("discard", f"cannot delete a block in {self.folder.path}: {error}")
            return []

    def remove(self, keys: Sequence[str]) -> list[Place]:
        """Do the same for the owner of the store, and raise if it fails.

        Raises:
            OSError: the folder fails.
            sqlite3.Error: the catalog fails, or is locked. This process no longer finds the blocks.
        """
        for key in keys:
            self._loads.forget(key)
        self._lost.update(keys)  # even if the catalog cannot be written: a damaged block must not be found again
        gone = self.catalog.discard(keys, self._owner.name)
        self._lost.difference_update(keys)
        self._eviction.delete(gone)
        return gone

    def expire(self) -> list[Place]:
        """Forget blocks that were not used for ``settings.ttl_seconds``."""
        gone = self.discard_unread(self.expired())
        self.failures.count("expirations", len(gone))
        return gone

    def expired(self) -> list[str]:
        """Return the keys of blocks that were not used for ``settings.ttl_seconds``."""
        return [] if self.settings.ttl_seconds is None else self.unused_since(self._since)

    def unused_since(self, since: float) -> list[str]:
        """Return the keys of blocks that were last used before ``since`` (Unix time) and are not pinned."""
        return self.ask(lambda: self.catalog.unused_since(since), list[str]())

    @property
    def _since(self) -> float:
        """Earliest last use (Unix time) of a block that is not expired."""
        ttl = self.settings.ttl_seconds
        return self._clock() - ttl if ttl is not None else float("-inf")

    def trim(self) -> None:
        """Evict blocks beyond the budget, which may have been larger when they were written."""
        gone = self.ask(lambda: self.shrink(self.settings.budget_bytes), list[Place]())
        if gone:
            _log.info("%d blocks left %s: its budget is smaller than it was", len(gone), self.folder.path)

    def shrink(self, to_bytes: int) -> list[Place]:
        """Evict until all blocks take at most ``to_bytes``, or no more can be evicted; return evicted blocks.

        Raises:
            sqlite3.Error: the catalog fails.
        """
        return self._eviction.shrink(to_bytes)

    def would_evict(self, nbytes: int) -> list[Place]:
        """Return the blocks that would be evicted next to free ``nbytes``, in order.

        Raises:
            sqlite3.Error: the catalog fails.
        """
        return self._eviction.would_evict(nbytes)

    # --- finding ----------------------------------------------------------------------------------------------------

    def withhold(self, keys: Iterable[str]) -> None:
        """Hide unreadable blocks from lookups for a while, longer each time."""
        self._withheld.add(keys)

    def _is_found(self, key: str) -> bool:
        """Whether a block, if it has a row, can be found."""
        return key not in self._lost and key not in self._withheld

    def __contains__(self, key: str) -> bool:
        return self._is_found(key) and self.ask(lambda: self.catalog.contains(key, self._since), False)

    def presence(self, keys: Sequence[str]) -> Future[Sequence[Presence]]:
        """Say of each of ``keys`` whether the block can be opened; ``UNAVAILABLE`` when the catalog fails."""
        ready = self.ask(lambda: self.catalog.ready(keys, self._since), None)
        if ready is None:
            return answered([Presence.UNAVAILABLE] * len(keys))
        return answered([Presence.PRESENT if key in ready and self._is_found(key) else Presence.ABSENT for key in keys])

    def absent(self, keys: Sequence[str]) -> list[str]:
        """Return the subset of ``keys`` neither stored nor being written; none when the catalog fails."""
        return self.ask(lambda: self.catalog.absent(keys), list[str]())

    def nearest(self, parent: str, tokens: TokenIds, *, windows: bool = False) -> Sequence[BlockId]:
        """Return blocks after ``parent``, among them one with the longest common prefix with ``tokens``.

        Only window blocks count with ``windows``, and all others without.
        """
        found = self.ask(lambda: self.catalog.nearest(parent, tokens, self._since, windows=windows), list[BlockId]())
        return [block for block in found if self._is_found(block.key)]

    def tails(self, parent: str, tokens: TokenIds) -> Sequence[BlockId]:
        """Return the blocks after ``parent`` whose ids are a proper prefix of ``tokens``."""
        found = self.ask(lambda: self.catalog.tails(parent, tokens), list[BlockId]())
        return [block for block in found if self._is_found(block.key)]

    def entry(self, key: str) -> Entry | None:
        """Return the entry of a stored block."""
        return self.ask(lambda: self.catalog.entry(key), None) if key not in self._lost else None

    def kept_entries(self, keys: Sequence[str]) -> list[Entry]:
        """Return the entries of the blocks ``keys``, even if their removal failed and lookups no longer find them."""
        return self.ask(lambda: self.catalog.entries_of(keys), list[Entry]())

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a stored block."""
        return self.ask(lambda: self.catalog.find(key), None)

    def find_all(self, keys: Sequence[str]) -> list[BlockId]:
        """Return the identities of the stored blocks among ``keys``, in any order."""
        return self.ask(lambda: self.catalog.find_all(keys), list[BlockId]())

    def entries(self) -> list[Entry]:
        """Return the entries of all blocks."""
        return self.ask(self.catalog.entries, list[Entry]())

    def linked_entries(self) -> list[Entry]:
        """Return the entries of the blocks of all named chains, and of those that have the same parents."""
        return self.ask(self.catalog.linked_entries, list[Entry]())

    def open(self, block: BlockId) -> SharedReader | None:
        """Open a block for reading, with a lease on it; None when it is not (or no longer) stored.

        Raises:
            UnavailableError: its file cannot be opened now.
            BlockError: its file is missing or damaged.
        """
        if block.key not in self:
            return None
        try:
            return self._loads.open(block, lambda: self._open(block))
        except GoneError:
            return None

    def open_all(self, blocks: Sequence[BlockId]) -> list[Future[BlockReader | None]]:
        """Open blocks for reading, one after the other."""
        return opened(self.open, blocks)

    def _open(self, block: BlockId) -> BlockFile:
        if not self._between.share(block.key):
            raise GoneError(f"block {block.key[:12]} is being evicted")
        path = self.folder.block(block.key, block.root)
        try:
            file = self.folder.block_file(path)
        except BaseException as error:
            self._between.release(block.key)
            if isinstance(error.__cause__, FileNotFoundError) and block.key not in self:
                raise GoneError(f"{path} is gone") from error
            if isinstance(error, BlockError):
                self.failures.count("errors.read")
            raise
        file.when_closed(partial(self._between.release, block.key))
        if (file.id.key, file.id.parent, file.id.root) != (block.key, block.parent, block.root):
            file.close()
            raise BlockError(f"{path} holds another block than the catalog says")
        return file

    def flush(self) -> None:
        """Do nothing: every stored block is in its place, as durable as the folder makes it."""

    def close(self) -> None:
        """Close the lease file, once no block is being read. May be called more than once."""
        self._between.close()

    # --- counting ---------------------------------------------------------------------------------------------------

    def touch(self, keys: Sequence[str], hits: Mapping[str, int]) -> None:
        """Note that these blocks were used now, and how often blocks were restored."""
        self.ask(lambda: self.catalog.touch(keys, hits), None)

    def stats(self, hits: int) -> TierStats:
        """Return the statistics of this tier; ``hits`` is the number of blocks restored from it."""
        blocks, pinned_blocks = self.ask(self.catalog.counts, (0, 0))
        return TierStats(
            self.name,
            nbytes=self.nbytes,
            budget_bytes=self.settings.budget_bytes,
            blocks=blocks,
            pinned_blocks=pinned_blocks,
            leased_blocks=len(self.leases),
            hits=hits,
            evictions=self.counts["evictions"],
            expirations=self.counts["expirations"],
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all block files, those being written or deleted included."""
        return self.ask(lambda: self.catalog.total_bytes, 0)

    def __len__(self) -> int:
        return self.ask(self.catalog.counts, (0, 0))[0]
