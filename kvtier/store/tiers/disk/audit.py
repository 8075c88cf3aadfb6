"""Audit: finds differences between the files and the catalog of a store, and mends them.

Used in three places: whole, when a store is first opened after a boot of the machine (a power cut can lose data not yet
on the drive); in part, at every open, for leftovers of dead writers; and by ``verify``.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvtier.errors import BlockError, UnavailableError
from kvtier.store.chain import BlockId
from kvtier.store.tiers.block_states import State
from kvtier.store.tiers.disk.catalog.blocks import Catalog
from kvtier.store.tiers.disk.catalog.ranking import Place
from kvtier.store.tiers.disk.folder import StoreFolder
from kvtier.store.tiers.disk.names import Names
from kvtier.store.tiers.disk.owners import Owner, pid_of


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """One problem of a folder, and its repair.

    Attributes:
        kind: as ``manage.verify.Problem.kind``.
        subject: the affected file, or another subject.
        text: description of the problem.
        mend: repairs it; may raise ``OSError``, ``sqlite3.Error`` or ``BlockError``.
    """

    kind: str
    subject: str
    text: str
    mend: Callable[[], object]


class Audit:
    """Compares the files of a folder with the rows of its catalog. Unfinished work of living owners is left alone."""

    def __init__(self, folder: StoreFolder, catalog: Catalog, names: Names, owner: Owner) -> None:
        self._folder = folder
        self._catalog = catalog
        self._names = names
        self._owner = owner

    def unfinished(self) -> Iterator[Discrepancy]:
        """Yield unfinished writes and deletions of dead owners."""
        for place, owner in self._catalog.moving(State.WRITING):
            if not self._owner.lives(owner):
                path = self._path(place)
                yield from self._leftovers(self._folder.leftovers_beside(path, pid_of(owner)))
                yield Discrepancy("leftover", str(path), "its writer is gone", partial(self._settle, place, owner))
        for place, owner in self._catalog.moving(State.LEAVING):
            if not self._owner.lives(owner):
                yield Discrepancy(
                    "leftover", str(self._path(place)), "its deletion was interrupted", partial(self._delete, place)
                )

    def _settle(self, place: Place, owner: str) -> None:
        """Keep the file of a dead writer if it is whole; otherwise delete it and abort the write."""
        try:
            self.adopt(self._path(place))
        except UnavailableError:
            raise
        except BlockError:
            self._catalog.abort_store(place.key, owner)

    def _delete(self, place: Place) -> None:
        self._folder.filesystem.delete(self._path(place))
        self._catalog.complete_delete([place.key])

    def bury(self) -> None:
        """Remove the files of dead owners that have left no unfinished work."""
        left = {owner for state in (State.WRITING, State.LEAVING) for _, owner in self._catalog.moving(state)}
        for owner in self._owner.others():
            if owner not in left and not self._owner.lives(owner):
                self._owner.bury(owner)

    def leftovers(self, *, blocks: bool = True) -> Iterator[Discrepancy]:
        """Yield the temporary files of dead writers.

        Without ``blocks``, only those outside ``blocks/``: interrupted block writes have rows (``unfinished``).
        """
        yield from self._leftovers(self._folder.leftovers(blocks=blocks))

    def _leftovers(self, found: Iterator[Path]) -> Iterator[Discrepancy]:
        for path in found:
            yield Discrepancy(
                "leftover",
                str(path),
                "half a file of a writer that is gone",
                partial(self._folder.filesystem.delete, path),
            )

    def files(self) -> Iterator[Discrepancy]:
        """Yield block files without a row, rows without a file, and files whose size differs from their row."""
        files = {path.stem: path for path in self._folder.block_files()}  # before rows: a writer makes its row first
        rows = self._catalog.files()
        for key in files.keys() - rows.keys():
            path = files[key]
            if path.exists():  # otherwise it was deleted just now
                yield Discrepancy("orphan", str(path), "the catalog does not know it", partial(self.adopt, path))
        for entry in self._catalog.entries():
            key, path = entry.key, self._folder.block(entry.key, entry.root)
            try:
                nbytes = self._folder.filesystem.used_bytes(path)
            except FileNotFoundError:
                if self._catalog.entry(key) is not None:
                    yield Discrepancy(
                        "missing", str(path), "the catalog has it, the folder has not", partial(self.drop, key)
                    )
                continue
            except OSError:  # it cannot be reached now
                continue
            if nbytes != entry.nbytes:
                yield Discrepancy(
                    "accounting",
                    str(path),
                    f"takes {nbytes} bytes and is counted for {entry.nbytes}",
                    partial(self._catalog.set_bytes, key, nbytes),
                )

    def adopt(self, path: Path) -> None:
        """Add a row for a block file that has none; delete a file that is no whole block."""
        try:
            self._catalog.adopt([self.look_at(path)])
        except UnavailableError:
            raise
        except BlockError:
            self._folder.filesystem.delete(path)
            raise

    def drop(self, key: str) -> None:
        """Forget a block, and delete its file if there is one."""
        for place in self._catalog.discard([key], self._owner.name):
            self._delete(place)

    def look_at(self, path: Path, *, whole: bool = False) -> tuple[BlockId, int, float]:
        """Return the identity of a block file, its bytes on the drive, and when it was written (Unix time).

        Args:
            path: the file.
            whole: read every byte, and compare the checksums.

        Raises:
            UnavailableError: it cannot be read now.
            BlockError: it is no whole block, or not the block of its path.
        """
        try:
            file = self._folder.block_file(path)
            try:
                if whole:
                    file.check()
            finally:
                file.close()
            written_at = path.stat().st_mtime
            nbytes = self._folder.filesystem.used_bytes(path)
        except OSError as error:
            raise self._folder.unusable(path, error) from error
        if path != self._folder.block(file.id.key, file.id.root):
            raise BlockError(f"{path} holds another block than its place says")
        return file.id, nbytes, written_at

    def total(self) -> Iterator[Discrepancy]:
        """Yield the total of bytes if it differs from the sum of all rows."""
        counted = sum(self._catalog.files().values())
        if counted != self._catalog.total_bytes:  # read in two steps: others may change rows between
            yield Discrepancy(
                "accounting", str(self._folder.catalog), "its sum of bytes is wrong", self._catalog.recount
            )

    def names(self) -> Iterator[Discrepancy]:
        """Make the rows of names agree with their files; yield unreadable files."""
        for path, what in self._names.sync():
            yield Discrepancy(
                "name", str(path), f"cannot be read: {what}", partial(self._folder.filesystem.delete, path)
            )

    def permissions(self) -> Iterator[Discrepancy]:
        """Yield files and folders that other users can read or change."""
        for path in [*self._folder.parts, *self._folder.names(), *self._folder.chats(), *self._folder.block_files()]:
            try:
                mode = stat.S_IMODE(path.lstat().st_mode)
            except FileNotFoundError:
                continue
            if mode & 0o077 and os.name == "posix":
                yield Discrepancy(
                    "permissions", str(path), f"others may use it (mode {mode:o})", partial(path.chmod, mode & 0o700)
                )

    def _path(self, place: Place) -> Path:
        return self._folder.block(place.key, place.root)
