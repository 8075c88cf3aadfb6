"""Progress: events of one piece of work, bars, and callbacks that fail."""

from __future__ import annotations

import io
import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from kvtier import ConfigurationError
from kvtier.progress import Bars, Progress, ProgressEvent, progress_of


@given(st.lists(st.tuples(st.integers(-3, 30), st.none() | st.integers(0, 30))), st.booleans())
def test_events_of_a_task_grow_and_the_last_one_says_so(steps, complete):
    events = []
    task = Progress(events.append).begin("load", 20, "bytes")
    for done, total in steps:
        task.to(done, total)
    task.end(complete=complete)
    task.to(30, 30)
    task.end()
    assert [event.ended for event in events] == [False] * (len(events) - 1) + [True]
    assert all(a.done <= b.done and a.seconds <= b.seconds for a, b in itertools.pairwise(events))
    assert {(event.kind, event.unit) for event in events} == {("load", "bytes")}
    assert not complete or events[-1].done == events[-1].total
    assert (events[0].done, events[0].total) == (0, 20)


def test_seconds_are_those_of_the_work():
    times = iter([10.0, 10.0, 12.5, 14.0])
    events = []
    task = Progress(events.append, now=lambda: next(times)).begin("load", 2, "bytes")
    task.to(1)
    task.end()
    assert [event.seconds for event in events] == [0.0, 2.5, 4.0]


def test_callback_that_raises_is_warned_of_once_and_not_called_again(warned):
    calls = []

    def fail(event):
        calls.append(event)
        raise ValueError("no such window")

    progress = Progress(fail)
    for _ in range(2):
        progress.begin("load", 5, "bytes").end()
    assert len(calls) == 1
    (text,) = warned()
    assert "ValueError: no such window" in text
    assert warned() == []


def test_interrupt_in_a_callback_is_not_swallowed():
    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Progress(stop).begin("load", 5, "bytes")


@pytest.mark.parametrize("value", [1, "bars", object()], ids=["number", "word", "object"])
def test_progress_of_another_type_raises(value):
    with pytest.raises(ConfigurationError, match=r"progress=.* is unknown; pass True for bars, or a function"):
        progress_of(value)


def test_progress_is_off_by_default():
    assert progress_of(False) is progress_of(None) is None


# --- bars -------------------------------------------------------------------------------------------------------------


def bars_into(text, delay_seconds=0.0):
    made = []

    def make_bar(**arguments):
        made.append(tqdm(file=text, mininterval=0, miniters=1, **arguments))
        return made[-1]

    return Bars(make_bar, delay_seconds), made


def test_bars_show_kind_unit_and_count_and_go_away():
    text = io.StringIO()
    bars, made = bars_into(text)
    task = Progress(bars).begin("prefill", 2000, "tokens")
    task.to(500)
    assert "kvtier: prefill:  25%" in text.getvalue()
    assert "500/2000" in text.getvalue()
    task.to(1000, 4000)
    task.end()
    assert "1000/4000" in text.getvalue()
    assert "tokens/s" in text.getvalue()
    assert (made[0].n, made[0].disable) == (4000, True), "closed"
    assert made[0].leave is False


def test_bars_of_bytes_are_scaled():
    text = io.StringIO()
    Progress(bars_into(text)[0]).begin("load", 3_000_000, "bytes").to(1_500_000)
    assert "1.50M/3.00M" in text.getvalue()


def test_work_that_ends_soon_shows_no_bar():
    text = io.StringIO()
    bars, _ = bars_into(text, delay_seconds=time.monotonic())
    task = Progress(bars).begin("load", 10, "bytes")
    for done in range(10):
        task.to(done)
    task.end()
    assert "%" not in text.getvalue()


def test_interrupted_work_closes_its_bar_and_the_next_work_has_its_own():
    text = io.StringIO()
    bars, made = bars_into(text)
    progress = Progress(bars)
    task = progress.begin("prefill", 10, "tokens")
    task.to(5)
    task.end(complete=False)
    assert (made[0].n, made[0].disable) == (5, True)
    lost = progress.begin("prefill", 10, "tokens")
    lost.to(5)
    progress.begin("prefill", 20, "tokens").to(7)  # without an end of the former
    assert [bar.total for bar in made] == [10, 10, 20]
    assert made[1].disable


def test_bars_of_two_kinds_stand_beside_each_other():
    bars, made = bars_into(io.StringIO())
    progress = Progress(bars)
    prefill, load = progress.begin("prefill", 10, "tokens"), progress.begin("load", 10, "bytes")
    load.to(5)
    prefill.to(3)
    assert [bar.n for bar in made] == [3, 5]
    load.end()
    prefill.end()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_default_bars_are_those_of_tqdm_in_terminals_alone(monkeypatch, is_terminal):
    errors = io.StringIO()
    errors.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", errors)
    bars = Bars(delay_seconds=0.0)
    bars(ProgressEvent("load", 0, 10, "bytes", 0.0))
    bars(ProgressEvent("load", 10, 10, "bytes", 0.1, True))
    assert ("kvtier: load" in errors.getvalue()) == is_terminal
