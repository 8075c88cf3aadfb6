"""TurnClock: which passes are timed, also where they return before they have ended."""

import torch

from kvtier.hf.turn.choice import clock as clocks
from kvtier.hf.turn.choice.clock import TurnClock, wait_for_compute


def timed(events, *, is_asynchronous):
    """Return the samples after ``events``: ``(time, depth, columns)`` of passes, or ``(time,)`` of a settled end."""
    now = [0.0]
    clock = TurnClock(0.0, 100, 1, is_asynchronous=is_asynchronous, now=lambda: now[0])
    for at, *of in events:
        now[0] = at
        if of:
            clock.begin_pass(*of, 0.0)
        else:
            clock.end_pass(0.0, is_settled=True)
    return clock, [(sample.tokens, sample.seconds) for sample in clock.samples()]


PASSES = [(1.0, 0, 60), (3.0, 60, 40), (4.0, 100, 1), (4.5, 101, 1)]


def test_passes_end_where_the_next_begins():
    clock, samples = timed(PASSES, is_asynchronous=False)
    assert samples == [(60, 2.0), (40, 1.0), (1, 0.5)]
    assert (clock.around_seconds, clock.first_token_seconds) == (1.0, 4.0)


def test_waiting_for_pages_before_the_first_pass_is_not_time_around_passes():
    now = [0.0]
    clock = TurnClock(0.0, 100, 1, now=lambda: now[0])
    now[0] = 3.0
    clock.begin_pass(60, 40, 2.0)
    now[0] = 4.0
    clock.begin_pass(100, 1, 2.0)
    assert (clock.around_seconds, clock.first_token_seconds) == (1.0, 4.0)
    assert [sample.seconds for sample in clock.samples()] == [1.0]


def test_what_was_only_enqueued_is_no_sample_nor_is_the_pass_that_had_to_wait_for_it():
    clock, samples = timed(PASSES, is_asynchronous=True)
    assert samples == [(1, 0.5)]
    assert clock.first_token_seconds == 4.0


def test_a_pass_that_was_waited_for_is_a_sample_and_what_came_before_the_next_is_not_its_time():
    settled = [PASSES[0], (2.5,), *PASSES[1:]]
    assert timed(settled, is_asynchronous=True)[1] == [(60, 1.5), (40, 1.0), (1, 0.5)]
    assert timed(settled, is_asynchronous=False)[1] == [(60, 1.5), (40, 1.0), (1, 0.5)]


def test_only_devices_that_run_ahead_are_waited_for(monkeypatch):
    asked = []
    zeros = torch.zeros
    monkeypatch.setattr(clocks.torch, "zeros", lambda *size, device: asked.append(device) or zeros(*size))
    wait_for_compute({torch.device("cpu"), torch.device("meta")})
    assert asked == []
    wait_for_compute({torch.device("cpu"), torch.device("mps")})
    assert asked == [torch.device("mps")]
