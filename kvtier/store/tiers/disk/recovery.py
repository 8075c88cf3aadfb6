"""Recovery: opens a folder in any state, with a catalog that agrees with its files.

At every open, unfinished work of dead owners is completed or undone. At the first open after a boot of the machine, all
files are compared with all rows. A missing or damaged catalog is rebuilt from the files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvtier.errors import BlockError, StoreError, UnavailableError
from kvtier.platform.mounts import is_shared_over_network
from kvtier.progress import REBUILD, Progress
from kvtier.store.chain import BlockId
from kvtier.store.eviction.base import EvictionPolicy, SavedSeconds, nothing_known
from kvtier.store.tiers.backoff import is_full, is_locked
from kvtier.store.tiers.disk.audit import Audit
from kvtier.store.tiers.disk.catalog.adoption import Rebuilt
from kvtier.store.tiers.disk.catalog.blocks import Catalog
from kvtier.store.tiers.disk.catalog.connection import Connect
from kvtier.store.tiers.disk.catalog.database import Database, boot_id
from kvtier.store.tiers.disk.catalog.rows import batches
from kvtier.store.tiers.disk.catalog.schema import OtherVersionError
from kvtier.store.tiers.disk.folder import StoreFolder
from kvtier.store.tiers.disk.names import Names
from kvtier.store.tiers.disk.owners import Owner

_log = logging.getLogger("kvtier.store.disk")
_FILES_AT_ONCE = 500
_KEY = re.compile("[0-9a-f]{64}")
# Messages of SQLite about a sound file that cannot be used now.
_NOT_DAMAGED = ("unable to open", "disk I/O", "full")


@dataclass(frozen=True, slots=True)
class OpenedFolder:
    """The folder of a store, open: its catalog agrees with its files.

    Attributes:
        folder: the files.
        owner: marks writes and deletions that this process has begun.
        database: the rows behind files and names.
        catalog: the rows of blocks.
        names: names of chains.
        audit: compares files and rows.
    """

    folder: StoreFolder
    owner: Owner
    database: Database
    catalog: Catalog
    names: Names
    audit: Audit


def open_folder(
    folder: StoreFolder,
    policy: EvictionPolicy,
    clock: Callable[[], float],
    connect: Connect,
    saved_seconds: SavedSeconds,
    progress: Progress | None = None,
) -> OpenedFolder:
    """Open ``folder`` in any state; ``progress`` is told how far a rebuild of its catalog is.

    Raises:
        StoreError: it cannot be opened.
    """
    try:
        owner = Owner(folder.owners)
    except OSError as error:
        raise StoreError(f"cannot keep a store in {folder.path}: {error}; pass a folder you can write to") from error
    try:
        return open_catalog(folder, owner, policy, clock, connect, saved_seconds, progress)
    except BaseException:
        owner.close()
        raise


def open_catalog(
    folder: StoreFolder,
    owner: Owner,
    policy: EvictionPolicy,
    clock: Callable[[], float],
    connect: Connect,
    saved_seconds: SavedSeconds = nothing_known,
    progress: Progress | None = None,
) -> OpenedFolder:
    """Open the catalog of ``folder``; rebuild it when it is missing or damaged.

    Raises:
        StoreError: it cannot be opened, or another process uses it on a drive where processes cannot share it.
    """
    path = folder.catalog
    kind = folder.filesystem.kind(folder.path)
    alone = is_shared_over_network(kind)
    try:
        damage = "it failed when it was last used" if folder.damage_mark.exists() else None
        is_of_another_version = False
        if damage is None:
            try:
                return _opened(folder, owner, policy, clock, connect, alone, saved_seconds, progress)
            except sqlite3.DatabaseError as error:
                if alone and is_locked(error):
                    raise StoreError(
                        f"{folder.path} is in use by another process; on {kind} only one at a time may use a store, "
                        "since SQLite's locks do not hold there: pass a folder on a local drive"
                    ) from error
                if not _is_damage(error, path):
                    raise StoreError(f"cannot open {path}: {error}") from error
                is_of_another_version, damage = isinstance(error, OtherVersionError), str(error)
        if is_of_another_version:
            _log.info("%s is rebuilt from the block files: %s", path, damage)
        else:
            _log.warning("%s is damaged (%s); it is rebuilt from the block files", path, damage)
        for suffix in ("-wal", "-shm", ""):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        folder.damage_mark.unlink(missing_ok=True)
        return _opened(folder, owner, policy, clock, connect, alone, saved_seconds, progress)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot open {path}: {error}") from error


def _is_damage(error: sqlite3.DatabaseError, path: Path) -> bool:
    """Whether ``error`` means a damaged file, rather than a file that cannot be used now."""
    if not isinstance(error, sqlite3.OperationalError):
        return True
    is_usable = os.access(path, os.W_OK) and not any(word in str(error) for word in _NOT_DAMAGED)
    return is_usable and not is_locked(error)


def _opened(
    folder: StoreFolder,
    owner: Owner,
    policy: EvictionPolicy,
    clock: Callable[[], float],
    connect: Connect,
    alone: bool,
    saved_seconds: SavedSeconds,
    progress: Progress | None,
) -> OpenedFolder:
    with contextlib.suppress(FileExistsError):
        # It holds token ids; SQLite would let others read. Only if it is new: closing a file ends all locks of this
        # process on it, those of another store too.
        fd = os.open(folder.catalog, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
        os.fchmod(fd, 0o600)  # despite the umask
        os.close(fd)
    database = Database(folder.catalog, exclusive=alone, make_connection=connect)
    try:
        catalog = Catalog(database, policy, clock, saved_seconds)
        names = Names(database, folder, clock)
        audit = Audit(folder, catalog, names, owner)
        _recover(folder, catalog, audit, progress)
    except BaseException:
        database.close()
        raise
    return OpenedFolder(folder, owner, database, catalog, names, audit)


def _recover(folder: StoreFolder, catalog: Catalog, audit: Audit, progress: Progress | None) -> None:
    """Make files and catalog agree."""
    unavailable: list[str] = []
    rebuilt = catalog.rebuild(lambda: _whole_files(folder, catalog, audit, unavailable, progress))
    same_boot = catalog.begin_boot(boot_id() if not unavailable else "")
    if unavailable:
        text = "%s (and %d more); left as it is, and looked at again at the next open"
        _log.warning(text, unavailable[0], len(unavailable) - 1)
    if rebuilt is Rebuilt.ANEW:
        parts = [audit.unfinished(), audit.leftovers(), audit.names()]
    elif same_boot and rebuilt is Rebuilt.NOT:
        parts = [audit.unfinished(), audit.leftovers(blocks=False), audit.names()]
    else:
        parts = [audit.unfinished(), audit.leftovers(), audit.files(), audit.names()]
    for discrepancies in parts:
        for discrepancy in discrepancies:
            if discrepancy.kind == "name":  # its blocks are still stored; a person may still read the file
                _log.warning("%s %s", discrepancy.subject, discrepancy.text)
                continue
            try:
                discrepancy.mend()
            except (OSError, BlockError) as error:
                _log.warning("%s: %s", discrepancy.subject, error)
            except sqlite3.OperationalError as error:
                if not is_full(error) and not is_locked(error):
                    raise
                # Stored blocks can still be read. The rest counts, and waits for an open that can write.
                _log.warning("%s cannot be put right yet: %s", discrepancy.subject, error)
    audit.bury()


def _whole_files(
    folder: StoreFolder, catalog: Catalog, audit: Audit, unavailable: list[str], progress: Progress | None
) -> Iterator[tuple[BlockId, int, float]]:
    """Yield identity, bytes and Unix time of last use of block files without a row; damaged files are removed.

    Errors of files that cannot be read now go to ``unavailable``.
    """
    damaged = 0
    paths = sorted(folder.block_files(unavailable))
    task = progress.begin(REBUILD, len(paths), "blocks") if progress is not None else None
    for path in _unknown(paths, catalog):
        if task is not None:
            task.to(task.done + 1)
        try:
            yield audit.look_at(path)
        except UnavailableError as error:
            unavailable.append(str(error))
        except BlockError as error:
            with contextlib.suppress(OSError):
                folder.filesystem.delete(path)
            damaged += 1
            if damaged == 1:
                _log.warning("%s; removed, like all that cannot be used", error)
    if task is not None:
        task.end()


def _unknown(paths: list[Path], catalog: Catalog) -> Iterator[Path]:
    """Yield the ``paths`` whose keys ``catalog`` lacks, in order, since neighbours have neighbouring rows.

    The start is random, so that processes that rebuild a catalog together do not all read the same files.
    """
    begin = random.randrange(len(paths)) if paths else 0
    for some in batches(paths[begin:] + paths[:begin], _FILES_AT_ONCE):
        unknown = set(catalog.absent([path.stem for path in some if _KEY.fullmatch(path.stem)]))
        yield from (path for path in some if path.stem in unknown or not _KEY.fullmatch(path.stem))
