"""BackFetch: what has arrived, from the back and of all rows; what is given up; who closes what."""

from __future__ import annotations

import threading

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import UnavailableError
from kvtier.kv.page import Page
from kvtier.kv.spec import KVSpec, LayerSpec
from kvtier.store.chain import BlockId
from kvtier.store.reading.back_fetch import BackFetch
from kvtier.store.reading.load import LoadJob
from kvtier.store.reading.lookup import Span
from kvtier.transfer.threads import Readers

SPEC = KVSpec((LayerSpec(1, 2, 1, 2, torch.float32),))


class GatedReader:
    tier = "far"
    is_plain = True
    spec = SPEC

    def __init__(self, block, fails=False):
        self.id = block
        self.gate = threading.Event()
        self.read, self.closed = threading.Event(), threading.Event()
        self.fails = fails

    def page(self, layer):
        assert self.gate.wait(20)
        self.read.set()
        if self.fails:
            raise UnavailableError("away")
        tokens = len(self.id.tokens)
        return Page(torch.ones(1, tokens, 2), torch.ones(1, tokens, 2))

    def states(self):
        return None

    def detach(self):
        pass

    def close(self):
        self.closed.set()


def block(name, tokens):
    return BlockId(name, "parent", "root", np.arange(tokens))


class Case:
    """Rows of blocks, given by their lengths; each block is read when its gate opens."""

    def __init__(self, *rows, failing=()):
        self.readers, self.noted, spans = {}, [], []
        for row, lengths in enumerate(rows):
            start = 0
            spans.append([])
            for number, tokens in enumerate(lengths):
                key = f"{row}.{number}"
                spans[-1].append(Span(block(key, tokens), start, 0, tokens))
                self.readers[key] = GatedReader(spans[-1][-1].block, key in failing)
                start += tokens
        self.reading = Readers(len(self.readers))
        self.job = LoadJob(spans, dict(self.readers), self.reading, self.noted.append)
        self.fetch = BackFetch(self.job, self.reading)

    def let(self, *keys, seconds=20):
        for key in keys:
            self.readers[key].gate.set()
            assert self.readers[key].read.wait(20)
        wanted = set(keys)
        with self.fetch.changed:
            self.fetch.changed.wait_for(lambda: wanted <= self.fetch.settled, seconds)

    def end(self):
        for reader in self.readers.values():
            reader.gate.set()
        self.job.close()
        self.reading.close()
        assert all(reader.closed.is_set() for reader in self.readers.values())


def test_only_what_is_there_up_to_the_end_has_arrived():
    case = Case([4, 4, 4])
    assert case.fetch.arrived == 12
    case.let("0.0")
    assert case.fetch.arrived == 12
    case.let("0.2")
    assert case.fetch.arrived == 8
    case.let("0.1")
    assert case.fetch.arrived == 0
    case.end()


def test_of_several_rows_the_last_to_arrive_counts():
    case = Case([4, 8], [10, 2])
    case.let("0.1", "1.1")
    assert case.fetch.arrived == 10  # of row 1, tokens 0 to 10 are missing
    case.let("1.0")
    assert case.fetch.arrived == 4
    case.end()


def test_what_has_not_arrived_is_given_up_and_closed_when_its_thread_is_done():
    case = Case([4, 4, 4])
    case.let("0.2")
    assert case.fetch.stop(6) == 8
    assert not case.readers["0.1"].closed.is_set()  # a thread is reading it
    assert [span.block.key for span in case.job.spans(0, 0)] == ["0.2"]
    case.readers["0.1"].gate.set()
    assert case.readers["0.1"].closed.wait(20)
    assert not case.readers["0.2"].closed.is_set()
    case.end()


def test_what_was_computed_meanwhile_is_left_out():
    case = Case([4, 4, 4])
    case.let("0.2", "0.1")
    assert case.fetch.stop(6) == 6
    assert [(span.start, span.first) for span in case.job.spans(0, 0)] == [(6, 2), (8, 0)]
    case.end()


def test_a_block_that_fails_is_reported_and_ends_the_wait():
    case = Case([4, 4, 4], failing={"0.1"})
    case.let("0.2", "0.1")
    assert case.fetch.is_stuck
    case.fetch.wait(0, 20)  # returns at once
    assert case.fetch.stop(0) == 8
    assert [list(errors) for errors in case.noted if errors] == [["0.1"]]
    case.end()


def test_waiting_ends_in_time():
    case = Case([4, 4])
    case.fetch.wait(0, 0.01)
    assert case.fetch.arrived == 8
    case.end()


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_everything_after_what_has_arrived_can_be_read(rows, data):
    case = Case(*rows)
    fetched = data.draw(st.lists(st.sampled_from(sorted(case.readers)), unique=True))
    case.let(*fetched)
    arrived = case.fetch.arrived
    token = data.draw(st.integers(0, 12))
    begin = case.fetch.stop(token)
    assert begin == max(token, arrived)
    for row, lengths in enumerate(rows):
        kept = case.job.spans(row, 0)
        assert sum(span.tokens for span in kept) == max(0, sum(lengths) - begin)
        assert {span.block.key for span in kept} <= set(fetched)
    case.end()


def test_samples_tell_bytes_and_seconds_by_tier():
    case = Case([4, 4])
    assert case.fetch.samples() == {}
    case.let("0.1")
    (sample,) = case.fetch.samples().values()
    assert (sample.nbytes, sample.seconds) == (4 * 16, case.fetch.seconds)
    case.end()


def test_the_first_block_after_a_stop_tells_how_slow_the_tier_is():
    case, late = Case([4, 6]), []
    case.fetch.stop(0)
    (guessed,) = case.fetch.samples().values()  # as long again as it was waited for
    case.fetch.when_late(lambda *sample: late.append(sample))
    assert not late
    case.readers["0.1"].gate.set()
    assert case.readers["0.1"].closed.wait(20)
    ((tier, sample),) = late
    assert (tier, sample.nbytes) == ("far", 6 * 16)
    assert sample.seconds >= guessed.seconds / 2
    case.readers["0.0"].gate.set()
    case.end()
    assert len(late) == 1


def test_the_first_block_after_a_stop_counts_together_with_what_came_before():
    case, late = Case([4, 4, 6]), []
    case.let("0.2")
    case.fetch.stop(8)
    case.fetch.when_late(lambda *sample: late.append(sample))
    case.readers["0.1"].gate.set()
    assert case.readers["0.1"].closed.wait(20)
    case.end()
    ((tier, sample),) = late
    assert (tier, sample.nbytes) == ("far", 10 * 16)
    assert sample.seconds >= case.fetch.seconds


def test_the_first_block_after_a_stop_does_not_count_where_several_came_before():
    case, late = Case([4, 4, 6]), []
    case.let("0.1", "0.2")
    case.fetch.stop(4)
    case.fetch.when_late(lambda *sample: late.append(sample))
    case.end()
    assert not late
