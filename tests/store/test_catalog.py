"""The SQLite catalog of the disk tier: lookups, block states, eviction, rebuilds and totals."""

import sqlite3
from contextlib import closing, contextmanager
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtier.store.chain import BlockId, common_run
from kvtier.store.eviction import LeastRecentlyUsed
from kvtier.store.names import Name
from kvtier.store.tiers.block_states import State
from kvtier.store.tiers.disk.catalog.adoption import Rebuilt
from kvtier.store.tiers.disk.catalog.blocks import Catalog, Prepared
from kvtier.store.tiers.disk.catalog.database import Database
from kvtier.store.tiers.disk.catalog.schema import OtherVersionError
from kvtier.store.tiers.disk.names import Names
from tests.support.stores import OTHER_ROOT, ROOT, block, chain, count, ids

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
def empty_catalog(tmp_path):
    """A catalog whose tables have just been created."""
    catalog, database = new_catalog(tmp_path / "catalog.sqlite")
    yield catalog
    database.close()


@pytest.fixture
def catalog(empty_catalog):
    empty_catalog.rebuild(list)
    return empty_catalog


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


def test_prepared_block_counts_its_bytes_but_is_found_only_once_complete(catalog):
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


def test_prepare_store_outcome_follows_the_state_of_the_block(catalog):
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


def test_only_the_owner_can_complete_or_abort_a_store(catalog):
    new = block(count(4))
    prepare(catalog, new)
    assert not catalog.complete_store(new.id.key, "another")
    assert not catalog.abort_store(new.id.key, "another")
    assert catalog.abort_store(new.id.key, "me")
    assert not catalog.complete_store(new.id.key, "me")
    assert catalog.total_bytes == 0


def test_prepare_store_without_room_changes_nothing(catalog):
    put(catalog, block(count(4)), 60)
    assert prepare(catalog, block(count(4, first=9)), 41) is Prepared.NO_ROOM
    assert (catalog.counts(), catalog.total_bytes) == ((1, 0), 60)


def test_block_whose_parent_is_missing_or_discarded_is_an_orphan(catalog):
    first, second, third = chain(count(12), 4)
    put(catalog, first)
    assert prepare(catalog, third) is Prepared.ORPHAN
    assert put(catalog, second) is Prepared.RESERVED
    assert put(catalog, third) is Prepared.RESERVED
    catalog.discard([first.id.key], "me")
    assert prepare(catalog, chain(ids(0, 1, 2, 3, 9), 4)[1]) is Prepared.ORPHAN


def test_catalog_evicts_the_least_recently_used_leaf(catalog):
    parent, child = chain(count(8), 4)
    other = block(count(4, first=50))
    for each in (parent, child, other):
        put(catalog, each)
        catalog.touch([each.id.key], {})
    catalog.touch([child.id.key], {})
    assert evict(catalog, 1) == [other.id.key]
    assert evict(catalog, 1) == [child.id.key]  # the parent was used earlier, but is no leaf
    assert evict(catalog, 1) == [parent.id.key]


def test_one_eviction_takes_a_parent_after_its_last_child(catalog):
    parent, child = chain(count(8), 4)
    other = block(count(4, first=50))
    for each in (parent, child, other):
        put(catalog, each)
    for each in (parent, other, child):
        catalog.touch([each.id.key], {})
    assert evict(catalog, 30) == [other.id.key, child.id.key, parent.id.key]


def test_evicted_block_is_not_found_but_counts_until_it_is_deleted(catalog):
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


def test_eviction_skips_leased_blocks_and_parents_of_blocks_being_written(catalog):
    parent, child = chain(count(8), 4)
    put(catalog, parent)
    prepare(catalog, child)
    assert evict(catalog, 1) == []  # a child being written keeps its parent
    catalog.abort_store(child.id.key, "me")
    assert evict(catalog, 1, leased=[parent.id.key]) == []
    assert evict(catalog, 1) == [parent.id.key]


SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=9)


