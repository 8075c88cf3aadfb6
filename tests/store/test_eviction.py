"""Eviction policies, and that the host and disk tiers follow them."""

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


def test_policy_state_round_trips_as_text_for_its_own_policy():
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
def test_invalid_policy_state_text_is_read_as_none(text):
    assert state_from_text(OfMine(), text) is None


def test_block_counts_as_came_back_from_its_second_use():
    new = replace(ONCE, uses=0)
    first = new.used(LATER.clock)
    assert (first.uses, first.last_use, came_back(first)) == (1, 100, False)
    assert came_back(first.used(101))
    assert LATER.tick() == replace(LATER, clock=101)


def test_least_recently_used_ranks_by_the_clock_alone():
    policy = LeastRecentlyUsed()
    assert policy.standing(ONCE, LATER) == policy.standing(replace(AGAIN, depth_tokens=9999), LATER) == Standing(0, 100)
    assert policy.lead(0, LATER) == 0
    assert policy.evicted(AGAIN, LATER) == policy.returned(AGAIN, LATER) == LATER


# --- learning ---------------------------------------------------------------------------------------------------------


def test_adaptive_lead_rises_for_reused_ghosts_and_falls_for_others():
    policy, state = Adaptive(), replace(LATER, clock=10_000)
    assert policy.lead(1, after(policy, state, AGAIN)) > policy.lead(1, state)
    assert policy.lead(1, after(policy, state, ONCE)) < policy.lead(1, state)
    assert policy.lead(1, after(policy, state, ONCE, AGAIN)) == pytest.approx(policy.lead(1, state))


def test_adaptive_lead_moves_more_for_the_seldom_evicted_kind():
    policy = Adaptive()
    state = replace(LATER, clock=10_000).learn(came_back_share=0.1)
    assert policy.lead(1, after(policy, state, AGAIN, ONCE)) > policy.lead(1, state)
    state = state.learn(came_back_share=0.9)
    assert policy.lead(1, after(policy, state, AGAIN, ONCE)) < policy.lead(1, state)


def test_came_back_share_follows_the_evicted_blocks():
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
def test_adaptive_lead_ends_at_zero_or_the_clock_and_reverses_at_once(ghost, share):
    policy, clock = Adaptive(), 10**12
    state = fresh_state(policy, clock).learn(came_back_share=share)
    for _ in range(20_000):
        state = policy.returned(ghost, state)
    assert policy.lead(1, state) == pytest.approx(clock if came_back(ghost) else 0, rel=1e-9)
    other = ONCE if came_back(ghost) else AGAIN
    assert policy.lead(1, after(policy, state, other)) != policy.lead(1, state)


def test_adaptive_lead_of_a_new_store_does_not_exceed_its_clock():
    assert Adaptive().lead(1, replace(LATER, clock=3)) == 3
    assert Adaptive().lead(1, replace(LATER, clock=0)) == 0


def test_priorities_of_consecutive_turns_differ_after_a_trillion_turns():
    policy = Adaptive()
    state = fresh_state(policy, 10**12).learn(stay=1e6, favour=math.log1p(10**12))
    deep = replace(ONCE, depth_tokens=10**6)
    assert priority(policy, deep, state) < priority(policy, deep, state.tick()) < math.inf


# --- cost -------------------------------------------------------------------------------------------------------------


def test_block_of_twice_the_cost_stays_longer_by_half_the_average_stay():
    policy, state = Adaptive(), LATER.learn(stay=40.0)
    dear = replace(ONCE, depth_tokens=Adaptive.REFERENCE_TOKENS - 128)
    assert priority(policy, dear, state) == pytest.approx(100 + 20)
    assert priority(policy, ONCE, state) == pytest.approx(100, abs=1)


def test_priority_ignores_bytes_and_ignores_depth_before_any_eviction():
    policy = Adaptive()
    assert priority(policy, replace(ONCE, depth_tokens=10**6), LATER) == priority(policy, ONCE, LATER) == 100
    state = LATER.learn(stay=40.0)
    assert priority(policy, replace(ONCE, nbytes=10**9), state) == priority(policy, ONCE, state)


def saving(times, usage=ONCE):
    """Return a block that saves so many times as much a byte as blocks that were evicted so far."""
    return replace(usage, saved_seconds=times * 1e-3)


def weighed(stay=40.0):
    """Return the state after many evictions of usual blocks that each stayed for long."""
    state = LATER
    for _ in range(20):
        state = Adaptive().evicted(saving(1), state)
    return state.learn(stay=stay)


def test_block_that_saves_twice_the_usual_stays_longer_by_half_the_average_stay():
    policy, state = Adaptive(), weighed()
    assert priority(policy, saving(1), state) == pytest.approx(100)
    assert priority(policy, saving(2), state) == pytest.approx(100 + 20)
    assert priority(policy, saving(0.5), state) == pytest.approx(100 - 20)
    assert priority(policy, replace(saving(2), nbytes=2000), state) == pytest.approx(100)


def test_no_measurement_keeps_a_block_for_ever():
    policy, state = Adaptive(), weighed()
    assert priority(policy, saving(1e12), state) == pytest.approx(100 + 80)
    assert priority(policy, saving(1e-12), state) == pytest.approx(100 - 80)


