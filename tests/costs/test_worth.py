"""Worth of K and V: what loading saves, and when no turn would load."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.costs.book import CostBook
from kvtier.costs.prefill import PrefillCost, PrefillSample
from kvtier.costs.transfer import TransferCost, TransferSample
from kvtier.costs.worth import ENOUGH_LOADS, LEAST_SHARE, TOO_SLOW_TIMES, Worth
from kvtier.hf.turn.choice.decision import BOTH, COMPUTE, LOAD, Estimates, StoredRange, decide
from kvtier.hf.turn.cost import COSTS

SECONDS = st.floats(1e-9, 1e-2)
TOKENS = st.integers(1, 10**5)
WORTHS = st.builds(
    lambda token, pair, nbytes, disk: Worth(token, pair, nbytes, {"disk": disk}),
    SECONDS,
    st.floats(0, 1e-6),
    st.floats(1, 1e6),
    st.floats(1e-12, 1e-3),
)


def test_a_block_saves_what_computing_takes_more_than_loading():
    worth = Worth(1e-3, 0.0, 100.0, {"disk": 1e-6, "host": 1e-8})
    assert worth.saved_seconds("disk", 256, 0, 25_600) == pytest.approx(0.256 - 0.0256)
    assert worth.saved_seconds("host", 256, 0, 25_600) == pytest.approx(0.256, rel=0.01)
    assert worth.saved_seconds("of which nothing is known", 256, 0, 25_600) == pytest.approx(0.256)


def test_blocks_of_some_layers_share_what_their_tokens_take():
    worth = Worth(1e-3, 0.0, 100.0, {"disk": 1e-6})
    whole = worth.saved_seconds("disk", 256, 0, 25_600)
    assert sum(worth.saved_seconds("disk", 256, 0, n) for n in (5_600, 20_000)) == pytest.approx(whole)


@given(WORTHS, TOKENS, TOKENS, st.integers(-1, 10**6), st.integers(1, 10**9))
def test_what_is_saved_is_more_than_nothing_and_rises_with_depth(worth, tokens, deeper, depth, nbytes):
    saved = worth.saved_seconds("disk", tokens, depth, nbytes)
    computing = nbytes * worth.computing_byte_seconds(tokens, depth)
    assert LEAST_SHARE * computing * 0.999 <= saved <= computing < math.inf
    assert 0 < saved <= worth.saved_seconds("disk", tokens, depth + deeper, nbytes)


@given(SECONDS, st.floats(0, 1e-6), st.integers(2, 10**5), st.floats(1.0, 100.0), st.floats(0, 0.01))
def test_no_turn_gains_by_loading_what_is_loaded_too_slowly(token, pair, tokens, times, latency):
    """Neither by all of it, nor by its end while the front is computed. Of equal ways, it may still choose any."""
    disk = TransferCost(latency, 1 / (times * TOO_SLOW_TIMES * (token + pair * tokens) / 100))
    worth = Worth(token, pair, 100.0, {"disk": 1.0001 / disk.bytes_per_second})
    assert worth.is_loaded_too_slowly("disk", tokens)
    estimates = Estimates(PrefillCost(0.01, token, pair, 0.0), {"disk": disk}, 100.0)
    for length in {tokens, max(2, tokens // 3)}:
        cut = length - 1
        stored = [StoredRange("disk", 0, cut)]
        decision = decide(length, 0, [cut // 2, cut], stored, estimates, COSTS, may_split=True)
        seconds = {decision.way: decision.seconds, **decision.others}
        assert seconds[COMPUTE] <= seconds[LOAD]
        assert COSTS.both_share * seconds[COMPUTE] <= seconds[BOTH]
        assert decision.way == COMPUTE or seconds[COMPUTE] >= COSTS.other_way_share * seconds[LOAD]


def test_what_a_turn_would_still_load_in_part_is_worth_writing():
    """Three times slower than computing: no turn loads all of it, but the end of it beside the computation."""
    worth = Worth(1e-3, 0.0, 100.0, {"disk": 3e-5})
    assert not worth.is_loaded_too_slowly("disk", 5000)
    estimates = Estimates(PrefillCost(0.0, 1e-3, 0.0, 0.0), {"disk": TransferCost(0.0, 1 / 3e-5)}, 100.0)
    stored = [StoredRange("disk", 0, 4999)]
    assert decide(5000, 0, [4999], stored, estimates, COSTS, may_split=True).way == BOTH
    assert decide(5000, 0, [4999], stored, estimates, COSTS, may_split=False).way == COMPUTE


def test_a_longer_sequence_may_be_worth_what_a_short_one_is_not():
    worth = Worth(1e-3, 1e-6, 100.0, {"disk": 2e-4})
    assert worth.is_loaded_too_slowly("disk", 500)
    assert not worth.is_loaded_too_slowly("disk", 5000)


# --- of a book --------------------------------------------------------------------------------------------------------

COST = PrefillCost(0.01, 1e-3, 1e-7, 1e-6)


def learnt(loads=ENOUGH_LOADS, speed=1e8):
    book = CostBook()
    book.token_bytes = 100.0
    for tokens in (1, 64, 700, 4096):
        book.note_pass(PrefillSample(tokens, 0, COST.seconds(tokens)))
    for n in range(loads):
        book.note_load("disk", TransferSample(10**7 * (n + 1), 10**7 * (n + 1) / speed))
    return book


def test_a_book_knows_the_worth_of_what_was_measured():
    worth = learnt().worth()
    assert worth.token_seconds == pytest.approx(1e-3, rel=0.1)
    assert worth.byte_seconds["disk"] == pytest.approx(1e-8, rel=0.1)


def test_few_loads_tell_nothing():
    assert learnt(ENOUGH_LOADS - 1, speed=1.0).worth().byte_seconds == {}


def test_nothing_is_known_without_passes_or_the_bytes_of_a_token():
    book = CostBook()
    book.guess(COST)
    book.token_bytes = 100.0
    assert book.worth() is None
    book = learnt()
    book.token_bytes = 0.0
    assert book.worth() is None


def test_loads_beside_a_fast_computer_are_decided_by_what_was_measured():
    slow = learnt(speed=1e3).worth()
    assert slow.is_loaded_too_slowly("disk", 1000)
    assert not learnt(speed=1e8).worth().is_loaded_too_slowly("disk", 1000)
    estimates = Estimates(learnt().prefill(), {"disk": learnt().transfer("disk")}, 100.0)
    assert decide(1000, 0, [999], [StoredRange("disk", 0, 999)], estimates, COSTS, may_split=False).way == LOAD
