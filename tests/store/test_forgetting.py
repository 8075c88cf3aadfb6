"""Forgotten token ids leave no bytes in the catalog, or the store warns about the rest and erases it later."""

import sqlite3
from contextlib import closing, contextmanager

import numpy as np
import pytest

from kvtier import PrefixStore, StoreError
from kvtier.store.chain import BlockId
from kvtier.store.eviction import LeastRecentlyUsed
from kvtier.store.tiers.disk.catalog.blocks import Catalog
from kvtier.store.tiers.disk.catalog.connection import connect
from kvtier.store.tiers.disk.catalog.database import Database
from kvtier.store.tiers.disk.catalog.id_codes import encode_ids
from tests.support.stores import ROOT, commit, count

PREFIX, SECRET = count(4), count(40, first=70_000)
PIECE_BYTES = 12
OF_SEEDS = "c4" * 32  # with this root, two of the seeds below leave copies


def opened(folder, **more):
    settings = {"block_size": 4, "host_budget": 1, "free_space_floor": 0, "durability": "lazy"}
    return PrefixStore(folder, **settings, connect=lambda uri, seconds: connect(uri, 0.01), **more)


def remembers(folder, tokens):
    """Return whether the catalog or its log contains a run of ids of any block of ``tokens``."""
    data = b"".join(path.read_bytes() for path in folder.glob("catalog.sqlite*"))
    code = encode_ids(tokens)
    return any(code[at : at + PIECE_BYTES] in data for at in range(0, len(code) - PIECE_BYTES + 1, PIECE_BYTES))


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("kvtier") and r.levelname == "WARNING"]


@contextmanager
def another_process(folder, statement):
    with closing(sqlite3.connect(folder / "catalog.sqlite", isolation_level=None)) as other:
        other.execute(statement)
        other.execute("SELECT COUNT(*) FROM blocks").fetchone()
        yield
        other.execute("ROLLBACK")


@pytest.fixture
def store(tmp_path):
    with opened(tmp_path) as store:
        commit(store, np.concatenate([PREFIX, SECRET]))
        store.name("secret", ROOT, np.concatenate([PREFIX, SECRET]))
        commit(store, np.concatenate([PREFIX, count(8, first=500)]))
        store.flush()
        yield store


def test_forgotten_tokens_are_in_no_catalog_file(store, tmp_path):
    assert remembers(tmp_path, SECRET)
    store.forget("secret")
    assert not remembers(tmp_path, SECRET)
    assert remembers(tmp_path, count(8, first=500))


@pytest.mark.sample(1)  # of 3
@pytest.mark.parametrize("seed", [2, 5, 6])
def test_overwrite_deleted_leaves_no_copy_of_deleted_rows(tmp_path, seed):
    """With the first two seeds, SQLite leaves copies of deleted rows in the unused part of pages."""
    dice = np.random.default_rng(seed)
    with closing(Database(tmp_path / "catalog.sqlite")) as database:
        catalog = Catalog(database, LeastRecentlyUsed(), lambda: 0.0)
        kept, gone = [], []
        for _ in range(100):
            if kept and dice.random() < 0.3:
                gone.append(kept.pop(dice.integers(len(kept))))
                catalog.discard([gone[-1].key], "me")
                catalog.complete_delete([gone[-1].key])
            else:
                kept.append(BlockId.of(OF_SEEDS, OF_SEEDS, dice.integers(0, 50_000, dice.integers(8, 1024))))
                catalog.prepare_store(kept[-1], 10, 10**9, "me")
                catalog.complete_store(kept[-1].key, "me")
        assert database.overwrite_deleted()
        assert not any(remembers(tmp_path, block.tokens) for block in gone)
        assert all(remembers(tmp_path, block.tokens) for block in kept)
        assert database.problems() == []


@pytest.mark.parametrize("later", ["write", "flush", "close"])
def test_log_held_by_a_reader_logs_a_warning_and_is_erased_later(store, tmp_path, caplog, later):
    with another_process(tmp_path, "BEGIN"):
        assert store.forget("secret").blocks == 10
        assert len(warnings(caplog)) == 1
        assert "catalog.sqlite-wal" in warnings(caplog)[0]
        assert remembers(tmp_path, SECRET)
        commit(store, count(4, first=900))
        store.flush()
        assert remembers(tmp_path, SECRET), "it is still being read"
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as other:  # else SQLite deletes the log at the end
        other.execute("SELECT COUNT(*) FROM blocks").fetchone()
        if later == "write":
            store._tiers.last.touch([entry.key for entry in store._tiers.entries()], {})
        elif later == "flush":
            store.flush()
        else:
            store.close()
        assert not remembers(tmp_path, SECRET)
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("named", [True, False])
def test_forget_raises_while_the_catalog_is_locked_and_succeeds_later(store, tmp_path, named):
    if not named:
        store.unname("secret")
    with another_process(tmp_path, "BEGIN IMMEDIATE"), pytest.raises(StoreError):
        store.forget(np.concatenate([PREFIX, SECRET]))
    assert store.forget(np.concatenate([PREFIX, SECRET])).blocks == 10
    assert not remembers(tmp_path, SECRET)


def test_tokens_of_an_expired_name_are_erased_by_the_next_flush(tmp_path):
    now = [1e9]
    with opened(tmp_path, clock=lambda: now[0]) as store:
        commit(store, SECRET)
        store.name("secret", ROOT, SECRET, ttl=10.0)
        store.flush()
        now[0] += 11.0
        store.match(ROOT, PREFIX)
        assert store.stats().tiers[1].blocks == 0
        commit(store, PREFIX)
        store.flush()
        assert not remembers(tmp_path, SECRET)
