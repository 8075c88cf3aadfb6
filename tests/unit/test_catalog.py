"""The rows behind the disk tier."""

import sqlite3
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from storekit import OTHER_ROOT, ROOT, block, chain, count, ids

from kvtier.store.catalog import Catalog, Prepared
from kvtier.store.chain import common_run
from kvtier.store.database import Database
from kvtier.store.eviction import LeastRecentlyUsed
from kvtier.store.lifecycle import State
from kvtier.store.schema import OtherVersionError

BUDGET = 100


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def new_catalog(path=None, clock=None):
    database = Database(path)
    return Catalog(database, LeastRecentlyUsed(), clock or Clock()), database


@pytest.fixture
def catalog(tmp_path):
    catalog, database = new_catalog(tmp_path / "catalog.sqlite")
    yield catalog
    database.close()


def prepare(catalog, block, size=10, budget=BUDGET, owner="me"):
    return catalog.prepare_store(block.id, size, budget, owner)


def put(catalog, block, size=10, budget=BUDGET):
    outcome = prepare(catalog, block, size, budget)
    if outcome is Prepared.RESERVED:
        assert catalog.complete_store(block.id.key, "me")
    return outcome


def evict(catalog, nbytes, keep="", leased=(), **more):
    gone = catalog.evict(nbytes, "me", keep, lambda place: place.key in leased, at_most=100, **more)
    return [place.key for place in gone]


def delete(catalog, keys):
    catalog.complete_delete(keys)


def keys(blocks):
    return [each.key for each in blocks]


def test_only_ready_blocks_are_found_though_prepared_ones_count(catalog):
    new = block(count(4))
    key = new.id.key
    assert prepare(catalog, new) is Prepared.RESERVED
    assert not catalog.contains(key)
    assert catalog.find(key) is None
    assert catalog.nearest(ROOT, count(4)) == []
    assert (catalog.counts(), catalog.total_bytes) == ((0, 0), 10)
    assert [(place.key, place.root, owner) for place, owner in catalog.moving(State.WRITING)] == [(key, ROOT, "me")]
    assert catalog.complete_store(key, "me")
    found = catalog.find(key)
    assert (found.key, found.parent, found.root, found.tokens.tolist()) == (key, ROOT, ROOT, [0, 1, 2, 3])
    assert keys(catalog.nearest(ROOT, count(4))) == [key]
    assert catalog.counts() == (1, 0)
    assert catalog.moving(State.WRITING) == []


def test_a_block_is_prepared_once(catalog):
    new = block(count(4))
    assert prepare(catalog, new) is Prepared.RESERVED
    assert prepare(catalog, new, owner="another") is Prepared.ELSEWHERE
    catalog.complete_store(new.id.key, "me")
    assert prepare(catalog, new) is Prepared.PRESENT
    catalog.discard([new.id.key], "me")
    assert prepare(catalog, new) is Prepared.LEAVING
    delete(catalog, [new.id.key])
    assert prepare(catalog, new) is Prepared.RESERVED
    assert catalog.total_bytes == 10


def test_only_who_prepared_a_store_can_end_it(catalog):
    new = block(count(4))
    prepare(catalog, new)
    assert not catalog.complete_store(new.id.key, "another")
    assert not catalog.abort_store(new.id.key, "another")
    assert catalog.abort_store(new.id.key, "me")
    assert not catalog.complete_store(new.id.key, "me")
    assert catalog.total_bytes == 0


def test_a_store_that_does_not_fit_changes_nothing(catalog):
    put(catalog, block(count(4)), 60)
    assert prepare(catalog, block(count(4, first=9)), 41) is Prepared.NO_ROOM
    assert (catalog.counts(), catalog.total_bytes) == ((1, 0), 60)


def test_a_block_whose_parent_is_not_there_is_an_orphan(catalog):
    first, second, third = chain(count(12), 4)
    put(catalog, first)
    assert prepare(catalog, third) is Prepared.ORPHAN
    assert put(catalog, second) is Prepared.RESERVED
    assert put(catalog, third) is Prepared.RESERVED
    catalog.discard([first.id.key], "me")
    assert prepare(catalog, chain(ids(0, 1, 2, 3, 9), 4)[1]) is Prepared.ORPHAN


def test_the_leaf_that_was_not_used_for_longest_goes(catalog):
    parent, child = chain(count(8), 4)
    other = block(count(4, first=50))
    for each in (parent, child, other):
        put(catalog, each)
        catalog.touch([each.id.key], {})
    catalog.touch([child.id.key], {})
    assert evict(catalog, 1) == [other.id.key]
    assert evict(catalog, 1) == [child.id.key]  # its parent is older
    assert evict(catalog, 1) == [parent.id.key]


