"""Computing against loading: what both at once gains, where they break even, and what fits."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.costs.break_even import Race
from kvtier.costs.compute import ComputeCost, pairs
from kvtier.costs.footprint import Footprint
from kvtier.costs.machines import MACHINES, named_machine
from kvtier.costs.prefill import PrefillCost
from kvtier.costs.transfer import TransferCost
from kvtier.errors import ConfigurationError

footprints = st.builds(
    Footprint, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 5000), st.integers(0, 10**9)
)
computes = st.builds(
    ComputeCost,
    st.builds(PrefillCost, st.floats(0, 0.1), st.floats(1e-7, 0.01), st.floats(0, 1e-6)),
    st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 1e-6)), max_size=2).map(tuple),
)
loads = st.builds(TransferCost, st.floats(0, 0.1), st.floats(1e6, 1e11))
races = st.builds(Race, computes, loads, footprints, st.booleans())
lengths = st.integers(2, 20_000)


@given(races, lengths)
def test_both_is_never_slower_than_the_better_of_the_two(race, tokens):
    assert race.both(tokens).seconds <= min(race.cold_seconds(tokens), race.load_seconds(tokens))


@given(races, st.integers(2, 300))
def test_both_is_the_best_of_all_splits(race, tokens):
    known = tokens - 1
    last = race.compute.seconds(1, known)
    combine = sum if race.shares_cores else max
    every = [
        combine((race.compute.seconds(front), race.load.seconds(race.footprint.nbytes(known, front)))) + last
        for front in range(known)
    ]
    best = min(*every, race.cold_seconds(tokens))
    assert race.both(tokens).seconds == pytest.approx(best, rel=1e-9)


def test_computing_and_loading_meet_where_both_take_as_long():
    race = Race(ComputeCost(PrefillCost(0, 1e-4, 0)), TransferCost(0, 1e9), Footprint(100_000))  # 100 µs a token each
    split = race.both(10_001)
    assert split.computed_tokens == 5000
    assert split.seconds == pytest.approx(0.5 + 1e-4)


@given(races, lengths)
def test_break_even_length_is_where_cold_and_load_cross(race, tokens):
    even = race.break_even_tokens()
    slack = 1e-9 * race.cold_seconds(tokens)  # the sums round differently
    if even is not None and tokens >= even:
        assert race.load_seconds(tokens) <= race.cold_seconds(tokens) + slack
    if even is not None and even > 2:
        assert race.load_seconds(even - 1) >= race.cold_seconds(even - 1) * (1 - 1e-9)
    if even is None:
        assert race.load_seconds(2**24) > race.cold_seconds(2**24)


@given(races, lengths)
def test_at_the_break_even_bandwidth_loading_takes_as_long_as_computing(race, tokens):
    bandwidth = race.break_even_bytes_per_second(tokens)
    if bandwidth:
        load = TransferCost(0, bandwidth)
        at_once = Race(race.compute, load, race.footprint, race.shares_cores)
        assert at_once.load_seconds(tokens) == pytest.approx(at_once.cold_seconds(tokens))


def test_one_token_has_no_break_even_bandwidth():
    race = Race(ComputeCost(PrefillCost(1, 1, 1)), TransferCost(0, 1e9), Footprint(100))
    assert race.break_even_bytes_per_second(1) is None


def test_loading_that_is_always_slower_never_breaks_even():
    race = Race(ComputeCost(PrefillCost(0, 1e-6, 0)), TransferCost(0, 1e6), Footprint(1000))
    assert race.break_even_tokens() is None


@given(footprints, st.integers(0, 10**12))
def test_the_longest_sequence_fits_and_one_token_more_does_not(footprint, budget):
    tokens = footprint.tokens_in(budget)
    if tokens is None:
        assert footprint.nbytes(10**12) <= budget
        return
    assert footprint.nbytes(tokens) <= budget
    assert footprint.nbytes(tokens + 1) > budget


@given(footprints, st.integers(0, 9999), st.integers(0, 9999))
def test_the_more_is_computed_the_less_is_loaded(footprint, tokens, computed):
    assert footprint.nbytes(tokens, computed) <= footprint.nbytes(tokens)
    assert footprint.nbytes(tokens, computed + 1) <= footprint.nbytes(tokens, computed)
    assert footprint.nbytes(tokens, tokens) == 0


@given(st.integers(0, 300), st.integers(1, 300))
def test_pairs_are_counted_token_by_token(tokens, visible):
    assert pairs(tokens, visible) == sum(min(at, visible) for at in range(1, tokens + 1))


@given(computes, st.integers(1, 5000), st.integers(1, 5000))
def test_a_prompt_in_two_passes_costs_one_pass_more_and_pairs_that_no_token_sees(compute, first, second):
    apart, layers = compute.seconds(first) + compute.seconds(second, first), compute.every_layer
    unseen = layers.pair_seconds * second * (second - 1) / 2
    assert apart == pytest.approx(compute.seconds(first + second) + layers.pass_seconds + unseen)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_machines_are_found_by_name_and_their_figures_are_plausible(machine):
    for name in (machine.name, machine.name.lower(), machine.name.replace(" ", "")):
        assert named_machine(name) is machine
    assert 0.3 < machine.utilisation < 0.5
    assert machine.link_bytes_per_second < machine.memory_bytes_per_second
    assert 50e12 < machine.peak_operations_per_second < 3e15
    assert math.log10(machine.memory_bytes) == pytest.approx(10.5, abs=1)


def test_an_unknown_machine_is_an_error_that_lists_the_known():
    with pytest.raises(ConfigurationError, match=r"device='K80'.*H100"):
        named_machine("K80")
    assert named_machine("4090").name == "RTX 4090"
