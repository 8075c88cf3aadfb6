"""Eviction: makes room in a folder, and deletes the files of blocks that leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from kvtier.store.tiers.block_states import State
from kvtier.store.tiers.disk.catalog.blocks import Catalog
from kvtier.store.tiers.disk.catalog.ranking import Place
from kvtier.store.tiers.disk.failures import Failures
from kvtier.store.tiers.disk.file_leases import FileLeases
from kvtier.store.tiers.disk.folder import StoreFolder
from kvtier.store.tiers.disk.owners import Owner
from kvtier.store.tiers.leases import Leases

_BATCH = 64  # blocks evicted at once: each is claimed meanwhile


class Eviction:
    """Evicts the blocks of a folder, except blocks that this process reads (``leases``) or others (``between``)."""

    def __init__(
        self,
        folder: StoreFolder,
        catalog: Catalog,
        owner: Owner,
        leases: Leases,
        between: FileLeases,
        failures: Failures,
    ) -> None:
        self._folder = folder
        self._catalog = catalog
        self._owner = owner
        self._leases = leases
        self._between = between
        self._failures = failures
        self._stuck: set[str] = set()  # blocks whose files could not be deleted

    def make_room(self, nbytes: int, keep: str) -> bool:
        """Evict at least ``nbytes``, but never ``keep``; return whether their files are deleted."""
        while nbytes > 0:
            with self._claims() as is_leased:
                gone = self._catalog.evict(nbytes, self._owner.name, keep, is_leased, at_most=_BATCH)
                if not gone:
                    return False
                self._failures.count("evictions", len(gone))
                nbytes -= self.delete(gone)
        return True

    def shrink(self, to_bytes: int) -> list[Place]:
        """Evict until all blocks take at most ``to_bytes``, or no more can be evicted; return evicted blocks.

        Raises:
            sqlite3.Error: the catalog fails.
        """
        all_gone: list[Place] = []
        while (excess := self._catalog.total_bytes - to_bytes) > 0:
            with self._claims() as is_leased:
                gone = self._catalog.evict(
                    excess, self._owner.name, "", is_leased, at_most=_BATCH, all_or_nothing=False
                )
                if not self.delete(gone):
                    break
                self._failures.count("evictions", len(gone))
                all_gone += gone
        return all_gone

    def would_evict(self, nbytes: int) -> list[Place]:
        """Return the blocks that would be evicted next to free ``nbytes``, in order, as far as there are some.

        Raises:
            sqlite3.Error: the catalog fails.
        """
        if not self._between.are_held():  # the usual case: no block needs to be asked for
            return self._catalog.would_evict(nbytes, lambda place: place.key in self._leases)
        with self._claims() as is_leased:
            return self._catalog.would_evict(nbytes, is_leased)

    @contextmanager
    def _claims(self) -> Iterator[Callable[[Place], bool]]:
        """Yield a test whether a block is being read; it claims unread blocks, so no read begins before this ends."""
        claims: list[str] = []

        def is_leased(place: Place) -> bool:
            if self.is_read(place.key):
                return True
            claims.append(place.key)
            return False

        try:
            yield is_leased
        finally:
            for key in claims:
                self._between.unclaim(key)

    def is_read(self, key: str) -> bool:
        """Whether block ``key`` is being read. If not, it is claimed: no read can begin before it is unclaimed."""
        return key in self._leases or not self._between.claim(key)

    def delete(self, places: Iterable[Place]) -> int:
        """Delete the files of leaving blocks; return how many bytes that freed."""
        gone: list[str] = []
        freed = 0
        for place in places:
            path = self._folder.block(place.key, place.root)
            try:
                self._folder.filesystem.delete(path)
            except OSError as error:
                # It stays a leaving block, and counts: the budget limits real bytes.
                self._stuck.add(place.key)
                self._failures.count("errors.delete")
                self._failures.warn("delete", f"cannot delete {path} ({error}); it is tried again later")
                continue
            gone.append(place.key)
            freed += place.nbytes
        self._catalog.complete_delete(gone)
        self._stuck.difference_update(gone)
        return freed

    def delete_again(self) -> None:
        """Try again to delete files that could not be deleted."""
        if self._stuck:
            mine = [place for place, _ in self._catalog.moving(State.LEAVING) if place.key in self._stuck]
            self._stuck.intersection_update(place.key for place in mine)
            self.delete(mine)
