"""What the policies say, and that both tiers do what they say."""

import json
import math
import re
from dataclasses import replace
from typing import ClassVar

import pytest

from kvtier import PrefixStore
from kvtier.errors import ConfigurationError
from kvtier.store.eviction import Adaptive, LeastRecentlyUsed, Standing, Usage
from kvtier.store.eviction.adaptive import came_back
from kvtier.store.eviction.base import fresh_state, state_from_text, state_to_text
from kvtier.store.tiers.disk.catalog.blocks import Catalog, Prepared
from kvtier.store.tiers.disk.catalog.database import Database
from kvtier.store.tiers.host.tier import HostTier
from kvtier.testing import PolicyChecks
from tests.support.stores import ROOT, block, chain, commit, count, restored_length

SIZE = block(count(4)).nbytes
ONCE = Usage(1, 90, 256, 0, 1000)
AGAIN = replace(ONCE, uses=2)
LATER = fresh_state(Adaptive(), clock=100)


def after(policy, state, *ghosts):
    for ghost in ghosts:
        state = policy.returned(ghost, state)
    return state


def priority(policy, usage, state):
    return policy.standing(usage, state).priority


class TestAdaptive(PolicyChecks):
    @pytest.fixture
    def policy(self):
        return Adaptive()


class TestLeastRecentlyUsed(PolicyChecks):
    @pytest.fixture
    def policy(self):
        return LeastRecentlyUsed()


# --- values -----------------------------------------------------------------------------------------------------------


class OfMine(Adaptive):
    name = "mine/1"


def test_a_state_outlives_a_process_as_text():
    state = fresh_state(OfMine(), clock=7).learn(favour=1.5, came_back_share=0.25, stay=3.5)
    assert state_from_text(OfMine(), state_to_text(OfMine(), state)) == state
    assert state_from_text(Adaptive(), state_to_text(OfMine(), state)) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[1]",
        "7",
        "[" * 100_000,
        '{"policy": "mine/1"}',
        *(
            json.dumps({"policy": "mine/1", "clock": 100, "learnt": dict(LATER.learnt), **change})
            for change in [
                {"more": 1},
                {"clock": 1.5},
                {"clock": -1},
                {"clock": 2**60},
                {"clock": True},
                {"learnt": 7},
                {"learnt": {}},
                {"learnt": {**LATER.learnt, "more": 1.0}},
            ]
        ),
        *(
            json.dumps({"policy": "mine/1", "clock": 100, "learnt": {**LATER.learnt, name: value}})
            for name, value in [
                ("favour", float("nan")),
                ("favour", float("inf")),
                ("favour", 10**400),
                ("favour", -0.5),
                ("stay", "1"),
                ("stay", None),
                ("stay", True),
                ("came_back_share", 2),
            ]
        ),
    ],
    ids=lambda text: text[:90],
)
def test_a_state_that_is_no_state_is_none(text):
    assert state_from_text(OfMine(), text) is None


def test_a_turn_counts_once_and_a_block_came_back_with_the_second():
    new = replace(ONCE, uses=0)
    first = new.used(LATER.clock)
    assert (first.uses, first.last_use, came_back(first)) == (1, 100, False)
    assert came_back(first.used(101))
    assert LATER.tick() == replace(LATER, clock=101)


def test_least_recently_used_knows_nothing_but_the_clock():
    policy = LeastRecentlyUsed()
    assert policy.standing(ONCE, LATER) == policy.standing(replace(AGAIN, depth_tokens=9999), LATER) == Standing(0, 100)
    assert policy.lead(0, LATER) == 0
    assert policy.evicted(AGAIN, LATER) == policy.returned(AGAIN, LATER) == LATER


# --- learning ---------------------------------------------------------------------------------------------------------


def test_ghosts_that_had_come_back_raise_the_lead_and_others_lower_it():
    policy, state = Adaptive(), replace(LATER, clock=10_000)
    assert policy.lead(1, after(policy, state, AGAIN)) > policy.lead(1, state)
    assert policy.lead(1, after(policy, state, ONCE)) < policy.lead(1, state)
    assert policy.lead(1, after(policy, state, ONCE, AGAIN)) == pytest.approx(policy.lead(1, state))


