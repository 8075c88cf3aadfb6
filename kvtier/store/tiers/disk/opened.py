"""Opens the folder of a store: its owner, its catalog after recovery, and the tier of its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvtier.errors import StoreError
from kvtier.store.eviction.base import EvictionPolicy
from kvtier.store.tiers.disk.audit import Audit
from kvtier.store.tiers.disk.catalog.connection import Connect
from kvtier.store.tiers.disk.catalog.database import Database
from kvtier.store.tiers.disk.folder import StoreFolder
from kvtier.store.tiers.disk.names import Names
from kvtier.store.tiers.disk.owners import Owner
from kvtier.store.tiers.disk.recovery import open_catalog
from kvtier.store.tiers.disk.tier import DiskSettings, DiskTier


@dataclass(frozen=True, slots=True)
class OpenedFolder:
    """The folder of a store, open.

    Attributes:
        tier: blocks as files.
        database: the rows behind files and names.
        names: names of chains.
        audit: compares files and rows.
        owner: marks writes and deletions that this process has begun.
    """

    tier: DiskTier
    database: Database
    names: Names
    audit: Audit
    owner: Owner


def open_folder(
    folder: StoreFolder, settings: DiskSettings, policy: EvictionPolicy, connect: Connect, clock: Callable[[], float]
) -> OpenedFolder:
    """Open ``folder`` in any state; delete expired blocks, and evict blocks beyond the budget.

    Raises:
        StoreError: it cannot be opened.
    """
    try:
        owner = Owner(folder.owners)
    except OSError as error:
        raise StoreError(f"cannot keep a store in {folder.path}: {error}; pass a folder you can write to") from error
    try:
        opened = open_catalog(folder, owner, policy, clock, connect)
    except BaseException:
        owner.close()
        raise
    tier = DiskTier(folder, opened.catalog, owner, settings, clock)
    tier.expire()
    tier.trim()
    return OpenedFolder(tier, opened.database, opened.names, opened.audit, owner)
