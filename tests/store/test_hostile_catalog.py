"""A catalog changed by another program: none of its code runs, nothing hangs, and it is rebuilt from the files."""

import sqlite3
from contextlib import closing

import pytest

from kvtier import PrefixStore
from kvtier.store.chain import BlockId
from kvtier.store.eviction import LeastRecentlyUsed
from kvtier.store.tiers.disk.catalog.blocks import Catalog
from kvtier.store.tiers.disk.catalog.database import Database
from tests.support.stores import ROOT, commit, count, restored_length

SHORT_SECONDS = 0.05
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"
ADDITIONS = {
    "a trigger that never ends": f"CREATE TRIGGER more AFTER UPDATE ON blocks BEGIN {ENDLESS}; END",
    "a trigger on what a turn notes": "CREATE TRIGGER more AFTER UPDATE ON total BEGIN DELETE FROM blocks; END",
    "a view": f"CREATE VIEW more AS {ENDLESS}",
    "a table": "CREATE TABLE more (what)",
    "a generated column": "ALTER TABLE blocks ADD COLUMN more AS (zeroblob(1000000000))",
    "an index less": "DROP INDEX leaves",
    "a trigger less": "DROP TRIGGER removed",
}


@pytest.fixture
def folder(tmp_path):
    with opened(tmp_path) as store:
        commit(store, count(8))
        store.name("chat", ROOT, count(8))
    return tmp_path


def opened(folder):
    return PrefixStore(folder, block_size=4, host_budget=1, free_space_floor=0)


def change(folder, *statements):
    with closing(sqlite3.connect(folder / "catalog.sqlite", isolation_level=None)) as stranger:
        for statement in statements:
            stranger.execute(statement)


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("kvtier") and r.levelname == "WARNING"]


@pytest.mark.parametrize("addition", ADDITIONS.values(), ids=ADDITIONS.keys())
def test_catalog_with_a_changed_schema_is_rebuilt_from_the_files(folder, caplog, addition):
    change(folder, addition)
    with opened(folder) as store:
        commit(store, count(12))
        store.flush()
        assert restored_length(store, count(12)) == 12
        assert [name.kept_tokens for name in store.names()] == [8]
        assert store.verify().ok
    assert [("is damaged" in text and "not those of kvtier" in text) for text in warnings(caplog)] == [True]


def test_catalog_whose_schema_takes_too_long_to_read_is_rebuilt(folder, caplog, monkeypatch):
    views = (
        "INSERT INTO sqlite_master SELECT 'view', 'v' || i, 'v' || i, 0, 'CREATE VIEW v' || i || ' AS SELECT 1' FROM n"
    )
    counted = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)"
    change(folder, "PRAGMA writable_schema=ON", f"{counted} {views}")
    monkeypatch.setattr("kvtier.store.tiers.disk.catalog.connection.TURN_SECONDS", SHORT_SECONDS)
    with opened(folder) as store:
        assert restored_length(store, count(8)) == 8
    assert ["is damaged" in text and "too long" in text for text in warnings(caplog)] == [True]


@pytest.mark.skipif(not hasattr(sqlite3.Connection, "setlimit"), reason="Python 3.10 cannot set limits")
def test_catalog_with_a_giant_schema_object_is_rebuilt(folder, caplog, monkeypatch):
    monkeypatch.setattr("kvtier.store.tiers.disk.catalog.connection._MOST_BYTES", 100_000)
    change(folder, f"CREATE VIEW more AS SELECT '{'x' * 200_000}'")
    with opened(folder) as store:
        assert restored_length(store, count(8)) == 8
    assert ["is damaged" in text for text in warnings(caplog)] == [True]


def test_file_that_replaces_the_catalog_is_checked_before_it_is_used(folder, tmp_path, caplog):
    with opened(folder) as store:
        assert restored_length(store, count(8)) == 8
        data = (folder / "catalog.sqlite").read_bytes()
        (tmp_path / "other.sqlite").write_bytes(data)
        with closing(sqlite3.connect(tmp_path / "other.sqlite", isolation_level=None)) as stranger:
            stranger.execute(ADDITIONS["a trigger that never ends"])
            stranger.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for suffix in ("-wal", "-shm", ""):
            (folder / f"catalog.sqlite{suffix}").unlink()
        (tmp_path / "other.sqlite").rename(folder / "catalog.sqlite")
        assert restored_length(store, count(8)) == 0
        commit(store, count(8))
        store.flush()
    assert (folder / "catalog.damaged").exists()
    with opened(folder) as store:
        assert restored_length(store, count(8)) == 8


