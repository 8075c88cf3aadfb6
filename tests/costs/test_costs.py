"""Costs: what fits, what a guess adds, and what outliers and odd values do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.costs.prefill import PrefillCost, PrefillSample, first_guess
from kvtier.costs.transfer import TransferCost, TransferSample

GUESS = PrefillCost(0.01, 1e-3, 1e-7, 1e-5)
shapes = st.tuples(st.integers(1, 8000), st.integers(0, 8000), st.integers(1, 4))
factors = st.floats(0.2, 5)
some_seconds = st.floats(1e-9, 1e-2)


def test_no_tokens_and_no_bytes_cost_nothing():
    assert GUESS.seconds(0, 4000) == 0
    assert TransferCost(0.1, 1e9).seconds(0) == 0


@given(factors, factors, factors, factors, st.lists(shapes, max_size=3))
def test_a_cost_is_found_again_from_passes_of_different_kinds(passing, token, pair, depth, more):
    true = PrefillCost(
        GUESS.pass_seconds * passing,
        GUESS.token_seconds * token,
        GUESS.pair_seconds * pair,
        GUESS.depth_seconds * depth,
    )
    seen = [(1, 0, 1), (1, 8000, 1), (64, 0, 1), (512, 0, 1), (4096, 0, 1), (512, 4000, 2), *more]
    found = GUESS.refined([PrefillSample(n, p, true.seconds(n, p, rows), rows) for n, p, rows in seen])
    for n, p, rows in seen:
        assert abs(found.seconds(n, p, rows) / true.seconds(n, p, rows) - 1) < 0.1


def test_one_pass_moves_the_whole_guess():
    found = GUESS.refined([PrefillSample(512, 0, 3 * GUESS.seconds(512))])
    for shape in ((1, 0), (512, 0), (4096, 0), (512, 4096)):
        assert 2.5 < found.seconds(*shape) / GUESS.seconds(*shape) < 3.5


def test_nothing_measured_leaves_the_guess():
    assert GUESS.refined([]) == GUESS
    assert GUESS.refined([PrefillSample(5, 0, 0.0)]) == GUESS
    assert TransferCost(0.5, 1e6).refined([]).seconds(10**6) == 1.5


@given(st.lists(st.builds(PrefillSample, st.integers(1, 9999), st.integers(0, 9999), some_seconds), max_size=20))
def test_more_tokens_never_cost_less(samples):
    cost = GUESS.refined(samples)
    assert 0 <= cost.seconds(10) <= cost.seconds(11) <= cost.seconds(11, 5)


@given(st.floats(1e-4, 0.05), st.floats(1e7, 1e10))
def test_latency_and_bandwidth_are_told_apart(latency, speed):
    true = TransferCost(latency, speed)
    found = TransferCost(0.001, 1e9).refined([TransferSample(n, true.seconds(n)) for n in (10**5, 10**6, 10**7, 10**8)])
    for n in (10**5, 10**7, 10**9):
        assert abs(found.seconds(n) / true.seconds(n) - 1) < 0.15


@pytest.mark.parametrize("jitter", [-2e-3, 0.0, 2e-3])
def test_a_link_without_a_wait_is_known_by_two_sizes_also_where_noise_would_make_the_wait_negative(jitter):
    guess, block = TransferCost(0.005, 1e9), 786_432
    samples = [TransferSample(block, 0.786), TransferSample(block, 0.786), TransferSample(2 * block, 1.572 + jitter)]
    assert guess.refined(samples).seconds(10 * block) == pytest.approx(7.86, rel=0.05)


@given(st.floats(0.02, 2.0), st.integers(2, 40), st.floats(1.0, 1.1))
def test_a_slow_link_promises_nothing_that_loads_of_one_size_have_not_shown(seconds, times, other):
    guess, block = TransferCost(0.005, 1e9), 786_432
    samples = [TransferSample(block, seconds), TransferSample(int(block * other), seconds)]
    assert guess.refined(samples).seconds(times * block) >= 0.9 * times * seconds
    quick = guess.refined([TransferSample(block, guess.seconds(block))])
    assert quick.seconds(times * block) == pytest.approx(guess.seconds(times * block))  # as expected: nothing is odd


def test_a_link_that_turns_slow_is_believed_after_a_few_loads():
    fast, slow = TransferCost(0.001, 1e9), TransferCost(0.1, 1e6)
    before = [TransferSample(n, fast.seconds(n)) for n in (10**5, 10**6, 10**7) * 8]
    stalled = fast.refined([*before, TransferSample(10**6, 30.0)])
    assert stalled.seconds(10**6) == pytest.approx(fast.seconds(10**6), rel=0.1)
    after = fast.refined([*before[-16:], *[TransferSample(n, slow.seconds(n)) for n in (10**5, 10**6) * 4]])
    assert after.seconds(10**6) == pytest.approx(slow.seconds(10**6), rel=0.1)


def test_a_first_guess_counts_operations_and_bytes():
    guess = first_guess(10**9, 1e5, 2e9, 1e5, operations_per_second=1e12, bytes_per_second=1e10)
    assert guess == PrefillCost(0.1, 2e-3, 1e-7, 1e-5, 2e-3)