def test_what_leaves_is_not_found_but_counts_until_it_is_gone(catalog):
    new = block(count(4))
    put(catalog, new)
    (gone,) = evict(catalog, 1)
    assert catalog.find(gone) is None
    assert catalog.total_bytes == 10
    assert [(place.key, owner) for place, owner in catalog.moving(State.LEAVING)] == [(gone, "me")]
    delete(catalog, [gone])
    assert catalog.total_bytes == 0
    assert catalog.moving(State.LEAVING) == []


def test_an_eviction_that_cannot_free_enough_changes_nothing(catalog):
    parent, child = chain(count(8), 4)
    other = block(count(4, first=50))
    for each in (parent, child, other):
        put(catalog, each)
    assert evict(catalog, 31) == []
    assert evict(catalog, 30, keep=parent.id.key) == []
    assert evict(catalog, 30, leased=[other.id.key]) == []
    assert catalog.counts() == (3, 0)
    assert len(evict(catalog, 20, leased=[other.id.key])) == 2
    assert evict(catalog, 30, leased=[], all_or_nothing=False) == [other.id.key]


def test_blocks_that_are_written_or_leased_stay(catalog):
    parent, child = chain(count(8), 4)
    put(catalog, parent)
    prepare(catalog, child)
    assert evict(catalog, 1) == []  # a child that is being written holds its parent
    catalog.abort_store(child.id.key, "me")
    assert evict(catalog, 1, leased=[parent.id.key]) == []
    assert evict(catalog, 1) == [parent.id.key]


SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=9)


@given(st.lists(st.tuples(SEQUENCES, st.integers(1, 40)), max_size=15))
def test_the_total_is_the_sum_and_holds_to_the_budget_and_no_block_outlives_its_parent(puts):
    catalog, database = new_catalog()
    with closing(database):
        for tokens, size in puts:
            for each in chain(ids(*tokens), 4):
                while (outcome := put(catalog, each, size)) is Prepared.NO_ROOM:
                    gone = evict(catalog, catalog.total_bytes + size - BUDGET, keep=each.id.parent)
                    if not gone:
                        break
                    delete(catalog, gone)
                if outcome not in (Prepared.RESERVED, Prepared.PRESENT):
                    break
                assert catalog.total_bytes == sum(entry.nbytes for entry in catalog.entries()) <= BUDGET
            entries = {entry.key: entry for entry in catalog.entries()}
            for entry in entries.values():
                assert entry.parent == ROOT or entry.parent in entries
                assert entry.children == sum(other.parent == entry.key for other in entries.values())
                before = entries[entry.parent] if entry.parent != ROOT else None
                assert entry.depth_tokens == (before.depth_tokens + before.tokens if before else 0)
        assert catalog.recount()[0] == catalog.total_bytes


@given(st.lists(SEQUENCES, max_size=12), SEQUENCES)
def test_neighbours_share_the_longest_run_and_tails_are_found(stored, wanted):
    catalog, database = new_catalog()
    with closing(database):
        for tokens in stored:
            put(catalog, block(ids(*tokens)), 1, 10**6)
        put(catalog, block(ids(*wanted), root=OTHER_ROOT, parent=OTHER_ROOT), 1, 10**6)
        runs = [common_run(ids(*tokens), ids(*wanted)) for tokens in stored]
        found = [common_run(each.tokens, ids(*wanted)) for each in catalog.nearest(ROOT, ids(*wanted))]
        assert max(found, default=-1) == max(runs, default=-1)
        tails = {tuple(each.tokens.tolist()) for each in catalog.tails(ROOT, ids(*wanted))}
        assert tails == {tuple(t) for t in stored if len(t) < len(wanted) and t == wanted[: len(t)]}


def test_neighbours_that_are_not_ready_are_passed_over(catalog):
    near, far = block(ids(1, 2, 3, 4)), block(ids(1, 2, 9, 9))
    prepare(catalog, near)
    put(catalog, far)
    assert keys(catalog.nearest(ROOT, ids(1, 2, 3, 4))) == [far.id.key]


def found_of(*blocks):
    return [(each.id, 10, 500.0) for each in blocks]


def test_the_tables_are_filled_once_and_count_a_block_once(catalog, tmp_path):
    first, second, third = chain(count(12), 4)
    assert catalog.rebuild_once(lambda: found_of(third, first, first, second))
    assert (catalog.counts(), catalog.total_bytes) == ((3, 0), 30)
    assert [catalog.entry(each.id.key).depth_tokens for each in (first, second, third)] == [0, 4, 8]
    assert [catalog.entry(each.id.key).children for each in (first, second, third)] == [1, 1, 0]
    other, database = new_catalog(tmp_path / "catalog.sqlite")
    with closing(database):
        assert not other.rebuild_once(lambda: pytest.fail("another process has done it"))


