"""Writes: prepare a block in the catalog, write its file, complete it in the catalog, or undo all of it."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtier.kv.codecs import BUILT_IN, Codec
from kvtier.progress import Progress
from kvtier.store.block import Block
from kvtier.store.chain import BlockId
from kvtier.store.tiers.backoff import is_full
from kvtier.store.tiers.disk.catalog.blocks import Catalog, Prepared
from kvtier.store.tiers.disk.eviction import Eviction
from kvtier.store.tiers.disk.failures import Failures
from kvtier.store.tiers.disk.folder import StoreFolder
from kvtier.store.tiers.disk.owners import Owner, pid_of

_ELSEWHERE_SECONDS = 2.0  # how long to wait for another owner to write a block
_RETRY_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """Settings of a disk tier.

    Attributes:
        budget_bytes: upper limit for all block files, in whole allocation units of the drive.
        codec: encodes tensors.
        choose: returns the codec of a block that is written behind a turn; None for ``codec``.
        floor_bytes: bytes to leave free on the drive.
        ttl_seconds: how long a block is kept after its last use; None for ever.
        progress: is told how far a rebuild of the catalog is; None when nothing is.
    """

    budget_bytes: int
    codec: Codec = BUILT_IN["raw"]
    choose: Callable[[Block], Codec] | None = None
    floor_bytes: int = 0
    ttl_seconds: float | None = None
    progress: Progress | None = None


class NoRoom(Exception):  # noqa: N818  nothing went wrong: the block stays out
    """A block does not fit: it is larger than the budget, or eviction cannot make room on the drive."""


class Writes:
    """Writes the blocks of one owner, one at a time, within the limits of ``settings``; ``eviction`` makes room."""

    def __init__(
        self,
        folder: StoreFolder,
        catalog: Catalog,
        owner: Owner,
        settings: DiskSettings,
        eviction: Eviction,
        failures: Failures,
    ) -> None:
        self._folder = folder
        self._catalog = catalog
        self._owner = owner
        self._settings = settings
        self._eviction = eviction
        self._failures = failures
        self._excess_bytes = 0  # bytes of a file beyond its allocation units, on this drive
        self._unsettled: dict[str, BlockId] = {}  # blocks whose writes could not be undone
        self._putting = threading.RLock()
        self._sleep: Callable[[float], None] = time.sleep

    def begin_anew(self) -> None:
        """Drop, in a forked child, the lock and the unfinished writes of its parent's threads."""
        self._putting, self._unsettled = threading.RLock(), {}

    def write(self, block: BlockId, pieces: Sequence[memoryview]) -> bool:
        """Write the file of ``block`` unless it is stored; return whether it is stored now. A failed write is undone.

        Raises:
            NoRoom: eviction cannot make enough.
            OSError: the drive fails.
            sqlite3.Error: the catalog fails.
        """
        nbytes = sum(piece.nbytes for piece in pieces)
        size = self._folder.allocated_bytes(nbytes) + self._excess_bytes
        with self._putting:  # one at a time: this owner then writes only the block of this call
            try:
                for each in list(self._unsettled.values()):
                    self._abort(each)
                self._eviction.delete_again()
                prepared = self._prepare(block, size)
                if prepared is not Prepared.RESERVED:
                    return prepared is Prepared.PRESENT
                self._write_file(block, pieces, size)
                self._failures.count("written_bytes", nbytes)
                self._count_what_it_takes(block, size)
                return self._catalog.complete_store(block.key, self._owner.name)
            except BaseException:
                self._abort(block)
                raise

    def _prepare(self, block: BlockId, size: int) -> Prepared:
        """Reserve ``size`` bytes; evict other blocks to make room.

        Raises:
            NoRoom: eviction cannot make enough.
        """
        budget, floor = self._settings.budget_bytes, self._settings.floor_bytes
        if size > budget:
            raise NoRoom(f"disk_budget={budget} is less than a block of {size} bytes")
        give_up_at = time.monotonic() + _ELSEWHERE_SECONDS
        while True:
            prepared = self._catalog.prepare_store(block, size, budget, self._owner.name)
            if prepared is Prepared.ELSEWHERE and time.monotonic() < give_up_at:
                # It does not count as kept before it is written: its writer may fail.
                self._wait_for_writer(block.key)
                continue
            if prepared is not Prepared.NO_ROOM:
                break
            if not self._eviction.make_room(
                self._catalog.total_bytes + size - budget, block.stays(self._catalog.contains)
            ):
                raise NoRoom(f"disk_budget={budget} has no room for a block of {size} bytes after those it follows")
        if prepared is Prepared.RESERVED:
            short = size + floor - self._folder.free_bytes()
            if not self._eviction.make_room(short, block.stays(self._catalog.contains)):
                raise NoRoom(f"free_space_floor={floor} leaves no room on the drive for a block of {size} bytes")
        return prepared

    def _wait_for_writer(self, key: str) -> None:
        """Wait a moment for the owner that is writing the block; abort its write if that owner is dead."""
        writer = self._catalog.writer(key)
        if writer is not None and not self._owner.lives(writer):
            self._catalog.abort_store(key, writer)
        else:
            self._sleep(_RETRY_SECONDS)

    def _write_file(self, block: BlockId, pieces: Sequence[memoryview], size: int) -> None:
        path = self._folder.block(block.key, block.root)
        try:
            self._folder.write(path, pieces)
        except OSError as error:
            if not is_full(error) or not self._eviction.make_room(size, block.stays(self._catalog.contains)):
                raise
            self._folder.write(path, pieces)

    def _count_what_it_takes(self, block: BlockId, reserved: int) -> None:
        """Count the file of ``block`` with its size on the drive, and make room if that is more than ``reserved``.

        Raises:
            NoRoom: eviction cannot make enough.
        """
        path = self._folder.block(block.key, block.root)
        excess = self._folder.filesystem.used_bytes(path) - reserved
        if excess <= 0:
            return
        self._excess_bytes += excess  # the next file will take as much more
        self._catalog.set_bytes(block.key, reserved + excess)
        budget = self._settings.budget_bytes
        if not self._eviction.make_room(self._catalog.total_bytes - budget, block.stays(self._catalog.contains)):
            raise NoRoom(f"disk_budget={budget} has no room for a block that takes {reserved + excess} bytes there")

    def _abort(self, block: BlockId) -> None:
        """Undo a write that ``write`` has begun; if that fails now, it is tried again before the next write."""
        self._unsettled[block.key] = block
        try:
            if self._catalog.writer(block.key) == self._owner.name:
                # Files first: once the row is gone, another owner may write them, and partial files would stay.
                path = self._folder.block(block.key, block.root)
                for file in (path, *self._folder.leftovers_beside(path, pid_of(self._owner.name))):
                    with contextlib.suppress(OSError):
                        self._folder.filesystem.delete(file)
                self._catalog.abort_store(block.key, self._owner.name)
            del self._unsettled[block.key]
        except sqlite3.Error as error:
            self._failures.note_catalog(error)
