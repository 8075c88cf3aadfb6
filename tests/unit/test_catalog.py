"""The table behind the disk tier."""

import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from storekit import ROOT, block, chain, count, ids

from kvtier.store.catalog import Catalog, NoRoom


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog(tmp_path / "catalog.sqlite")
    yield catalog
    catalog.close()


def put(catalog, block, size=10, budget=100):
    evicted = catalog.reserve(block.id, size, budget)
    if evicted is not None:
        catalog.ready(block.id.key)
    return evicted


def test_only_ready_blocks_are_found_though_reserved_ones_count(catalog):
    new = block(count(4)).id
    assert catalog.reserve(new, 10, 100) == []
    assert catalog.find(new.key) is None
    assert catalog.children(ROOT) == []
    assert (len(catalog), catalog.total_bytes) == (0, 10)
    assert catalog.writers() == [(new.key, ROOT, os.getpid())]
    catalog.ready(new.key)
    found = catalog.find(new.key)
    assert (found.key, found.parent, found.root, found.tokens.tolist()) == (new.key, ROOT, ROOT, [0, 1, 2, 3])
    assert [child.key for child in catalog.children(ROOT)] == [new.key]
    assert (len(catalog), catalog.writers()) == (1, [])


def test_a_block_is_reserved_once(catalog):
    new = block(count(4)).id
    assert catalog.reserve(new, 10, 100) == []
    assert catalog.reserve(new, 10, 100) is None
    catalog.ready(new.key)
    assert catalog.reserve(new, 10, 100) is None
    assert catalog.total_bytes == 10


def test_a_block_larger_than_the_budget_evicts_nothing(catalog):
    put(catalog, block(count(4)))
    with pytest.raises(NoRoom):
        catalog.reserve(block(count(4, first=9)).id, 101, 100)
    assert len(catalog) == 1


def test_the_leaf_that_was_not_used_for_longest_goes(catalog):
    parent, child = chain(count(8), 4)
    other = block(count(4, first=50))
    for each in (parent, child, other):
        put(catalog, each)
    catalog.touch([child.id.key])
    assert put(catalog, block(count(4, first=90)), budget=30) == [(other.id.key, ROOT)]
    assert put(catalog, block(count(4, first=70)), budget=30) == [(child.id.key, ROOT)]  # its parent is older


def test_a_block_whose_parent_is_not_there_evicts_nothing(catalog):
    first, second, third = chain(count(12), 4)
    put(catalog, first)
    assert catalog.reserve(third.id, 10, 10) is None
    assert catalog.find(first.id.key) is not None
    assert put(catalog, second) == []
    assert put(catalog, third) == []


def test_the_parent_of_the_new_block_and_blocks_being_written_stay(catalog):
    parent, child = chain(count(8), 4)
    put(catalog, parent)
    with pytest.raises(NoRoom):
        catalog.reserve(child.id, 10, 10)
    catalog.remove(parent.id.key)
    catalog.reserve(parent.id, 10, 10)
    with pytest.raises(NoRoom):
        catalog.reserve(block(count(4, first=9)).id, 10, 10)
    assert catalog.total_bytes == 10


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(1, 40)), max_size=15))
def test_the_total_is_the_sum_and_holds_to_the_budget(puts):
    with tempfile.TemporaryDirectory() as folder, closing(Catalog(Path(folder) / "catalog.sqlite")) as catalog:
        for tokens, size in puts:
            for each in chain(ids(*tokens), 4):
                if each.id.parent != ROOT and catalog.find(each.id.parent) is None:
                    break
                try:
                    put(catalog, each, size)
                except NoRoom:
                    break
                (total,) = catalog._connection.execute("SELECT COALESCE(SUM(bytes), 0) FROM blocks").fetchone()
                assert catalog.total_bytes == total <= 100
            parents = {row[0] for row in catalog._connection.execute("SELECT parent FROM blocks")}
            keys = {row[0] for row in catalog._connection.execute("SELECT key FROM blocks")}
            assert parents <= keys | {ROOT}


def test_the_table_is_rebuilt_once_and_counts_a_block_once(catalog, tmp_path):
    found = [(block(count(4)).id, 10), (block(count(4)).id, 10), (block(count(4, first=9)).id, 10)]
    catalog.rebuild_once(lambda: found)
    assert (len(catalog), catalog.total_bytes) == (2, 20)
    with closing(Catalog(tmp_path / "catalog.sqlite")) as other:
        other.rebuild_once(lambda: pytest.fail("another process has done it"))


def test_a_rebuild_that_fails_is_done_again(catalog):
    def found():
        yield block(count(4)).id, 10
        raise OSError("the drive is gone")

    with pytest.raises(OSError, match="gone"):
        catalog.rebuild_once(found)
    assert len(catalog) == 0
    catalog.rebuild_once(lambda: [(block(count(4)).id, 10)])
    assert len(catalog) == 1


def test_removing_gives_the_bytes_back(catalog):
    put(catalog, block(count(4)))
    catalog.remove(block(count(4)).id.key)
    catalog.remove("unknown")
    assert (len(catalog), catalog.total_bytes) == (0, 0)


def test_two_connections_share_one_table(tmp_path, catalog):
    with closing(Catalog(tmp_path / "catalog.sqlite")) as other:
        put(catalog, block(count(4)))
        assert other.find(block(count(4)).id.key) is not None
        assert other.reserve(block(count(4)).id, 10, 100) is None


def test_what_is_no_database_is_an_error(tmp_path):
    (tmp_path / "other.sqlite").write_text("this is a letter to my mother\n" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        Catalog(tmp_path / "other.sqlite")


def test_a_fork_leaves_no_connection_and_the_catalog_goes_on(tmp_path, catalog):
    put(catalog, block(count(4)))
    catalog.before_fork()
    assert not (tmp_path / "catalog.sqlite-wal").exists(), "SQLite removes it when the last connection is closed"
    catalog.after_fork(in_child=False)
    assert catalog.find(block(count(4)).id.key) is not None
    put(catalog, block(count(4, first=9)))
    assert len(catalog) == 2


def test_a_catalog_that_is_lost_when_the_process_forks_is_not_made_anew_and_empty(tmp_path, catalog):
    put(catalog, block(count(4)))
    catalog.before_fork()
    (tmp_path / "catalog.sqlite").unlink()
    catalog.after_fork(in_child=False)
    with pytest.raises(sqlite3.OperationalError):
        catalog.find(block(count(4)).id.key)
    assert not (tmp_path / "catalog.sqlite").exists()


def test_a_closed_catalog_stays_closed(catalog):
    catalog.close()
    catalog.before_fork()
    catalog.after_fork(in_child=False)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        catalog.find("any")