def test_the_kind_that_is_seldom_evicted_moves_the_lead_more():
    policy = Adaptive()
    state = replace(LATER, clock=10_000).learn(came_back_share=0.1)
    assert policy.lead(1, after(policy, state, AGAIN, ONCE)) > policy.lead(1, state)
    state = state.learn(came_back_share=0.9)
    assert policy.lead(1, after(policy, state, AGAIN, ONCE)) < policy.lead(1, state)


def test_the_share_follows_what_is_evicted():
    policy, state = Adaptive(), LATER
    for _ in range(3000):
        state = policy.evicted(AGAIN, state)
    assert state.learnt["came_back_share"] > 0.99
    for _ in range(3000):
        state = policy.evicted(ONCE, state)
    assert state.learnt["came_back_share"] < 0.01
    assert state.learnt["stay"] == pytest.approx(10)


@pytest.mark.parametrize("ghost", [ONCE, AGAIN])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_lead_stays_between_nothing_and_all_turns_and_turns_round_at_once(ghost, share):
    policy, clock = Adaptive(), 10**12
    state = fresh_state(policy, clock).learn(came_back_share=share)
    for _ in range(20_000):
        state = policy.returned(ghost, state)
    assert policy.lead(1, state) == pytest.approx(clock if came_back(ghost) else 0, rel=1e-9)
    other = ONCE if came_back(ghost) else AGAIN
    assert policy.lead(1, after(policy, state, other)) != policy.lead(1, state)


def test_the_lead_is_no_more_than_all_turns_in_a_new_store_too():
    assert Adaptive().lead(1, replace(LATER, clock=3)) == 3
    assert Adaptive().lead(1, replace(LATER, clock=0)) == 0


def test_turns_can_be_told_apart_after_ten_to_the_twelve():
    policy = Adaptive()
    state = fresh_state(policy, 10**12).learn(stay=1e6, favour=math.log1p(10**12))
    deep = replace(ONCE, depth_tokens=10**6)
    assert priority(policy, deep, state) < priority(policy, deep, state.tick()) < math.inf


# --- cost -------------------------------------------------------------------------------------------------------------


def test_a_block_twice_as_dear_stays_longer_by_half_of_what_blocks_stay():
    policy, state = Adaptive(), LATER.learn(stay=40.0)
    dear = replace(ONCE, depth_tokens=Adaptive.REFERENCE_TOKENS - 128)
    assert priority(policy, dear, state) == pytest.approx(100 + 20)
    assert priority(policy, ONCE, state) == pytest.approx(100, abs=1)


def test_without_evictions_and_whatever_the_bytes_the_last_use_decides():
    policy = Adaptive()
    assert priority(policy, replace(ONCE, depth_tokens=10**6), LATER) == priority(policy, ONCE, LATER) == 100
    state = LATER.learn(stay=40.0)
    assert priority(policy, replace(ONCE, nbytes=10**9), state) == priority(policy, ONCE, state)


# --- tiers ------------------------------------------------------------------------------------------------------------


class Lead:
    """Least recently used, but with a lead that a test sets."""

    name = "lead/1"
    queues = 2
    initial: ClassVar = {"returned": 0.0}

    def __init__(self, turns):
        self.turns = turns

    def is_sound(self, state):
        return True

    def standing(self, usage, state):
        return Standing(int(came_back(usage)), float(state.clock))

    def lead(self, queue, state):
        return self.turns * queue

    def evicted(self, usage, state):
        return state

    def returned(self, ghost, state):
        return state.learn(returned=state.learnt["returned"] + ghost.uses)


class InRam:
    def __init__(self, policy):
        self.tier = HostTier(2**30, policy, lambda: 0.0)

    def put(self, block):
        assert self.tier.put(block)

    def touch(self, *blocks):
        self.tier.touch([each.id.key for each in blocks], {})

    def evict_one(self):
        (gone,) = self.tier.shrink(self.tier.nbytes - 1)
        return gone.key

    def state(self):
        return self.tier._valuation.state

    def ghosts(self):
        return len(self.tier._valuation.ghosts)


