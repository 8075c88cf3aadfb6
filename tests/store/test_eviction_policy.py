"""Property tests: tiers evict leaves in order of value, and no policy beats the optimum, which knows the future."""

from __future__ import annotations

import math
from collections import OrderedDict
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.contenders import Library, Optimum
from benchmarks.eviction import CONTENDERS
from benchmarks.replay import Replay
from benchmarks.trace import MEDIUM, ROOT, Trace
from kvtier.store.block import Block
from kvtier.store.chain import BlockId
from kvtier.store.eviction import Adaptive, LeastRecentlyUsed, PolicyState, Usage
from kvtier.store.eviction.base import fresh_state, state_from_text, state_to_text
from kvtier.store.tiers.disk.catalog.blocks import Catalog, Prepared
from kvtier.store.tiers.disk.catalog.database import Database
from kvtier.store.tiers.host.tier import HostTier
from tests.support.stores import ROOT as MODEL

PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
TURNS = st.lists(PATHS, min_size=1, max_size=15)
POLICIES = st.sampled_from([Adaptive, LeastRecentlyUsed])


def trace_of(turns: list[tuple[int, ...]]) -> Trace:
    """Return a trace whose blocks are identified by the paths to them."""
    trace, numbers = Trace(), {}
    for path in turns:
        chain: list[int] = []
        for end in range(1, len(path) + 1):
            if path[:end] not in numbers:
                numbers[path[:end]] = trace.add_block(chain[-1] if chain else ROOT, 256, MEDIUM)
            chain.append(numbers[path[:end]])
        trace.requests.append(chain)
    trace.count_bytes_by_blocks()
    return trace


# --- policies ---------------------------------------------------------------------------------------------------------

SAVED = st.just(0.0) | st.floats(0, 1e300)
EVENTS = st.lists(
    st.tuples(st.sampled_from(["turn", "evicted", "returned"]), st.integers(0, 4), st.integers(0, 10**12), SAVED),
    max_size=60,
)


@given(EVENTS, st.integers(0, 10**12))
def test_adaptive_state_stays_finite_and_round_trips_as_text(events, clock):
    policy = Adaptive()
    state = fresh_state(policy, clock)
    for kind, uses, age, saved in events:
        usage = Usage(uses, max(0, state.clock - age), 256, 512, 1000, saved_seconds=saved)
        if kind == "turn":
            state = state.tick()
        elif kind == "evicted":
            state = policy.evicted(usage, state)
        else:
            state = policy.returned(usage, state)
        assert state_from_text(policy, state_to_text(policy, state)) == state
        assert policy.lead(0, state) == 0 <= policy.lead(1, state) <= state.clock
        assert 0 <= state.learnt["came_back_share"] <= 1
        assert 0 <= state.learnt["stay"] <= state.clock
        most = policy.COST_WEIGHT * policy.MOST_DOUBLINGS * state.learnt["stay"]
        assert abs(policy.standing(usage, state).priority - state.clock) <= most + 1e-3 < math.inf  # 10**12 is rounded


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 1e6), st.integers(0, 5))
def test_adaptive_priority_rises_with_last_use_and_never_falls_with_depth(clock, depth, deeper, stay, uses):
    policy = Adaptive()
    state = fresh_state(policy, clock).learn(stay=stay)

    def priority(usage: Usage, state: PolicyState) -> float:
        return policy.standing(usage, state).priority

    usage = Usage(uses, clock, 256, depth, 1000)
    assert priority(usage, state) < priority(usage, state.tick())
    assert priority(usage, state) <= priority(replace(usage, depth_tokens=depth + deeper), state)


