"""Load, compute, or both at once: the pure decision, against trying every way by hand."""

import os
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvtier import TieredCache
from kvtier.costs.prefill import PrefillCost
from kvtier.costs.transfer import TransferCost
from kvtier.errors import ConfigurationError
from kvtier.hf.turn.choice.decision import (
    BOTH,
    COMPUTE,
    HELD,
    LOAD,
    REUSE_VARIABLE,
    Estimates,
    StoredRange,
    decide,
    is_weighed,
    meeting_column,
    next_chunk,
)
from kvtier.hf.turn.cost import COSTS

TOKEN_BYTES = 1000.0


def estimates(bytes_per_second=1e6, latency=0.0, token_seconds=1e-3, copying=None):
    transfers = {"host": TransferCost(0, 1e10), "far": TransferCost(latency, bytes_per_second)}
    return Estimates(PrefillCost(1e-3, token_seconds, 1e-9, 1e-9), transfers, TOKEN_BYTES, copying)


def far(begin, end):
    return [StoredRange("far", begin, end)]


some_estimates = st.builds(
    estimates,
    st.floats(1e4, 1e9),
    st.floats(0, 0.5),
    st.floats(1e-5, 1e-1),
    st.none() | st.builds(TransferCost, st.just(0.0), st.floats(1e8, 1e10)),
)


def test_a_fast_tier_is_loaded_and_a_slow_one_is_not():
    assert decide(1001, 0, [1000], far(0, 1000), estimates(1e9), COSTS, may_split=True).way == LOAD
    slow = decide(1001, 0, [1000], far(0, 1000), estimates(1e4), COSTS, may_split=False)
    assert (slow.way, slow.columns) == (COMPUTE, 0)
    assert slow.others[LOAD] > 50 * slow.seconds


def test_as_fast_as_computing_both_ways_meet_in_the_middle():
    found = decide(1001, 0, [1000], far(0, 1000), estimates(1e6), COSTS, may_split=True)
    assert (found.way, found.columns) == (BOTH, 1000)
    assert 450 < found.meeting < 550
    assert found.seconds < 0.6 * min(found.others.values())


def test_a_block_arrives_as_a_whole():
    """While the only block loads, all of it is computed: nothing is gained by doing both."""
    blocks = replace(estimates(1e6), block_columns=1000)
    assert decide(1001, 0, [1000], far(0, 1000), blocks, COSTS, may_split=True).way != BOTH
    halves = decide(1001, 0, [1000], far(0, 1000), replace(blocks, block_columns=500), COSTS, may_split=True)
    assert (halves.way, halves.meeting) == (BOTH, 500)


def test_a_front_in_several_passes_costs_more_than_one():
    slow, chunk = estimates(1e6), COSTS.longest_chunk_tokens
    assert slow.front_seconds(0, chunk, chunk) == slow.compute_seconds(0, chunk)
    apart = slow.compute_seconds(0, chunk) + slow.compute_seconds(chunk, 2 * chunk - 5)
    assert slow.front_seconds(0, 2 * chunk - 5, chunk) == apart > slow.compute_seconds(0, 2 * chunk - 5)


def test_what_a_turn_takes_around_its_passes_is_expected_of_every_way():
    quick, slow = estimates(1e6), replace(estimates(1e6), around_seconds=2.0)
    plain, around = (decide(1001, 0, [1000], far(0, 1000), of, COSTS, may_split=False) for of in (quick, slow))
    assert around.seconds == pytest.approx(plain.seconds + 2.0)
    assert around.others == pytest.approx({way: seconds + 2.0 for way, seconds in plain.others.items()})


def test_cores_that_copy_do_not_compute():
    """Where the load is all copying, nothing is gained by doing both."""
    busy = estimates(1e6, copying=TransferCost(0, 1e6))
    assert decide(1001, 0, [1000], far(0, 1000), busy, COSTS, may_split=True).way != BOTH


def test_only_the_near_part_is_loaded_where_the_rest_is_far():
    stored = [StoredRange("host", 0, 600), *far(600, 1000)]
    found = decide(1001, 0, [600, 1000], stored, estimates(1e4), COSTS, may_split=False)
    assert (found.way, found.columns) == (LOAD, 600)


def test_nothing_beyond_what_is_held_is_no_question():
    assert decide(1001, 1000, [1000], [], estimates(), COSTS, may_split=True).way == HELD
    assert decide(1001, 0, [], [], estimates(), COSTS, may_split=True).way == COMPUTE