@given(st.lists(st.tuples(SEQUENCES, st.integers(1, 40)), max_size=15))
def test_total_is_exact_and_within_budget_and_no_block_outlives_its_parent(puts):
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
def test_nearest_finds_the_longest_common_run_and_tails_finds_all_prefixes(stored, wanted):
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


def test_nearest_skips_blocks_that_are_not_ready(catalog):
    near, far = block(ids(1, 2, 3, 4)), block(ids(1, 2, 9, 9))
    prepare(catalog, near)
    put(catalog, far)
    assert keys(catalog.nearest(ROOT, ids(1, 2, 3, 4))) == [far.id.key]


def found_of(*blocks):
    return [(each.id, 10, 500.0) for each in blocks]


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_rebuild_runs_once_and_counts_a_duplicate_block_once(empty_catalog, tmp_path, order):
    links = chain(count(16), 4)
    blocks = [links[place] for place in order]
    assert empty_catalog.rebuild(lambda: found_of(*blocks, blocks[0])) is Rebuilt.ANEW
    assert (empty_catalog.counts(), empty_catalog.total_bytes) == ((4, 0), 40)
    assert [empty_catalog.entry(each.id.key).depth_tokens for each in links] == [0, 4, 8, 12]
    assert [empty_catalog.entry(each.id.key).children for each in links] == [1, 1, 1, 0]
    other, database = new_catalog(tmp_path / "catalog.sqlite")
    with closing(database):
        assert other.rebuild(lambda: pytest.fail("another process has done it")) is Rebuilt.NOT


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_blocks_adopted_in_any_order_get_the_right_depth(catalog, order):
    links = chain(count(16), 4)
    for place in order:
        catalog.adopt(found_of(links[place]))
    assert [catalog.entry(each.id.key).depth_tokens for each in links] == [0, 4, 8, 12]


def test_rebuild_without_the_first_block_starts_depths_at_zero(empty_catalog):
    _, second, third = chain(count(12), 4)
    empty_catalog.rebuild(lambda: found_of(third, second))
    assert [empty_catalog.entry(each.id.key).depth_tokens for each in (second, third)] == [0, 4]


def test_failed_rebuild_is_resumed_by_the_next(empty_catalog, monkeypatch):
    first, second = block(count(4)), block(count(4, first=9))

    def found():
        yield from found_of(first)
        raise OSError("the drive is gone")

    monkeypatch.setattr("kvtier.store.tiers.disk.catalog.adoption._ROWS_AT_ONCE", 1)
    with pytest.raises(OSError, match="gone"):
        empty_catalog.rebuild(found)
    assert empty_catalog.counts() == (1, 0)
    assert empty_catalog.rebuild(lambda: found_of(first, second)) is Rebuilt.RESUMED
    assert empty_catalog.counts() == (2, 0)


def test_nothing_is_evicted_before_a_rebuild_has_seen_all_files(empty_catalog, monkeypatch):
    """A file not seen yet may hold the child of a known block."""
    monkeypatch.setattr("kvtier.store.tiers.disk.catalog.adoption._ROWS_AT_ONCE", 1)
    first, second = chain(count(8), 4)

    def found():
        yield from found_of(first)
        assert empty_catalog.counts() == (1, 0)
        assert evict(empty_catalog, 1) == []
        yield from found_of(second)

    empty_catalog.rebuild(found)
    assert evict(empty_catalog, 1) == [second.id.key]


def test_rebuild_stops_when_another_process_has_finished_it(empty_catalog, tmp_path, monkeypatch):
    monkeypatch.setattr("kvtier.store.tiers.disk.catalog.adoption._ROWS_AT_ONCE", 1)
    blocks = chain(count(8), 4)
    other, database = new_catalog(tmp_path / "catalog.sqlite")

    def found():
        yield from found_of(blocks[0])
        other.rebuild(lambda: found_of(*blocks))
        assert evict(other, 1) == [blocks[1].id.key]
        delete(other, [blocks[1].id.key])
        yield from found_of(blocks[1])  # its file was read before the eviction

    with closing(database):
        assert empty_catalog.rebuild(found) is Rebuilt.NOT
        assert empty_catalog.counts() == (1, 0)


