"""DiskTier: one safetensors file for each block, under a byte budget, found through the catalog."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from kvtier.errors import BlockError, GoneError
from kvtier.kv.codecs import BUILT_IN, Codec
from kvtier.platform.fork_safety import Rank, take_part
from kvtier.store.block import Block, BlockReader, Entry
from kvtier.store.chain import BlockId, TokenIds
from kvtier.store.format.block_file import BlockFile, encode_block
from kvtier.store.tiers.backoff import Backoff, Withheld, is_full, is_locked
from kvtier.store.tiers.base import Presence, PutResult, TierStats, answered, opened
from kvtier.store.tiers.block_states import State
from kvtier.store.tiers.disk.catalog.blocks import Catalog, Prepared
from kvtier.store.tiers.disk.catalog.ranking import Place
from kvtier.store.tiers.disk.file_leases import FileLeases
from kvtier.store.tiers.disk.folder import StoreFolder
from kvtier.store.tiers.disk.owners import Owner, pid_of
from kvtier.store.tiers.disk.records import MANIFEST_BYTES, read_record
from kvtier.store.tiers.leases import Leases
from kvtier.store.tiers.shared_reads import ReadCoalescer, SharedReader

_log = logging.getLogger("kvtier.store.disk")
T = TypeVar("T")
_ELSEWHERE_SECONDS = 2.0  # how long to wait for another owner to write a block
_RETRY_SECONDS = 0.01
_BATCH = 64  # blocks evicted at once: each is claimed meanwhile


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """Settings of a disk tier.

    Attributes:
        budget_bytes: upper limit for all block files, in whole allocation units of the drive.
        codec: encodes tensors.
        floor_bytes: bytes to leave free on the drive.
        ttl_seconds: how long a block is kept after its last use; None for ever.
    """

    budget_bytes: int
    codec: Codec = BUILT_IN["raw"]
    floor_bytes: int = 0
    ttl_seconds: float | None = None


class NoRoom(Exception):  # noqa: N818  nothing went wrong: the block stays out
    """A block does not fit: it is larger than the budget, or eviction cannot make room on the drive."""


class DiskTier:
    """Blocks as files of ``folder``, within the limits of ``settings``.

    A write is: prepare in the catalog, write the file, complete in the catalog. A write that fails is warned about once
    and undone, and the block is not stored; nothing is raised in a turn. A block that any process is reading is not
    evicted. ``counts`` has counts of events.

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
        self.counts: Counter[str] = Counter()
        self.leases = Leases()
        self._owner = owner
        self._clock = clock
        self._between = FileLeases(folder.leases)  # leases between processes
        self._loads = ReadCoalescer(self.leases)
        self._backoff = Backoff(clock)
        self._warned: set[str] = set()
        self._excess_bytes = 0  # bytes of a file beyond its allocation units, on this drive
        self._lost: set[str] = set()  # blocks that a failing catalog could not forget
        self._withheld = Withheld(clock)
        self._stuck: set[str] = set()  # blocks whose files could not be deleted
        self._unsettled: dict[str, BlockId] = {}  # blocks whose writes could not be undone
        self._putting = threading.RLock()
        self._sleep: Callable[[float], None] = time.sleep
        self._counting = threading.Lock()
        take_part(self, Rank.DISK)

    def before_fork(self) -> None:
        """Do nothing: writes go on, and do not concern the child."""

    def after_fork(self, in_child: bool) -> None:
        """Drop, in a child, the locks and unfinished writes of its parent's threads."""
        if in_child:
            self._putting, self._counting, self._unsettled = threading.RLock(), threading.Lock(), {}

    # --- failures ---------------------------------------------------------------------------------------------------

    def warn(self, subject: str, message: str) -> None:
        """Warn once for each ``subject``."""
        if subject not in self._warned:
            self._warned.add(subject)
            _log.warning("%s", message)

    def count(self, what: str, n: int = 1) -> None:
        """Count ``n`` events."""
        with self._counting:
            self.counts[what] += n

    def ask(self, question: Callable[[], T], otherwise: T) -> T:
        """Return the answer of the catalog; when it fails, warn once and return ``otherwise``."""
        try:
            return question()
        except sqlite3.Error as error:
            self.count("errors.catalog")
            self._mark_damage(error)
            self.warn("catalog", f"the catalog of {self.folder.path} fails ({error}); its blocks are recomputed")
            return otherwise

    def _mark_damage(self, error: sqlite3.Error) -> None:
        """If ``error`` shows a damaged catalog, mark it to be rebuilt at the next open."""
        if isinstance(error, sqlite3.DatabaseError) and any(
            word in str(error) for word in ("malformed", "not a database", "decode")
        ):
            with contextlib.suppress(OSError):
                self.folder.damage_mark.touch(0o600)

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
                self.warn(str(path), f"{path} does not match its root; rewritten")
            except FileNotFoundError:
                pass
            except (ValueError, RecursionError) as error:
                self.warn(str(path), f"{path} is damaged ({error}); written anew")
            self.folder.write_json(path, manifest)
        except OSError as error:
            self._cannot_write(error)

    def _cannot_write(self, error: BaseException) -> None:
        self.count("errors.write")
        self.warn("write", f"cannot write to {self.folder.path} ({error}); new blocks are not kept on disk")

    def put(self, block: Block) -> PutResult:
        """Write ``block`` unless it is stored."""
        if self._backoff.holds() and not (self._backoff.told and self._has_room()):
            return PutResult.UNAVAILABLE
        try:
            pieces = encode_block(block, self.settings.codec)
            size = self.folder.allocated_bytes(sum(piece.nbytes for piece in pieces)) + self._excess_bytes
            kept = self._put(block.id, pieces, size)
        except NoRoom as error:
            self.warn("budget", f"{error}; the rest of such sequences is not kept in {self.folder.path}")
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

    def _put(self, block: BlockId, pieces: Sequence[memoryview], size: int) -> bool:
        with self._putting:  # one at a time: this owner then writes only the block of this call
            try:
                self._finish()
                prepared = self._prepare_store(block, size)
                if prepared is not Prepared.RESERVED:
                    return prepared is Prepared.PRESENT
                self._write(block, pieces, size)
                self.count("written_bytes", sum(piece.nbytes for piece in pieces))
                self._count_what_it_takes(block, size)
                return self.catalog.complete_store(block.key, self._owner.name)
            except BaseException:
                self._abort_store(block)
                raise

    def _count_what_it_takes(self, block: BlockId, reserved: int) -> None:
        """Count the file of ``block`` with its size on the drive, and make room if that is more than ``reserved``.

        Raises:
            NoRoom: eviction cannot make enough.
        """
        excess = self.folder.used_bytes(self.folder.block(block.key, block.root)) - reserved
        if excess <= 0:
            return
        self._excess_bytes += excess  # the next file will take as much more
        self.catalog.set_bytes(block.key, reserved + excess)
        budget = self.settings.budget_bytes
        if not self._make_room(self.catalog.total_bytes - budget, block.parent):
            raise NoRoom(f"disk_budget={budget} has no room for a block that takes {reserved + excess} bytes there")

    def _prepare_store(self, block: BlockId, size: int) -> Prepared:
        """Reserve ``size`` bytes; evict other blocks to make room.

        Raises:
            NoRoom: eviction cannot make enough.
        """
        budget, floor = self.settings.budget_bytes, self.settings.floor_bytes
        if size > budget:
            raise NoRoom(f"disk_budget={budget} is less than a block of {size} bytes")
        give_up_at = time.monotonic() + _ELSEWHERE_SECONDS
        while True:
            prepared = self.catalog.prepare_store(block, size, budget, self._owner.name)
            if prepared is Prepared.ELSEWHERE and time.monotonic() < give_up_at:
                # It does not count as kept before it is written: its writer may fail.
                self._wait_for_writer(block.key)
                continue
            if prepared is not Prepared.NO_ROOM:
                break
            if not self._make_room(self.catalog.total_bytes + size - budget, block.parent):
                raise NoRoom(f"disk_budget={budget} has no room for a block of {size} bytes after those it follows")
        if prepared is Prepared.RESERVED:
            short = size + floor - self.folder.free_bytes()
            if short > 0 and not self._make_room(short, block.parent):
                raise NoRoom(f"free_space_floor={floor} leaves no room on the drive for a block of {size} bytes")
        return prepared

    def _write(self, block: BlockId, pieces: Sequence[memoryview], size: int) -> None:
        path = self.folder.block(block.key, block.root)
        try:
            self.folder.write(path, pieces)
        except OSError as error:
            if not is_full(error) or not self._make_room(size, block.parent):
                raise
            self.folder.write(path, pieces)

    def _wait_for_writer(self, key: str) -> None:
        """Wait a moment for the owner that is writing the block; abort its write if that owner is dead."""
        writer = self.catalog.writer(key)
        if writer is not None and not self._owner.lives(writer):
            self.catalog.abort_store(key, writer)
        else:
            self._sleep(_RETRY_SECONDS)

    def _abort_store(self, block: BlockId) -> None:
        """Undo a write that ``_put`` has begun; if that fails now, it is tried again before the next write."""
        self._unsettled[block.key] = block
        try:
            if self.catalog.writer(block.key) == self._owner.name:
                # Files first: once the row is gone, another owner may write them, and partial files would stay.
                path = self.folder.block(block.key, block.root)
                for file in (path, *self.folder.leftovers_beside(path, pid_of(self._owner.name))):
                    with contextlib.suppress(OSError):
                        self.folder.filesystem.delete(file)
                self.catalog.abort_store(block.key, self._owner.name)
            del self._unsettled[block.key]
        except sqlite3.Error as error:
            self.count("errors.catalog")
            self._mark_damage(error)

    def _finish(self) -> None:
        """Try again to undo writes and delete files where that failed."""
        for block in list(self._unsettled.values()):
            self._abort_store(block)
        self._delete_again()

    # --- leaving ----------------------------------------------------------------------------------------------------

    def _make_room(self, nbytes: int, keep: str) -> bool:
        """Evict at least ``nbytes``; return whether their files are deleted."""
        while nbytes > 0:
            with self._claims() as is_leased:
                gone = self.catalog.evict(nbytes, self._owner.name, keep, is_leased, at_most=_BATCH)
                if not gone:
                    return False
                self.count("evictions", len(gone))
                nbytes -= self._delete(gone)
        return True

    @contextmanager
    def _claims(self) -> Iterator[Callable[[Place], bool]]:
        """Yield a test whether a block is being read; it claims unread blocks, so no read begins before this ends."""
        claims: list[str] = []

        def is_leased(place: Place) -> bool:
            if self._is_read(place.key):
                return True
            claims.append(place.key)
            return False

        try:
            yield is_leased
        finally:
            for key in claims:
                self._between.unclaim(key)

    def _is_read(self, key: str) -> bool:
        """Whether block ``key`` is being read. If not, it is claimed: no read can begin before it is unclaimed."""
        return key in self.leases or not self._between.claim(key)

    def _delete(self, places: Iterable[Place]) -> int:
        """Delete the files of leaving blocks; return how many bytes that freed."""
        gone: list[str] = []
        freed = 0
        for place in places:
            path = self.folder.block(place.key, place.root)
            try:
                self.folder.filesystem.delete(path)
            except OSError as error:
                # It stays a leaving block, and counts: the budget limits real bytes.
                self._stuck.add(place.key)
                self.count("errors.delete")
                self.warn("delete", f"cannot delete {path} ({error}); it is tried again later")
                continue
            gone.append(place.key)
            freed += place.nbytes
        self.catalog.complete_delete(gone)
        self._stuck.difference_update(gone)
        return freed

    def _delete_again(self) -> None:
        """Try again to delete files that could not be deleted."""
        if self._stuck:
            mine = [place for place, _ in self.catalog.moving(State.LEAVING) if place.key in self._stuck]
            self._stuck.intersection_update(place.key for place in mine)
            self._delete(mine)

    def discard(self, key: str) -> None:
        """Forget a block and delete its file; unknown keys are ignored."""
        self.discard_all([key])

    def discard_unread(self, keys: Iterable[str]) -> list[Place]:
        """Forget blocks and delete their files, except blocks being read; return the forgotten ones.

        A file deleted during a read takes its bytes until the read ends, uncounted.
        """
        gone: list[Place] = []
        for key in keys:
            if not self._is_read(key):
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
            self.count("errors.delete")
            self.warn("discard", f"cannot delete a block in {self.folder.path}: {error}")
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
        self._delete(gone)
        return gone

    def expire(self) -> list[Place]:
        """Forget blocks that were not used for ``settings.ttl_seconds``."""
        if self.settings.ttl_seconds is None:
            return []
        gone = self.discard_unread(self.unused_since(self._since))
        self.count("expirations", len(gone))
        return gone

    def unused_since(self, since: float) -> list[str]:
        """Return the keys of blocks that were last used before ``since`` (Unix time) and are not pinned."""
        nothing: list[str] = []
        return self.ask(lambda: self.catalog.unused_since(since), nothing)

    @property
    def _since(self) -> float:
        """Earliest last use (Unix time) of a block that is not expired."""
        ttl = self.settings.ttl_seconds
        return self._clock() - ttl if ttl is not None else float("-inf")

    def trim(self) -> None:
        """Evict blocks beyond the budget, which may have been larger when they were written."""
        nothing: list[Place] = []
        gone = self.ask(lambda: self.shrink(self.settings.budget_bytes), nothing)
        if gone:
            _log.info("%d blocks left %s: its budget is smaller than it was", len(gone), self.folder.path)

    def shrink(self, to_bytes: int) -> list[Place]:
        """Evict until all blocks take at most ``to_bytes``, or no more can be evicted; return evicted blocks.

        Raises:
            sqlite3.Error: the catalog fails.
        """
        all_gone: list[Place] = []
        while (excess := self.catalog.total_bytes - to_bytes) > 0:
            with self._claims() as is_leased:
                gone = self.catalog.evict(excess, self._owner.name, "", is_leased, at_most=_BATCH, all_or_nothing=False)
                if not self._delete(gone):
                    break
                self.count("evictions", len(gone))
                all_gone += gone
        return all_gone

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
        nothing: list[str] = []
        return self.ask(lambda: self.catalog.absent(keys), nothing)

    def nearest(self, parent: str, tokens: TokenIds) -> Sequence[BlockId]:
        """Return blocks after ``parent``, among them one with the longest common prefix with ``tokens``."""
        nothing: list[BlockId] = []
        found = self.ask(lambda: self.catalog.nearest(parent, tokens, self._since), nothing)
        return [block for block in found if self._is_found(block.key)]

    def tails(self, parent: str, tokens: TokenIds) -> Sequence[BlockId]:
        """Return the blocks after ``parent`` whose ids are a proper prefix of ``tokens``."""
        nothing: list[BlockId] = []
        return [
            block
            for block in self.ask(lambda: self.catalog.tails(parent, tokens), nothing)
            if self._is_found(block.key)
        ]

    def entry(self, key: str) -> Entry | None:
        """Return the entry of a stored block."""
        return self.ask(lambda: self.catalog.entry(key), None) if key not in self._lost else None

    def kept_entry(self, key: str) -> Entry | None:
        """Return the entry of a block, even if its removal failed and lookups no longer find it."""
        return self.ask(lambda: self.catalog.entry(key), None)

    def find(self, key: str) -> BlockId | None:
        """Return the identity of a stored block."""
        return self.ask(lambda: self.catalog.find(key), None)

    def entries(self) -> list[Entry]:
        """Return the entries of all blocks."""
        nothing: list[Entry] = []
        return self.ask(self.catalog.entries, nothing)

    def linked_entries(self) -> list[Entry]:
        """Return the entries of the blocks of all named chains."""
        nothing: list[Entry] = []
        return self.ask(self.catalog.linked_entries, nothing)

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
                self.count("errors.read")
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
