"""CostBook: kinds of samples, hiccups, guesses, and what another process reads."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.costs.book import CostBook
from kvtier.costs.prefill import PrefillCost, PrefillSample
from kvtier.costs.transfer import TransferCost, TransferSample

TRUE = PrefillCost(0.05, 2e-3, 5e-8, 1e-5)


def seen(book, *shapes, cost=TRUE, factor=1.0):
    for tokens, depth in shapes:
        book.note_pass(PrefillSample(tokens, depth, factor * cost.seconds(tokens, depth)))
    return book


def test_a_new_book_knows_nothing_of_passes_and_guesses_loads():
    book = CostBook()
    assert book.prefill() is None
    assert not book.knows_passes
    assert (
        book.transfer("host").seconds(10**8) < book.transfer("disk").seconds(10**8) < book.transfer("s3").seconds(10**8)
    )


def test_a_guess_holds_until_passes_say_otherwise():
    book = CostBook()
    book.guess(TRUE)
    assert book.prefill() == TRUE
    seen(book, (1, 0), (512, 0), (4096, 0), factor=3)
    assert book.prefill().seconds(512) == pytest.approx(3 * TRUE.seconds(512), rel=0.1)


def test_one_hiccup_of_a_kind_does_not_count():
    book = seen(CostBook(), *[(512, 0)] * 3, (1, 512), (4096, 0))
    seen(book, (512, 0), factor=50)
    assert book.prefill().seconds(512) == pytest.approx(TRUE.seconds(512), rel=0.1)


def test_many_steps_do_not_outweigh_a_prompt():
    book = seen(CostBook(), (4096, 0))
    seen(book, *[(1, n) for n in range(4096, 4400)])
    assert book.prefill().seconds(4096) == pytest.approx(TRUE.seconds(4096), rel=0.1)


def test_recent_loads_replace_old_ones():
    book = CostBook()
    for speed in [1e9] * 9 + [1e6] * 5:
        book.note_load("disk", TransferSample(10**7, 10**7 / speed))
    assert book.transfer("disk").seconds(10**7) == pytest.approx(10, rel=0.1)


def test_another_process_goes_on_with_what_one_has_learnt():
    book = seen(CostBook(), (1, 0), (700, 0), (5000, 100))
    book.note_load("disk", TransferSample(10**7, 0.3))
    book.token_bytes = 123.0
    other = CostBook()
    other.learn(json.loads(json.dumps(book.to_dict())))
    assert other.prefill() == book.prefill()
    assert other.transfer("disk") == book.transfer("disk")
    assert (other.token_bytes, other.news) == (123.0, 0)


def test_only_new_kinds_are_news():
    book = seen(CostBook(), (512, 0), (1, 512))
    assert book.news == 2
    book.to_dict()
    seen(book, (512, 0), (513, 0))
    assert book.news == 0


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["passes", "loads", "lookups", "trials", "token_bytes", "x"]), values))
def test_what_no_book_has_written_is_left_out(damaged):
    book = CostBook()
    book.learn(damaged)
    cost = book.prefill()
    assert cost is None or cost.seconds(10) >= 0
    assert isinstance(book.transfer("host"), TransferCost)
    assert book.encoding("x") is None or book.encoding("x").kept_share > 0


@pytest.mark.parametrize("odd", [[0, 0, 1, 0.5], [10**200, 0, 1, 0.5], [5, 1e300, 1, 0.5], [5, 0, 1, 1e300]])
def test_numbers_that_no_pass_has_are_damage(odd):
    book = CostBook()
    book.learn({"passes": [odd], "loads": {"disk": [[odd[0], odd[3], 0]]}})
    assert book.prefill() is None
    assert 0 < book.transfer("disk").seconds(10**6) < 10**6


def test_a_book_stays_small():
    book = CostBook()
    for n in range(1, 3000):
        book.note_pass(PrefillSample(n, n * n, 1.0, n))
    assert len(book.to_dict()["passes"]) <= 64 * 5


def test_what_turns_take_around_their_passes_is_known():
    book = CostBook()
    assert book.around_seconds() == 0
    for seconds in (0.02, 0.02, 5.0, 0.02, 0.0):
        book.note_around(seconds)
    assert book.around_seconds() == 0.02  # one stall does not count
    other = CostBook()
    other.learn(json.loads(json.dumps(book.to_dict())))
    assert other.around_seconds() == 0.02


def test_a_pass_beside_a_load_counts_until_one_of_its_kind_ran_alone():
    book = seen(CostBook(), (1, 0), (64, 0), (4096, 0))
    slow, quick = (PrefillSample(512, 0, factor * TRUE.seconds(512)) for factor in (3, 1))
    book.note_pass(slow, alone=False)
    assert book.prefill().seconds(512) > 1.1 * TRUE.seconds(512)
    book.note_pass(quick)
    book.note_pass(slow, alone=False)
    assert book.prefill().seconds(512) == pytest.approx(TRUE.seconds(512), rel=0.1)


def test_lookups_are_kept_beside_loads_and_the_middle_one_counts():
    book = CostBook()
    assert book.lookup_seconds("s3") == 0
    for seconds in (0.1, 0.2, 0.1, 9.0, 0.0):
        book.note_lookup("s3", seconds)
    assert book.lookup_seconds("s3") == 0.1  # the lower one of the two in the middle
    assert set(book.to_dict()["loads"]) == set()
    other = CostBook()
    other.learn(json.loads(json.dumps(book.to_dict())))
    assert other.lookup_seconds("s3") == 0.1
    assert other.transfer("s3") == CostBook().transfer("s3")


def test_lookups_of_earlier_files_are_read():
    book = CostBook()
    book.learn({"loads": {"s3, asking": [[1, 0.25, 0]], "s3": [[10**7, 0.5, 0]]}})
    assert book.lookup_seconds("s3") == 0.25
    assert set(book.to_dict()["loads"]) == {"s3"}