@given(st.integers(0, 10**6), st.floats(1, 1e6), st.floats(-60, 60), st.floats(1e-9, 1e9), st.floats(1, 1e6))
def test_adaptive_priority_never_falls_with_what_is_saved_nor_rises_with_bytes(clock, stay, usual, saved, times):
    policy = Adaptive()
    state = fresh_state(policy, clock).learn(stay=stay, usual=usual, weighed=1.0)
    usage = Usage(1, clock, 256, 512, 1000, saved_seconds=saved)

    def priority(usage: Usage) -> float:
        return policy.standing(usage, state).priority

    assert priority(usage) <= priority(replace(usage, saved_seconds=saved * times))
    assert priority(usage) >= priority(replace(usage, nbytes=int(1000 * times)))
    assert abs(priority(usage) - clock) <= policy.COST_WEIGHT * policy.MOST_DOUBLINGS * stay + 1e-6


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=40))
def test_adaptive_takes_what_evicted_blocks_saved_in_the_geometric_mean_for_usual(saved):
    policy = Adaptive()
    state = fresh_state(policy, 100)
    for seconds in saved:
        state = policy.evicted(Usage(1, 0, 256, 0, 1, saved_seconds=seconds), state)
    assert state.learnt["usual"] == pytest.approx(sum(map(math.log2, saved)) / len(saved), abs=1e-6)
    mean = math.exp(sum(map(math.log, saved)) / len(saved))
    usage = Usage(1, 100, 256, 0, 1, saved_seconds=mean)
    assert policy.standing(usage, state).priority == pytest.approx(100, abs=1e-3 * state.learnt["stay"])


# --- tiers ------------------------------------------------------------------------------------------------------------


def tiny_block(path: tuple[int, ...]) -> Block:
    """Return a block of one token without pages: only its chain decides the order of eviction."""
    parent = MODEL
    for depth, token in enumerate(path):
        block = Block(BlockId.of(MODEL, parent, np.array([token], dtype=np.int64)), (), depth)
        parent = block.id.key
    return block


class Expected:
    """The reference: a plain dictionary that finds the evictable leaf of the lowest value by scanning all blocks."""

    def __init__(self, policy):
        self.policy = policy
        self.state = fresh_state(policy)
        self.blocks = {}

    def put(self, path):
        usage = Usage(0, self.state.clock, 1, len(path) - 1, 1)
        self.blocks[path] = usage, self.policy.standing(usage, self.state)

    def touch(self, path):
        self.state = self.state.tick()
        for end in range(1, len(path) + 1):
            usage = self.blocks[path[:end]][0].used(self.state.clock)
            self.blocks[path[:end]] = usage, self.policy.standing(usage, self.state)

    def value(self, path):
        _, standing = self.blocks[path]
        return standing.priority + self.policy.lead(standing.queue, self.state)

    def may_go(self, stay):
        parents = {path[:-1] for path in self.blocks}
        return [path for path in self.blocks if path not in parents and path not in stay]

    def evict(self, path):
        usage, _ = self.blocks.pop(path)
        self.state = self.policy.evicted(usage, self.state)


@given(TURNS, POLICIES, st.data())
def test_catalog_evicts_leaves_in_order_of_value_and_keeps_leased_blocks(turns, policy, data):
    expected = Expected(policy())
    with closing(Database(None)) as database:
        catalog = Catalog(database, policy(), lambda: 0.0)
        paths = {}
        for path in turns:
            for end in range(1, len(path) + 1):
                if path[:end] not in expected.blocks:
                    block = tiny_block(path[:end])
                    paths[block.id.key] = path[:end]
                    assert catalog.prepare_store(block.id, 1, 10**6, "me") is Prepared.RESERVED
                    catalog.complete_store(block.id.key, "me")
                    expected.put(path[:end])
            catalog.touch([tiny_block(path[:end]).id.key for end in range(1, len(path) + 1)], {})
            expected.touch(path)
        stay = set(data.draw(st.lists(st.sampled_from(sorted(expected.blocks)), max_size=2), label="leased"))
        while expected.may_go(stay):
            gone = catalog.evict(1, "me", "", lambda place: paths[place.key] in stay, at_most=1)
            path = paths[gone[0].key]
            assert path in expected.may_go(stay)
            assert expected.value(path) == pytest.approx(min(map(expected.value, expected.may_go(stay))))
            expected.evict(path)
        assert catalog.evict(1, "me", "", lambda place: paths[place.key] in stay, at_most=1) == []