def test_rebuild_keeps_the_write_ahead_log_small(empty_catalog, tmp_path, monkeypatch):
    monkeypatch.setattr("kvtier.store.tiers.disk.catalog.adoption._ROWS_AT_ONCE", 50)
    log = tmp_path / "catalog.sqlite-wal"
    sizes = []

    def found():
        for first in range(1000):
            sizes.append(log.stat().st_size)
            yield BlockId.of(ROOT, ROOT, count(256, first=first)), 10, 500.0

    empty_catalog.rebuild(found)
    assert max(sizes) < 12 * 2**20
    assert log.stat().st_size == 0


def test_adopting_an_unfinished_write_counts_its_real_bytes(catalog):
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


def test_evicted_block_keeps_its_use_count_and_a_discarded_one_loses_it(catalog):
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


def test_set_bytes_updates_the_total_and_recount_agrees(catalog):
    put(catalog, block(count(4)))
    catalog.set_bytes(block(count(4)).id.key, 25)
    assert catalog.total_bytes == 25
    assert catalog.recount() == (25, 25)


def test_two_connections_see_the_same_rows(tmp_path, catalog):
    other, database = new_catalog(tmp_path / "catalog.sqlite")
    with closing(database):
        put(catalog, block(count(4)))
        assert other.contains(block(count(4)).id.key)
        assert prepare(other, block(count(4))) is Prepared.PRESENT


def test_begin_boot_is_true_only_for_the_same_known_boot(catalog):
    assert not catalog.begin_boot("first")
    assert catalog.begin_boot("first")
    assert not catalog.begin_boot("second")
    assert not catalog.begin_boot("")
    assert not catalog.begin_boot("")  # the system reports no boot id