@given(some_estimates, st.integers(0, 500), st.integers(1, 4000), st.integers(1, 200), st.booleans())
def test_the_choice_is_never_much_slower_than_another_way(costs, held, more, rest, may_split):
    cut = held + more
    found = decide(cut + rest, held, [cut], far(held, cut), costs, COSTS, may_split=may_split)
    assert found.seconds * COSTS.both_share <= min([*found.others.values(), found.seconds]) * 1.0001
    alone = {
        COMPUTE: costs.compute_seconds(held, cut + rest),
        LOAD: costs.load_seconds(far(held, cut), held, cut) + costs.compute_seconds(cut, cut + rest),
    }
    everything = {**found.others, found.way: found.seconds}
    assert {way: everything[way] for way in alone} == alone


@given(some_estimates, st.integers(0, 500), st.integers(1, 4000))
def test_both_meet_where_neither_waits_long(costs, held, more):
    cut = held + more
    meeting = meeting_column(held, cut, far(held, cut), costs, COSTS)
    assert held <= meeting <= cut
    best = min(
        max(
            costs.compute_seconds(held, column) + costs.busy_seconds(far(held, cut), column, cut),
            costs.load_seconds(far(held, cut), column, cut),
        )
        for column in {held, cut, *range(held, cut, max(1, more // 50))}
    )
    front = costs.compute_seconds(held, meeting) + costs.busy_seconds(far(held, cut), meeting, cut)
    if costs.copying is None:
        assert max(front, costs.load_seconds(far(held, cut), meeting, cut)) <= best * 1.01 + costs.compute_seconds(0, 1)


@given(some_estimates, st.integers(0, 3000), st.integers(1, 3000), st.floats(0, 1e6))
def test_chunks_stay_within_what_is_missing(costs, begin, missing, speed):
    end = next_chunk(begin, begin + missing, speed, costs, COSTS)
    assert begin <= end <= begin + min(missing, COSTS.longest_chunk_tokens)
    if speed == 0:
        assert end > begin


@given(some_estimates, st.integers(0, 3000), st.integers(32, 3000), st.floats(1, 1e6))
def test_it_waits_only_for_what_comes_sooner_than_a_chunk(costs, begin, missing, speed):
    assume(next_chunk(begin, begin + missing, speed, costs, COSTS) == begin)
    assert missing / speed <= costs.compute_seconds(begin, begin + COSTS.shortest_chunk_tokens)


def test_a_chunk_ends_where_blocks_do_because_a_part_of_one_saves_nothing():
    """At 1 ms a token, and 400 tokens of the load in a second."""
    costs = replace(estimates(), block_columns=256)
    assert next_chunk(0, 1000, 400.0, costs, COSTS) == 768  # while the last block arrives; the next one would be late
    assert next_chunk(700, 768, 400.0, costs, COSTS) == 768  # sooner computed than the block of these tokens is there
    assert next_chunk(513, 768, 1300.0, costs, COSTS) == 513  # the block comes sooner


@given(some_estimates, st.integers(0, 3000), st.integers(1, 3000), st.floats(1, 1e5), st.integers(1, 700))
def test_no_other_end_of_a_chunk_has_both_meet_sooner(costs, begin, missing, speed, size):
    costs, arrived = replace(costs, block_columns=size), begin + missing

    def meets(column):
        """Return when ``column`` is computed and what follows is there."""
        return max(costs.compute_seconds(begin, column), (arrived - column // size * size) / speed * (column < arrived))

    end = next_chunk(begin, arrived, speed, costs, COSTS)
    assume(end == begin or end - begin > COSTS.shortest_chunk_tokens)
    others = {begin, arrived, *range(begin - begin % size + size, arrived, size)}
    assert meets(end) <= min(map(meets, others)) * (1 + 1e-9)


def test_nothing_is_missing_after_both_have_met():
    assert next_chunk(50, 50, 100.0, estimates(), COSTS) == 50
    assert next_chunk(50, 40, 100.0, estimates(), COSTS) == 50


def test_reuse_is_auto_or_always(monkeypatch):
    assert is_weighed("auto")
    assert not is_weighed("always")
    monkeypatch.setenv(REUSE_VARIABLE, "auto")
    assert is_weighed(None)
    monkeypatch.delenv(REUSE_VARIABLE)
    assert is_weighed(None)
    assert REUSE_VARIABLE not in os.environ


@pytest.mark.parametrize("wrong", ["never", "", 1, True])
def test_another_word_for_reuse_is_refused(wrong, monkeypatch):
    with pytest.raises(ConfigurationError, match="reuse="):
        TieredCache(reuse=wrong)
    monkeypatch.setenv(REUSE_VARIABLE, str(wrong))
    with pytest.raises(ConfigurationError, match=REUSE_VARIABLE):
        TieredCache()