@given(TURNS, POLICIES, st.data())
def test_host_tier_evicts_leaves_in_order_of_value_and_keeps_pinned_blocks(turns, policy, data):
    expected = Expected(policy())
    pinned = set()
    tier = HostTier(10**6, policy(), lambda: 0.0, lambda: frozenset(pinned))
    paths = {}
    for path in turns:
        for end in range(1, len(path) + 1):
            if path[:end] not in expected.blocks:
                block = tiny_block(path[:end])
                paths[block.id.key] = path[:end]
                assert tier.put(block)
                expected.put(path[:end])
        tier.touch([tiny_block(path[:end]).id.key for end in range(1, len(path) + 1)], {})
        expected.touch(path)
    stay = set(data.draw(st.lists(st.sampled_from(sorted(expected.blocks)), max_size=2), label="pinned"))
    pinned.update(key for key, path in paths.items() if path in stay)
    left = set(expected.blocks)
    for entry in tier.shrink(-1):
        path = paths[entry.key]
        assert path in expected.may_go(stay)
        assert expected.value(path) == pytest.approx(min(map(expected.value, expected.may_go(stay))))
        expected.evict(path)
        left.discard(path)
    assert not expected.may_go(stay)
    assert {paths[entry.key] for entry in tier.entries()} == left == set(expected.blocks)


# --- the replay -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTENDERS)
@given(turns=TURNS, capacity=st.integers(1, 9))
def test_replay_keeps_its_budget_and_no_block_without_its_parent(name, turns, capacity):
    trace = trace_of(turns)
    contender = CONTENDERS[name](trace)
    replay = Replay(trace, contender, capacity)
    for chain in trace.requests:
        kept_before = set(replay.present)
        known = replay.turn(chain)
        assert list(chain[:known]) == [b for b in chain if b in kept_before][:known]
        assert len(replay.present) == replay.nbytes <= capacity
        assert all(trace.parents[block] == ROOT or trace.parents[block] in replay.present for block in replay.present)
        beginning = min(len(chain), capacity)
        assert all(block in replay.present for block in chain[:beginning])
        if isinstance(contender, Library):
            assert len(contender.ghosts) <= capacity


@pytest.mark.parametrize("name", CONTENDERS)
@given(turns=st.lists(PATHS, min_size=5, max_size=40), capacity=st.integers(1, 12))
def test_no_contender_finds_more_blocks_than_the_optimum(name, turns, capacity):
    trace = trace_of(turns)
    best = Replay(trace, Optimum(trace), capacity).run().blocks
    assert Replay(trace, CONTENDERS[name](trace), capacity).run().blocks <= best + 1e-12


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 8))
def test_lru_replay_matches_an_ordered_dictionary(asked, capacity):
    trace = trace_of([(each,) for each in asked])
    replay = Replay(trace, CONTENDERS["LRU"](trace), capacity)
    model: OrderedDict[int, None] = OrderedDict()
    for chain in trace.requests:
        assert replay.turn(chain) == (chain[0] in model)
        model[chain[0]] = None
        model.move_to_end(chain[0])
        if len(model) > capacity:
            model.popitem(last=False)
        assert set(replay.present) == set(model)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60, unique=True), st.integers(1, 8))
def test_kvtier_replay_evicts_equal_blocks_used_once_in_order_of_use(asked, capacity):
    trace = trace_of([(each,) for each in asked])
    replay = Replay(trace, CONTENDERS["kvtier"](trace), capacity)
    for at, chain in enumerate(trace.requests):
        replay.turn(chain)
        assert sorted(replay.present) == list(range(max(0, at + 1 - capacity), at + 1))