def test_a_block_of_which_nothing_is_known_counts_as_a_usual_one():
    policy, state = Adaptive(), weighed()
    assert priority(policy, ONCE, state) == pytest.approx(priority(policy, saving(1), state), abs=1)
    dear = replace(ONCE, depth_tokens=Adaptive.REFERENCE_TOKENS - 128)
    assert priority(policy, dear, state) == pytest.approx(100 + 20)


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan])
def test_what_cannot_have_been_measured_counts_as_not_known(seconds):
    policy, state = Adaptive(), weighed()
    odd = replace(ONCE, saved_seconds=seconds)
    assert priority(policy, odd, state) == priority(policy, ONCE, state)
    assert policy.evicted(odd, state) == policy.evicted(ONCE, state)


def test_what_is_saved_counts_from_the_first_eviction_on():
    policy, state = Adaptive(), LATER.learn(stay=40.0)
    assert priority(policy, saving(8), state) == priority(policy, ONCE, state)


@pytest.mark.parametrize("learnt", [{"usual": 1e9}, {"weighed": -1.0}, {"weighed": 1e9}, {"stay": -1.0}])
def test_adaptive_state_that_it_cannot_have_learnt_is_not_read(learnt):
    state = LATER.learn(**learnt)
    assert state_from_text(Adaptive(), state_to_text(Adaptive(), state)) is None


# --- tiers ------------------------------------------------------------------------------------------------------------


class Lead:
    """Least recently used, with a lead that a test sets."""

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
def test_eviction_applies_the_current_lead_to_blocks_that_came_back(kind, turns, first):
    policy = Lead(9.0)
    tier = kind(policy)
    again, once = block(count(4)), block(count(4, first=9))
    tier.put(again)
    tier.touch(again)
    tier.touch(again)
    tier.put(once)
    tier.touch(once)  # one turn later
    policy.turns = turns  # the lead at the time of use does not count
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
def test_invalid_policy_is_refused_with_the_reason(change, said):
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        PrefixStore(policy=type("Broken", (LeastRecentlyUsed,), change)())


class Picky(LeastRecentlyUsed):
    """Has one queue and records the queues it is asked about."""

    name = "picky/1"

    def __init__(self):
        self.asked = set()

    def lead(self, queue, state):
        self.asked.add(queue)
        return 0.0


def test_blocks_ranked_by_another_policy_can_be_evicted(tmp_path):
    """They are in queues that the current policy does not have."""
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
    """Attaches a word to each block as its note and records the notes it is shown."""

    def __init__(self, name, word):
        self.name, self.word, self.shown = name, word, set()

    def standing(self, usage, state):
        self.shown.add(usage.note)
        return Standing(0, float(state.clock), self.word)

    def returned(self, ghost, state):
        self.shown.add(ghost.note)
        return state


def test_policy_sees_only_its_own_notes_on_blocks_and_ghosts(tmp_path):
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
def test_failing_policy_stops_no_write_and_damages_no_catalog(tmp_path, monkeypatch, caplog, method, how):
    """The latest block is restored, and every log record is a warning that names the policy."""
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
def test_block_that_returns_from_a_ghost_keeps_its_uses(kind):
    tier = kind(Lead(9.0))
    back, other = block(count(4)), block(count(4, first=9))
    tier.put(back)
    tier.touch(back)
    assert tier.evict_one() == back.id.key
    assert tier.ghosts() == 1
    tier.put(back)
    assert tier.state().learnt["returned"] == 1  # the policy received the ghost and its uses
    assert tier.ghosts() == 0
    tier.touch(back)
    tier.put(other)
    tier.touch(other)
    assert tier.evict_one() == other.id.key  # ``back`` counts as came back


@tiers
def test_leaves_are_evicted_before_parents_of_lower_value(kind):
    tier = kind(Lead(0.0))
    links = chain(count(12), 4)
    for each in links:
        tier.put(each)
    tier.touch(links[2])
    assert [tier.evict_one() for _ in links] == [each.id.key for each in reversed(links)]


def test_host_tier_ghosts_do_not_outnumber_its_blocks():
    tier = HostTier(3 * SIZE, LeastRecentlyUsed(), lambda: 0.0)
    for first in range(0, 80, 4):
        assert tier.put(block(count(4, first=first)))
        assert len(tier._valuation.ghosts) <= 3


def test_catalog_ghosts_are_bounded(monkeypatch):
    monkeypatch.setattr("kvtier.store.tiers.disk.catalog.ranking._MIN_GHOSTS", 3)
    tier = InRows(LeastRecentlyUsed())
    for first in range(0, 80, 4):
        tier.put(block(count(4, first=first)))
        tier.touch()
        tier.evict_one()
        assert tier.ghosts() <= 3


def test_store_uses_the_adaptive_policy_by_default():
    """A prefix used twice outlives a newer one that was used once."""

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


@pytest.mark.parametrize("text", ["nonsense", '{"policy": "adaptive/3", "clock": 3}', "[" * 100_000])
def test_unreadable_policy_state_is_reset_and_stops_no_write(tmp_path, caplog, text):
    """New blocks do not rank as older than the blocks already stored."""
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
