"""Whether encoding pays, and what of a load was reading."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.costs.book import CostBook
from kvtier.costs.encoding import MARGIN, EncodingCost, EncodingSample, as_read, encoding_cost, pays
from kvtier.costs.transfer import TransferSample
from kvtier.costs.worth import ENOUGH_LOADS

SHARES = st.floats(0.01, 0.999)
SPEEDS = st.floats(1e6, 1e11)
COSTS = st.builds(EncodingCost, SHARES, SPEEDS)
SLOW, FAST = 1e-8, 2e-10  # seconds to read a byte: a slow drive, the page cache
ZSTD = EncodingCost(0.67, 1e9)


def test_encoding_pays_on_a_slow_drive_and_not_in_the_page_cache():
    assert pays(ZSTD, SLOW)
    assert not pays(ZSTD, FAST)


def test_what_is_not_known_does_not_pay():
    assert not pays(None, SLOW)
    assert not pays(ZSTD, None)


@given(COSTS, st.floats(1e-12, 1e-3))
def test_encoding_pays_only_where_a_whole_load_is_faster(cost, byte_seconds):
    raw = 10**9 * byte_seconds
    encoded = 10**9 * cost.kept_share * byte_seconds + 10**9 / cost.decode_bytes_per_second
    if pays(cost, byte_seconds):
        assert encoded < raw


@given(COSTS, st.floats(1e-12, 1e-3), st.floats(1, 100))
def test_a_slower_drive_or_a_better_codec_pays_no_less(cost, byte_seconds, times):
    if pays(cost, byte_seconds):
        assert pays(cost, byte_seconds * times)
        assert pays(EncodingCost(cost.kept_share / times, cost.decode_bytes_per_second), byte_seconds)
        assert pays(EncodingCost(cost.kept_share, cost.decode_bytes_per_second * times), byte_seconds)


@given(st.floats(1.0, 5.0), SPEEDS, st.floats(0, 1e3))
def test_a_codec_that_saves_nothing_never_pays(kept, speed, byte_seconds):
    assert not pays(EncodingCost(kept, speed), byte_seconds)


@given(COSTS, SPEEDS, st.integers(10**6, 10**10), st.floats(0, 1))
def test_reading_is_told_apart_from_decoding(cost, speed, nbytes, part):
    decoded = int(part * nbytes)
    read = nbytes - decoded * (1 - cost.kept_share)
    decoding = decoded / cost.decode_bytes_per_second
    found = as_read(TransferSample(nbytes, read / speed + decoding, decoded), cost)
    if decoding <= read / speed:  # otherwise it is not told apart so well
        assert found.nbytes / found.seconds == pytest.approx(speed, rel=0.01)
    assert found.decoded_nbytes == 0
    assert found.seconds > 0


def test_threads_may_decode_faster_together_than_was_measured():
    found = as_read(TransferSample(10**9, 0.5, 10**9), ZSTD)
    assert (found.nbytes, found.seconds) == (pytest.approx(0.67e9), 0.125)


def test_samples_count_by_their_bytes():
    samples = [EncodingSample(10**6, 6 * 10**5, 0.001), EncodingSample(3 * 10**6, 2 * 10**6, 0.005)]
    assert encoding_cost(samples) == EncodingCost(2.6 / 4, 4e6 / 0.006)
    assert encoding_cost([]) is None


# --- of a book --------------------------------------------------------------------------------------------------------


def read_from(book, speed, loads=ENOUGH_LOADS, cost=None):
    for n in range(1, loads + 1):
        nbytes = 10**7 * n
        if cost is None:
            book.note_load("disk", TransferSample(nbytes, nbytes / speed))
        else:
            seconds = nbytes * cost.kept_share / speed + nbytes / cost.decode_bytes_per_second
            book.note_load("disk", TransferSample(nbytes, seconds, nbytes))
    return book


def tried(book, cost=ZSTD):
    nbytes = 10**6
    sample = EncodingSample(nbytes, int(nbytes * cost.kept_share), nbytes / cost.decode_bytes_per_second)
    book.note_trial("zstd", sample)
    return book


def test_a_few_real_loads_are_needed():
    assert read_from(CostBook(), 1e8, ENOUGH_LOADS - 1).reading_byte_seconds("disk", "zstd") is None
    assert read_from(CostBook(), 1e8).reading_byte_seconds("disk", "zstd") == pytest.approx(1e-8, rel=0.1)


def test_a_drive_is_as_slow_as_before_when_its_files_are_encoded():
    """Otherwise loads of encoded files, which are faster, would call for raw files again, and so on."""
    book = read_from(tried(CostBook()), 1e8, loads=24, cost=ZSTD)
    assert book.reading_byte_seconds("disk", "zstd") == pytest.approx(1e-8, rel=0.1)
    assert book.transfer("disk").bytes_per_second > 1.2e8


def test_loads_of_encoded_files_tell_nothing_of_the_drive_before_the_codec_was_tried():
    assert read_from(CostBook(), 1e8, cost=ZSTD).reading_byte_seconds("disk", "zstd") is None


def test_recent_trials_count():
    book = tried(CostBook(), EncodingCost(0.9, 1e8))
    for _ in range(8):
        tried(book)
    assert book.encoding("zstd").kept_share == pytest.approx(0.67)
    assert book.encoding("zstd").decode_bytes_per_second == pytest.approx(1e9)


def test_another_process_goes_on_with_trials_and_loads():
    book = read_from(tried(CostBook()), 1e8, cost=ZSTD)
    other = CostBook()
    other.learn(json.loads(json.dumps(book.to_dict())))
    assert other.encoding("zstd") == book.encoding("zstd")
    assert other.reading_byte_seconds("disk", "zstd") == book.reading_byte_seconds("disk", "zstd")


def test_a_drive_at_the_edge_needs_a_margin():
    edge = 1 / (ZSTD.decode_bytes_per_second * (1 - ZSTD.kept_share))
    assert not pays(ZSTD, edge * (MARGIN - 0.01))
    assert pays(ZSTD, edge * (MARGIN + 0.01))