def test_opening_a_file_that_is_no_database_raises(tmp_path):
    (tmp_path / "other.sqlite").write_text("this is a letter to my mother\n" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        Database(tmp_path / "other.sqlite")


def test_tables_of_another_version_raise_other_version_error(tmp_path):
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as old:
        old.execute("CREATE TABLE blocks (key TEXT)")
        old.execute("PRAGMA user_version = 1")
    with pytest.raises(OtherVersionError, match="version 1"):
        Database(tmp_path / "catalog.sqlite")


def test_catalog_closes_its_connections_at_a_fork_and_works_after_it(tmp_path):
    catalog, database = new_catalog(tmp_path / "catalog.sqlite")
    with closing(database):
        put(catalog, block(count(4)))
        database.before_fork()
        assert not (tmp_path / "catalog.sqlite-wal").exists(), "SQLite removes it when the last connection is closed"
        database.after_fork(in_child=False)
        assert catalog.contains(block(count(4)).id.key)
        put(catalog, block(count(4, first=9)))
        assert catalog.counts() == (2, 0)


def test_catalog_file_lost_during_a_fork_is_not_recreated_empty(tmp_path):
    catalog, database = new_catalog(tmp_path / "catalog.sqlite")
    with closing(database):
        put(catalog, block(count(4)))
        database.before_fork()
        (tmp_path / "catalog.sqlite").unlink()
        database.after_fork(in_child=False)
        with pytest.raises(sqlite3.OperationalError):
            catalog.find(block(count(4)).id.key)
        assert not (tmp_path / "catalog.sqlite").exists()


def test_closed_catalog_stays_closed_after_a_fork(tmp_path):
    catalog, database = new_catalog(tmp_path / "catalog.sqlite")
    database.close()
    database.before_fork()
    database.after_fork(in_child=False)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        catalog.find(block(count(4)).id.key)


def test_extreme_token_ids_round_trip_through_the_catalog(catalog):
    extremes = ids(0, -1, 2**63 - 1, -(2**63))
    put(catalog, block(extremes))
    assert np.array_equal(catalog.find(block(extremes).id.key).tokens, extremes)


# --- totals that triggers maintain ------------------------------------------------------------------------------------


class CountedMachine(RuleBasedStateMachine):
    """After any operation, the sums in ``total``, the pins and the child counts equal a full count."""

    def __init__(self):
        super().__init__()
        self.database = Database(None)
        self.catalog = Catalog(self.database, LeastRecentlyUsed(), Clock())
        self.names = Names(self.database, None, Clock())

    @rule(tokens=SEQUENCES, end=st.sampled_from(["complete_store", "abort_store", None]))
    def put(self, tokens, end):
        for each in chain(ids(*tokens), 4):
            outcome = prepare(self.catalog, each)
            if outcome is Prepared.RESERVED and end is not None:
                getattr(self.catalog, end)(each.id.key, "me")
            elif outcome is not Prepared.PRESENT:
                break

    @rule(tokens=SEQUENCES)
    def adopt(self, tokens):
        self.catalog.adopt(found_of(*chain(ids(*tokens), 4)[-1:]))

    @rule(tokens=SEQUENCES, nbytes=st.integers(1, 30))
    def resize(self, tokens, nbytes):
        self.catalog.set_bytes(chain(ids(*tokens), 4)[-1].id.key, nbytes)

    @rule(nbytes=st.integers(1, 60), all_or_nothing=st.booleans())
    def evict(self, nbytes, all_or_nothing):
        evict(self.catalog, nbytes, all_or_nothing=all_or_nothing)

    @rule(tokens=SEQUENCES)
    def discard(self, tokens):
        self.catalog.discard([chain(ids(*tokens), 4)[0].id.key], "me")

    @rule()
    def delete(self):
        delete(self.catalog, [place.key for place, _ in self.catalog.moving(State.LEAVING)])

    @rule(tokens=SEQUENCES, name=st.sampled_from("ab"), pinned=st.booleans())
    def name(self, tokens, name, pinned):
        keys = tuple(each.id.key for each in chain(ids(*tokens), 4))
        self.names.assign(Name(name, ROOT, keys, len(tokens), pinned, None, 0.0))
        assert self.names.get(name).keys == keys

    @rule(name=st.sampled_from("ab"))
    def unname(self, name):
        self.names.remove(name)

    @invariant()
    def counts(self):
        with self.database.reading() as connection:
            kept = connection.execute(
                "SELECT bytes, held_bytes, blocks, ready, pinned, ghosts, names FROM total"
            ).fetchone()
            counted = connection.execute(
                f"SELECT TOTAL(bytes), TOTAL(bytes * (state != {State.READY:d} OR {PINNED})), COUNT(*), "
                f"TOTAL(state = {State.READY:d}), TOTAL(state = {State.READY:d} AND {PINNED}), "
                "(SELECT COUNT(*) FROM ghosts), (SELECT COUNT(*) FROM names) FROM blocks"
            ).fetchone()
            assert kept == counted
            wrong = connection.execute(
                "SELECT key FROM blocks WHERE pins != (SELECT COUNT(*) FROM links WHERE pinned AND key = blocks.key) "
                "OR children != (SELECT COUNT(*) FROM blocks AS c WHERE c.parent = blocks.key "
                f"AND c.state != {State.LEAVING:d})"
            ).fetchall()
            assert wrong == []
        assert self.catalog.counts() == kept[3:5]
        assert len(self.names) == kept[6]

    def teardown(self):
        self.database.close()


PINNED = "EXISTS (SELECT 1 FROM links WHERE links.key = blocks.key AND links.pinned)"
TestSums = CountedMachine.TestCase
TestSums.settings = settings(stateful_step_count=20)


# --- queries whose cost does not grow with the number of rows ---------------------------------------------------------


class CountingConnection(sqlite3.Connection):
    """Counts the steps of SQLite's virtual machine, which are the same on every computer."""

    steps = 0

    def set_progress_handler(self, handler, n):
        super().set_progress_handler(self._step, 1)

    def _step(self):
        CountingConnection.steps += 1
        return False


def counting(uri, seconds):
    return sqlite3.connect(
        uri, uri=True, timeout=seconds, isolation_level=None, check_same_thread=False, factory=CountingConnection
    )


def siblings(n):
    return [BlockId.of(ROOT, ROOT, count(4, first=8 * first)) for first in range(n)]


def old_and_pinned(n):
    return [BlockId.of(ROOT, ROOT, count(4, first=10**6 + 8 * first)) for first in range(n)]


@contextmanager
def crowd(n):
    """Yield a catalog of ``n`` unpinned siblings, and ``n`` older ones pinned by ``n`` names."""
    with closing(Database(None, make_connection=counting)) as database:
        clock = Clock()
        catalog = Catalog(database, LeastRecentlyUsed(), clock)
        names = Names(database, None, clock)
        catalog.adopt((each, 10, 1.0) for each in old_and_pinned(n))
        for number, each in enumerate(old_and_pinned(n)):
            names.assign(Name(str(number), ROOT, (each.key,), 4, True, None, 0.0))
        catalog.adopt((each, 10, 500.0) for each in siblings(n))
        yield catalog, names


def new_block():
    return block(count(4, first=3))


def delete_one(catalog, names):
    catalog.discard([siblings(10)[7].key], "me")
    catalog.complete_delete([siblings(10)[7].key])


OPERATIONS = {
    "contains": lambda catalog, names: catalog.contains(siblings(10)[7].key),
    "find": lambda catalog, names: catalog.find(siblings(10)[7].key),
    "nearest": lambda catalog, names: catalog.nearest(ROOT, ids(8, 9, 1)),
    "nearest of what has expired": lambda catalog, names: catalog.nearest(ROOT, ids(8, 9, 1), since=900.0),
    "tails": lambda catalog, names: catalog.tails(ROOT, count(5, first=16)),
    "put": lambda catalog, names: put(catalog, new_block(), budget=10**9),
    "use": lambda catalog, names: catalog.touch([siblings(10)[7].key], {siblings(10)[7].key: 1}),
    "use of a name": lambda catalog, names: names.touched([old_and_pinned(10)[7].key]),
    "name": lambda catalog, names: names.assign(Name("new", ROOT, (siblings(10)[7].key,), 4, True, None, 0.0)),
    "evict": lambda catalog, names: evict(catalog, 10),
    "evict more than one batch": lambda catalog, names: catalog.evict(20, "me", "", lambda _: False, at_most=1),
    "evict beside what is read": lambda catalog, names: evict(catalog, 10, leased=[siblings(1)[0].key]),
    "delete": delete_one,
    "what is present": lambda catalog, names: catalog.ready([each.key for each in siblings(10)]),
    "what moves": lambda catalog, names: (catalog.moving(State.WRITING), catalog.moving(State.LEAVING)),
    "counts": lambda catalog, names: (catalog.counts(), catalog.total_bytes, len(names)),
    "what has expired": lambda catalog, names: catalog.unused_since(400.0),
}


@pytest.mark.sample(5)  # of 17
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_catalog_query_cost_does_not_grow_with_the_number_of_blocks(operation, monkeypatch):
    monkeypatch.setattr("kvtier.store.tiers.disk.catalog.ranking._MIN_GHOSTS", 10)
    steps = []
    for n in (100, 500):
        with crowd(n) as (catalog, names):
            delete(catalog, evict(catalog, 150))  # leaves ghosts
            CountingConnection.steps = 0
            operation(catalog, names)
            steps.append(CountingConnection.steps)
    assert steps[1] <= steps[0] + 20


def test_eviction_cost_grows_no_faster_than_the_number_of_leased_leaves():
    steps = []
    for n in (100, 400):
        with crowd(n) as (catalog, _):
            leased = {each.key for each in siblings(n)[: n - 10]}
            CountingConnection.steps = 0
            assert len(evict(catalog, 50, leased=leased)) == 5
            steps.append(CountingConnection.steps)
    assert steps[1] < 5 * steps[0]