class InRows:
    def __init__(self, policy):
        self.policy, self.database = policy, Database(None)
        self.tier = Catalog(self.database, policy, lambda: 0.0)

    def put(self, block):
        assert self.tier.prepare_store(block.id, SIZE, 2**30, "me") is Prepared.RESERVED
        assert self.tier.complete_store(block.id.key, "me")

    def touch(self, *blocks):
        self.tier.touch([each.id.key for each in blocks], {})

    def evict_one(self):
        (gone,) = self.tier.evict(1, "me", "", lambda place: False, at_most=1)
        self.tier.complete_delete([gone.key])
        return gone.key

    def state(self):
        with self.database.reading() as connection:
            return state_from_text(self.policy, *connection.execute("SELECT policy FROM total").fetchone())

    def ghosts(self):
        with self.database.reading() as connection:
            return connection.execute("SELECT COUNT(*) FROM ghosts").fetchone()[0]


tiers = pytest.mark.parametrize("kind", [InRam, InRows])


@tiers
@pytest.mark.parametrize(("turns", "first"), [(0.5, "again"), (1.5, "once")])
def test_blocks_that_came_back_have_the_lead_of_the_moment(kind, turns, first):
    policy = Lead(9.0)
    tier = kind(policy)
    again, once = block(count(4)), block(count(4, first=9))
    tier.put(again)
    tier.touch(again)
    tier.touch(again)
    tier.put(once)
    tier.touch(once)  # one turn later
    policy.turns = turns  # no matter what it was when they were used
    assert tier.evict_one() == {"again": again, "once": once}[first].id.key


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": None}, "has no name"),
        ({"name": ""}, "has no name"),
        ({"standing": None}, "has no method standing"),
        ({"returned": 7}, "has no method returned"),
        ({"queues": 0}, "queues=0"),
        ({"queues": 17}, "queues=17"),
        ({"queues": True}, "queues=True"),
        ({"queues": "2"}, "queues='2'"),
        ({"initial": None}, "initial=None"),
        ({"initial": {"a": math.inf}}, "initial="),
        ({"initial": {"a": "1"}}, "initial="),
        ({"initial": {"a": []}}, "initial="),
    ],
    ids=str,
)
def test_what_is_no_policy_is_refused_with_a_sentence(change, said):
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        PrefixStore(policy=type("Broken", (LeastRecentlyUsed,), change)())


class Picky(LeastRecentlyUsed):
    """Has one queue, and notes which it was asked about."""

    name = "picky/1"

    def __init__(self):
        self.asked = set()

    def lead(self, queue, state):
        self.asked.add(queue)
        return 0.0


def test_blocks_that_another_policy_ranked_can_leave(tmp_path):
    """They wait in queues that the present policy does not have."""
    settings = {"block_size": 4, "host_budget": 1, "free_space_floor": 0}
    with PrefixStore(tmp_path, **settings) as store:
        for first in (0, 20):
            for _ in range(3):
                commit(store, count(4, first=first))
                store.flush()
    picky = Picky()
    with PrefixStore(tmp_path, policy=picky, **settings) as store:
        assert store.prune(to_bytes=0).blocks == 2
        assert store.stats().tiers[-1].blocks == 0
    assert picky.asked == {0}


class Noting(LeastRecentlyUsed):
    """Notes a word, and shows what notes it was shown."""

    def __init__(self, name, word):
        self.name, self.word, self.shown = name, word, set()

    def standing(self, usage, state):
        self.shown.add(usage.note)
        return Standing(0, float(state.clock), self.word)

    def returned(self, ghost, state):
        self.shown.add(ghost.note)
        return state


def test_a_policy_is_shown_its_own_notes_alone(tmp_path):
    """Of blocks and of ghosts."""
    settings = {"block_size": 4, "host_budget": 1, "free_space_floor": 0, "disk_budget": 2 * 4096}
    mine, other = Noting("mine/1", "a"), Noting("other/1", "b")
    for policy in (mine, other, mine):
        with PrefixStore(tmp_path, policy=policy, **settings) as store:
            for first in (0, 20, 40, 0):
                commit(store, count(4, first=first))
                commit(store, count(4, first=first))
                store.flush()
    assert mine.shown == {"", "a"}
    assert other.shown == {"", "b"}


class Failing(LeastRecentlyUsed):
    name = "failing/1"


