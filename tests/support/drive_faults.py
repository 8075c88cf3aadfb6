"""A short life of a store on a drive where any single call or statement can fail."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from kvtier import PrefixStore, StoreError
from kvtier.store.chain import TokenIds
from kvtier.testing.faults import Faults, FaultyFilesystem
from tests.support.stores import ROOT, commit, count, ids, restored_length_at_last

UNIT = 4096
# The longest chain has three blocks. With the second budget, later chains evict earlier ones.
BUDGETS = {"roomy": 2**30, "tight": 5 * UNIT}
CHAINS = (count(6), count(10), count(9, first=50), ids(1, 2, 3), count(11, first=200))
AFTERWARDS = count(10, first=400)


def settings(room: str) -> dict[str, Any]:
    return {"block_size": 4, "host_budget": 1, "disk_budget": BUDGETS[room], "free_space_floor": 0}


@contextlib.contextmanager
def faulty_database(faults: Faults) -> Iterator[None]:
    """Apply ``faults`` to the statements of every new connection."""
    connect = sqlite3.connect

    def faulty(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        return connect(*args, **{**kwargs, "factory": faults.connection_class()})

    with mock.patch.object(sqlite3, "connect", faulty):
        yield


def opened(folder: Path, drive: FaultyFilesystem, room: str, durability: str = "full") -> PrefixStore:
    return PrefixStore(folder, **settings(room), durability=durability, filesystem=drive)


def manage(store: PrefixStore) -> list[str]:
    """Run the manual operations. Unlike a turn they may raise; returns their error messages."""
    said = []
    last, first = CHAINS[-1], CHAINS[0]
    for deed in (
        lambda: store.name("last", ROOT, last, pin=True),
        lambda: store.name("first", ROOT, first),
        lambda: store.rename("first", "once more"),
        lambda: store.unpin("last"),
        lambda: store.forget("once more"),
        lambda: store.prune(to_bytes=2 * UNIT),
    ):
        try:
            deed()
        except (StoreError, KeyError) as error:
            said.append(str(error))
    return said


def use(store: PrefixStore, chains: tuple[TokenIds, ...] = CHAINS) -> None:
    """Commit and restore. Whatever the drive does, nothing raises, and restored bytes are right."""
    for tokens in chains:
        commit(store, tokens)
        store.flush()
    for tokens in chains:
        restored_length_at_last(store, tokens)
    store.flush()


def life(folder: Path, faults: Faults, room: str) -> None:
    """Run a whole life. Raises only errors of opening the folder."""
    with opened(folder, FaultyFilesystem(faults), room) as store:
        use(store)
        manage(store)