def test_a_rebuild_that_fails_is_done_again(catalog):
    def found():
        yield from found_of(block(count(4)))
        raise OSError("the drive is gone")

    with pytest.raises(OSError, match="gone"):
        catalog.rebuild_once(found)
    assert catalog.counts() == (0, 0)
    assert catalog.rebuild_once(lambda: found_of(block(count(4))))
    assert catalog.counts() == (1, 0)


def test_a_file_whose_writer_died_is_adopted_with_its_real_bytes(catalog):
    new = block(count(4))
    prepare(catalog, new, 99)
    assert catalog.adopt(found_of(new)) == 1
    assert catalog.contains(new.id.key)
    assert catalog.total_bytes == 10
    assert catalog.adopt(found_of(new)) == 0


def test_blocks_expire_by_their_last_use(tmp_path):
    clock = Clock()
    catalog, database = new_catalog(tmp_path / "catalog.sqlite", clock)
    with closing(database):
        old, new = block(count(4)), block(count(4, first=50))
        put(catalog, old)
        put(catalog, new)
        clock.now += 100
        catalog.touch([new.id.key], {new.id.key: 3})
        assert catalog.unused_since(clock.now) == [old.id.key]
        assert not catalog.contains(old.id.key, since=clock.now)
        assert catalog.contains(new.id.key, since=clock.now)
        assert keys(catalog.nearest(ROOT, count(4), since=clock.now)) == [new.id.key]
        assert catalog.entry(new.id.key).hits == 3


def test_what_was_evicted_lately_is_remembered_when_it_returns(catalog):
    new = block(count(4))
    put(catalog, new)
    catalog.touch([new.id.key], {})
    catalog.touch([new.id.key], {})
    delete(catalog, evict(catalog, 1))
    put(catalog, new)
    assert catalog.entry(new.id.key).uses == 2
    delete(catalog, [place.key for place in catalog.discard([new.id.key], "me")])
    put(catalog, new)
    assert catalog.entry(new.id.key).uses == 0, "what was discarded is not remembered"


def test_bytes_are_corrected_and_counted_anew(catalog):
    put(catalog, block(count(4)))
    catalog.set_bytes(block(count(4)).id.key, 25)
    assert catalog.total_bytes == 25
    assert catalog.recount() == (25, 25)


def test_two_connections_share_one_table(tmp_path, catalog):
    other, database = new_catalog(tmp_path / "catalog.sqlite")
    with closing(database):
        put(catalog, block(count(4)))
        assert other.contains(block(count(4)).id.key)
        assert prepare(other, block(count(4))) is Prepared.PRESENT


def test_a_boot_is_told_from_the_one_before(catalog):
    assert not catalog.begin_boot("first")
    assert catalog.begin_boot("first")
    assert not catalog.begin_boot("second")
    assert not catalog.begin_boot("")
    assert not catalog.begin_boot("")  # a system that does not tell


def test_what_is_no_database_is_an_error(tmp_path):
    (tmp_path / "other.sqlite").write_text("this is a letter to my mother\n" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        Database(tmp_path / "other.sqlite")


def test_tables_of_another_version_are_told_from_damage(tmp_path):
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as old:
        old.execute("CREATE TABLE blocks (key TEXT)")
        old.execute("PRAGMA user_version = 1")
    with pytest.raises(OtherVersionError, match="version 1"):
        Database(tmp_path / "catalog.sqlite")


def test_a_fork_leaves_no_connection_and_the_catalog_goes_on(tmp_path):
    catalog, database = new_catalog(tmp_path / "catalog.sqlite")
    with closing(database):
        put(catalog, block(count(4)))
        database.before_fork()
        assert not (tmp_path / "catalog.sqlite-wal").exists(), "SQLite removes it when the last connection is closed"
        database.after_fork(in_child=False)
        assert catalog.contains(block(count(4)).id.key)
        put(catalog, block(count(4, first=9)))
        assert catalog.counts() == (2, 0)


def test_a_catalog_that_is_lost_when_the_process_forks_is_not_made_anew_and_empty(tmp_path):
    catalog, database = new_catalog(tmp_path / "catalog.sqlite")
    with closing(database):
        put(catalog, block(count(4)))
        database.before_fork()
        (tmp_path / "catalog.sqlite").unlink()
        database.after_fork(in_child=False)
        with pytest.raises(sqlite3.OperationalError):
            catalog.find(block(count(4)).id.key)
        assert not (tmp_path / "catalog.sqlite").exists()


def test_a_closed_catalog_stays_closed(tmp_path):
    catalog, database = new_catalog(tmp_path / "catalog.sqlite")
    database.close()
    database.before_fork()
    database.after_fork(in_child=False)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        catalog.find(block(count(4)).id.key)


def test_ids_survive_whatever_they_are(catalog):
    extremes = ids(0, -1, 2**63 - 1, -(2**63))
    put(catalog, block(extremes))
    assert np.array_equal(catalog.find(block(extremes).id.key).tokens, extremes)