@pytest.mark.parametrize("method", ["is_sound", "standing", "lead", "evicted", "returned"])
@pytest.mark.parametrize("how", ["raises", "says nonsense"])
def test_a_policy_that_fails_costs_its_order_and_one_warning(tmp_path, monkeypatch, caplog, method, how):
    """No turn, no catalog."""
    nonsense = {"standing": Standing(99, math.nan), "lead": math.inf, "evicted": None, "returned": None, "is_sound": 7}

    def fail(*args):
        if how == "raises":
            raise ValueError("malformed")
        return nonsense[method]

    settings = {"block_size": 4, "host_budget": 4 * SIZE, "free_space_floor": 0, "disk_budget": 3 * 4096}
    for _ in range(2):
        with PrefixStore(tmp_path, policy=Failing(), **settings) as store:
            monkeypatch.setattr(Failing, method, fail)
            for first in (0, 20, 40, 60, 0, 80):
                commit(store, count(4, first=first))
                store.flush()
            assert restored_length(store, count(4, first=80)) == 4
            assert not store.stats().errors
        monkeypatch.undo()
    assert not (tmp_path / "catalog.damaged").exists()
    assert {record.levelname for record in caplog.records} <= {"WARNING"}
    assert all("'failing/1'" in record.getMessage() for record in caplog.records)


@tiers
def test_a_ghost_goes_on_counting(kind):
    tier = kind(Lead(9.0))
    back, other = block(count(4)), block(count(4, first=9))
    tier.put(back)
    tier.touch(back)
    assert tier.evict_one() == back.id.key
    assert tier.ghosts() == 1
    tier.put(back)
    assert tier.state().learnt["returned"] == 1  # the policy was told, with its uses
    assert tier.ghosts() == 0
    tier.touch(back)
    tier.put(other)
    tier.touch(other)
    assert tier.evict_one() == other.id.key  # ``back`` has come back


@tiers
def test_leaves_go_first_however_little_those_before_them_are_worth(kind):
    tier = kind(Lead(0.0))
    links = chain(count(12), 4)
    for each in links:
        tier.put(each)
    tier.touch(links[2])
    assert [tier.evict_one() for _ in links] == [each.id.key for each in reversed(links)]


def test_ghosts_in_ram_are_no_more_than_blocks():
    tier = HostTier(3 * SIZE, LeastRecentlyUsed(), lambda: 0.0)
    for first in range(0, 80, 4):
        assert tier.put(block(count(4, first=first)))
        assert len(tier._valuation.ghosts) <= 3


def test_ghosts_in_rows_are_bounded(monkeypatch):
    monkeypatch.setattr("kvtier.store.tiers.disk.catalog.ranking._MIN_GHOSTS", 3)
    tier = InRows(LeastRecentlyUsed())
    for first in range(0, 80, 4):
        tier.put(block(count(4, first=first)))
        tier.touch()
        tier.evict_one()
        assert tier.ghosts() <= 3


def test_a_store_adapts_unless_told_otherwise():
    """A prefix that came back outlives one that is newer and was used once."""

    def left(**more):
        with PrefixStore(host_budget=4 * SIZE, block_size=4, **more) as store:

            def turn(first, n):
                tokens = count(n, first)
                store.commit(ROOT, tokens, lambda start, stop: block(tokens[start:stop]).pages)

            turn(0, 4)
            turn(0, 4)
            turn(100, 8)
            turn(200, 8)
            return store.match(ROOT, count(4)).length

    assert left() == 4
    assert left(policy=LeastRecentlyUsed()) == 0


@pytest.mark.parametrize("text", ["nonsense", '{"policy": "adaptive/2", "clock": 3}', "[" * 100_000])
def test_a_state_that_cannot_be_read_begins_anew_and_stops_no_write(tmp_path, caplog, text):
    """Nor are blocks that come now taken for older than those that are there."""
    settings = {"block_size": 4, "host_budget": 1, "disk_budget": 6 * 4096, "free_space_floor": 0}
    with PrefixStore(tmp_path, **settings) as store:
        for first in range(0, 60, 20):
            commit(store, count(4, first=first))
            commit(store, count(4, first=first))
        with store._tiers.database.transaction() as connection:
            connection.execute("UPDATE total SET policy = ?", (text,))
        for first in range(100, 500, 20):
            commit(store, count(4, first=first))
        store.flush()
        assert restored_length(store, count(4, first=480)) == 4
    assert not caplog.records
    with PrefixStore(tmp_path, **settings) as store:
        assert restored_length(store, count(4, first=480)) == 4