def test_empty_new_catalog_file_is_not_taken_for_damage(folder):
    with opened(folder) as store:
        for suffix in ("-wal", "-shm", ""):
            (folder / f"catalog.sqlite{suffix}").unlink()
        (folder / "catalog.sqlite").touch()
        assert restored_length(store, count(8)) == 0
    assert not (folder / "catalog.damaged").exists()


def test_catalog_of_another_version_is_rebuilt_without_a_warning(folder, caplog):
    change(folder, "PRAGMA user_version = 1", "DROP TRIGGER removed")
    with opened(folder) as store:
        assert restored_length(store, count(8)) == 8
    assert warnings(caplog) == []


@pytest.mark.parametrize("change_rows", [False, True])
def test_endless_statement_is_cut_off_and_reported_as_damage(tmp_path, monkeypatch, change_rows):
    monkeypatch.setattr("kvtier.store.tiers.disk.catalog.database.TURN_SECONDS", SHORT_SECONDS)
    with closing(Database(tmp_path / "catalog.sqlite")) as database:
        with (
            pytest.raises(sqlite3.DatabaseError, match=r"malformed.*too long") as caught,
            database.transaction() if change_rows else database.reading() as connection,
        ):
            connection.execute(f"UPDATE total SET bytes = ({ENDLESS})" if change_rows else ENDLESS).fetchall()
        assert not isinstance(caught.value, sqlite3.OperationalError)
        with database.transaction() as connection:
            assert connection.execute("SELECT bytes FROM total").fetchone() == (0,)


def test_statement_declared_long_gets_a_longer_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("kvtier.store.tiers.disk.catalog.database.TURN_SECONDS", -1.0)
    counted = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000) SELECT COUNT(*) FROM n"
    with closing(Database(tmp_path / "catalog.sqlite")) as database:
        with database.reading(long=True) as connection:
            assert connection.execute(counted).fetchone() == (10000,)
        with pytest.raises(sqlite3.DatabaseError, match="too long"), database.reading() as connection:
            connection.execute(counted).fetchone()


def test_connections_distrust_the_schema_and_check_cell_sizes(tmp_path):
    with closing(Database(tmp_path / "catalog.sqlite")) as database:
        for access in (database.reading, database.transaction):
            with access() as connection:
                assert connection.execute("PRAGMA trusted_schema").fetchone() == (0,)
                assert connection.execute("PRAGMA cell_size_check").fetchone() == (1,)


# --- parents that form a cycle ----------------------------------------------------------------------------------------


def test_store_operations_terminate_when_parents_form_a_cycle(folder):
    with opened(folder) as store:
        first, second = (entry.key for entry in blocks_of(store))
        commit(store, count(4, first=50))
        store.flush()
    change(folder, f"UPDATE blocks SET parent = x'{second}' WHERE key = x'{first}'")
    change(folder, "UPDATE blocks SET children = 1")
    with opened(folder) as store:
        store.chains()
        store.usage()
        store.names()
        store.forget(count(4))
        store.forget("chat")
        store.prune(to_bytes=0)
        commit(store, count(16))


def blocks_of(store):
    return sorted(store._tiers.entries(), key=lambda entry: entry.depth_tokens)


def test_leaf_below_a_cycle_of_parents_is_listed_and_can_be_named(folder):
    with opened(folder) as store:
        commit(store, count(12))
        store.flush()
        first, second, third = (entry.key for entry in blocks_of(store))
    change(folder, f"UPDATE blocks SET parent = x'{second}' WHERE key = x'{first}'")
    with opened(folder) as store:
        assert [chain.key for chain in store.chains()] == [third]
        assert store.name_chain(third[:20], "cycle").name == "cycle"
        store.forget_chain(third[:20])


def test_rebuild_terminates_when_a_block_is_its_own_root_and_parent(tmp_path, monkeypatch):
    """Depths are set from the roots down."""
    monkeypatch.setattr("kvtier.store.tiers.disk.catalog.database.LONG_SECONDS", 1.0)
    with closing(Database(tmp_path / "catalog.sqlite")) as database:
        catalog = Catalog(database, LeastRecentlyUsed(), lambda: 0.0)
        own_child = BlockId(ROOT, ROOT, ROOT, count(4))
        assert catalog.adopt([(own_child, 10, 0.0)]) == 1
        assert catalog.rebuild(lambda: [(own_child, 10, 0.0)])
