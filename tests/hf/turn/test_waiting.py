"""A second call on a cache waits up to ``wait_seconds`` for the first, and then raises ``BusyError``."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from kvtier import BusyError, ClosedError, ConfigurationError, PromptError, TieredCache
from kvtier.hf.turn import exclusive_use
from kvtier.hf.turn.manager import TurnManager
from tests.support.interrupts import InterruptAtLine
from tests.support.upstream import CACHE

LONG_SECONDS = 60.0  # no test waits this long, unless it fails


class Pause(BaseStreamer, StoppingCriteria):
    """Holds a ``generate()`` at its first new token until ``go_on``, and may stop it there."""

    def __init__(self, error=None, stops=False):
        self.inside, self.go_on, self.puts = threading.Event(), threading.Event(), 0
        self.error, self.stops = error, stops

    def put(self, value):
        self.puts += 1
        if self.puts == 2:
            self.inside.set()
            assert self.go_on.wait(LONG_SECONDS)
            if self.error is not None:
                raise self.error

    def end(self):
        pass

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), self.stops and self.go_on.is_set(), device=input_ids.device)


class Elsewhere(threading.Thread):
    """Runs ``call`` on its own thread; ``outcome`` is the result or the error."""

    def __init__(self, call):
        super().__init__(daemon=True)
        self.call, self.outcome = call, None
        self.start()

    def run(self):
        try:
            self.outcome = self.call()
        except BaseException as error:
            self.outcome = error

    def reaches(self, event):
        """Wait until the call sets ``event``; fail with what it ended in, if it ends before."""
        while not event.wait(0.1):
            assert self.is_alive(), f"the call has ended: {self.outcome!r}"

    def result(self):
        self.join(LONG_SECONDS)
        assert not self.is_alive()
        return self.outcome


class AtCall:
    """Calls ``do`` when this thread enters the function ``of``. A profiler sees it; nothing is replaced."""

    def __init__(self, of, do):
        self._code, self._do = of.__code__, do

    def _profile(self, frame, event, argument):
        if event == "call" and frame.f_code is self._code:
            self._do()

    def __enter__(self):
        sys.setprofile(self._profile)

    def __exit__(self, *_):
        sys.setprofile(None)


def when_waiting(do, call):
    """Run ``call``. When it starts to wait, and holds the lock that an ending turn needs, call ``do``."""
    with AtCall(threading.Condition.wait, do):
        return call()


@pytest.fixture
def patient(store):
    with TieredCache(store, wait_seconds=LONG_SECONDS) as cache:
        yield cache


def answer(model, generate, cache, ids):
    return generate(model, ids, cache).sequences


def begun(model, generate, cache, ids):
    report = cache.begin(model, ids)
    assert report.cached_tokens >= 30
    sequences = ids
    with torch.no_grad():
        for _ in range(8):
            logits = model(sequences[:, cache.get_seq_length() :], **{CACHE: cache}).logits[:, -1]
            logits[:, 0] = -torch.inf
            sequences = torch.cat([sequences, logits.argmax(-1, keepdim=True)], 1)
    cache.commit(sequences)
    return sequences


def after_reset(model, generate, cache, ids):
    cache.reset()
    assert cache.get_seq_length() == 0
    return answer(model, generate, cache, ids)


def after_commit(model, generate, cache, ids):
    with pytest.raises(PromptError, match="without begin"):  # the turn that commit() waited for has ended
        cache.commit(ids)
    return answer(model, generate, cache, ids)


ASKS = {"generate": answer, "begin": begun, "reset": after_reset, "commit": after_commit}
ENDS = {"ends": {}, "stopped": {"stops": True}, "raises": {"error": RuntimeError("the page was closed")}}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("ask", ASKS)
def test_second_call_waits_for_the_first_and_then_succeeds(model, generate, tokens, patient, ask, end):
    ids, pause = tokens(30), Pause(**ENDS[end])
    longer = torch.cat([ids, tokens(6, seed=1)], 1)
    expected = answer(model, generate, None, longer)
    first = Elsewhere(lambda: generate(model, ids, patient, streamer=pause, stopping_criteria=[pause]))
    first.reaches(pause.inside)
    second = Elsewhere(lambda: when_waiting(pause.go_on.set, lambda: ASKS[ask](model, generate, patient, longer)))
    found = second.result()
    pause.go_on.set()
    assert not isinstance(found, BaseException), found
    assert torch.equal(found, expected)
    if end == "raises":
        assert first.result() is pause.error
    else:
        made = answer(model, generate, None, ids)
        assert torch.equal(first.result().sequences, made[:, :32] if end == "stopped" else made)
    assert torch.equal(answer(model, generate, patient, longer), expected)


@pytest.mark.parametrize("wait_seconds", [0, 0.01])
@pytest.mark.parametrize("ask", ASKS)
def test_wait_timeout_raises_busy_error_that_names_wait_seconds(model, generate, tokens, store, ask, wait_seconds):
    ids, pause = tokens(30), Pause()
    expected = answer(model, generate, None, ids)
    with TieredCache(store, wait_seconds=wait_seconds) as cache:
        first = Elsewhere(lambda: answer_with(model, generate, cache, ids, pause))
        first.reaches(pause.inside)
        second = Elsewhere(lambda: ASKS[ask](model, generate, cache, ids))
        found = second.result()
        pause.go_on.set()
        assert torch.equal(first.result(), expected)
        assert isinstance(found, BusyError)
        assert "wait_seconds" in str(found)
        assert torch.equal(answer(model, generate, cache, ids), expected)


def answer_with(model, generate, cache, ids, streamer):
    return generate(model, ids, cache, streamer=streamer).sequences


class Within(BaseStreamer):
    """Calls ``do`` inside ``generate()``, on its thread."""

    def __init__(self, do):
        self.do, self.puts = do, 0

    def put(self, value):
        self.puts += 1
        if self.puts == 2:
            self.do()

    def end(self):
        pass


@pytest.mark.parametrize("what", ["reset", "begin", "commit"])
def test_call_inside_generate_on_the_same_thread_raises_without_waiting(model, generate, tokens, patient, what):
    ids = tokens(30)
    asks = {"reset": patient.reset, "begin": lambda: patient.begin(model, ids), "commit": lambda: patient.commit(ids)}
    waits = []
    within = Within(lambda: when_waiting(lambda: waits.append(what), asks[what]))
    with pytest.raises(BusyError, match=rf"{what}\(\) inside generate\(\)"):
        generate(model, ids, patient, streamer=within)
    assert not waits
    assert torch.equal(answer(model, generate, patient, ids), answer(model, generate, None, ids))


@pytest.mark.parametrize(
    ("what", "of"),
    [("begin", TurnManager.begin), ("commit", TurnManager.commit), ("reset", TurnManager.start_over)],
)
def test_generate_waits_for_begin_commit_and_reset_on_another_thread(model, generate, tokens, patient, what, of):
    """Otherwise a call that waited for one turn would enter the next turn, which waited as well."""
    ids, pause = tokens(30), Pause()
    expected = answer(model, generate, None, ids)
    first_of = {
        "reset": patient.reset,
        "begin": lambda: patient.begin(model, ids),
        "commit": lambda: patient.commit(ids),
    }

    def hold():
        pause.inside.set()
        assert pause.go_on.wait(LONG_SECONDS)

    def first():
        if what == "commit":
            patient.begin(model, ids)
        with AtCall(of, hold):
            first_of[what]()

    thread = Elsewhere(first)
    thread.reaches(pause.inside)
    waited = []

    def go_on():
        waited.append(what)
        pause.go_on.set()

    second = Elsewhere(lambda: when_waiting(go_on, lambda: answer(model, generate, patient, ids)))
    found = second.result()
    pause.go_on.set()
    assert thread.result() is None
    assert waited
    assert torch.equal(found, expected)


@pytest.mark.parametrize("what", ["begin", "commit"])
def test_closing_the_cache_ends_a_wait_with_closed_error(model, generate, tokens, patient, what):
    ids, pause = tokens(30), Pause()
    asks = {"begin": lambda: patient.begin(model, ids), "commit": lambda: patient.commit(ids)}
    first = Elsewhere(lambda: answer_with(model, generate, patient, ids, pause))
    first.reaches(pause.inside)

    def close():
        patient.close()
        pause.go_on.set()

    assert isinstance(Elsewhere(lambda: when_waiting(close, asks[what])).result(), ClosedError)
    assert isinstance(first.result(), ClosedError)


@pytest.mark.parametrize(
    "wrong", [-1, -0.001, float("nan"), float("inf"), -float("inf"), 10**400, True, False, "1", None, 1j, [1.0]]
)
def test_invalid_wait_seconds_raises_configuration_error(store, wrong):
    with pytest.raises(ConfigurationError, match=r"wait_seconds=.* must be a number of seconds"):
        TieredCache(store, wait_seconds=wrong)


@pytest.mark.parametrize("seconds", [0, 3, 0.25, np.float64(2.5), threading.TIMEOUT_MAX])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, TieredCache.fork])
def test_copies_and_forks_inherit_wait_seconds(store, duplicate, seconds):
    with TieredCache(store, wait_seconds=seconds) as cache, duplicate(cache) as twin:
        assert cache.wait_seconds == twin.wait_seconds == seconds


def test_wait_seconds_is_zero_by_default(store):
    with TieredCache(store) as cache:
        assert cache.wait_seconds == 0


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads here")
def test_keyboard_interrupt_ends_a_wait(model, generate, tokens, patient):
    ids, pause, over, came = tokens(30), Pause(), threading.Event(), []
    main = threading.get_ident()

    def once(*_):
        if not came:
            came.append(True)
            raise KeyboardInterrupt

    def press():
        while not over.wait(0.01):  # a signal that comes just before the wait does not end it
            signal.pthread_kill(main, signal.SIGINT)

    first = Elsewhere(lambda: answer_with(model, generate, patient, ids, pause))
    first.reaches(pause.inside)
    before = signal.signal(signal.SIGINT, once)
    try:
        with pytest.raises(KeyboardInterrupt):
            when_waiting(lambda: Elsewhere(press), lambda: answer(model, generate, patient, ids))
    finally:
        over.set()
        pause.go_on.set()
        found = first.result()
        signal.signal(signal.SIGINT, before)
    assert torch.equal(found, answer(model, generate, None, ids))
    assert torch.equal(answer(model, generate, patient, ids), found)


def test_interrupt_at_any_line_frees_the_cache_and_wakes_waiting_calls(store):
    with TieredCache(store, wait_seconds=threading.TIMEOUT_MAX) as cache:
        others = []

        def call():
            return exclusive_use.exclusively(cache, "reset()", lambda: None)

        def hold():
            waiting = threading.Event()
            others.append(Elsewhere(lambda: when_waiting(waiting.set, call)))
            assert waiting.wait(LONG_SECONDS)

        at, came = 0, True
        while came:
            interrupt = InterruptAtLine(at, {exclusive_use.__file__})
            with contextlib.suppress(KeyboardInterrupt), interrupt:
                exclusive_use.exclusively(cache, "reset()", hold)
            came, at = interrupt.came, at + 1
            while others:  # first, because the next call would wake it
                assert others.pop().result() is None
            assert Elsewhere(call).result() is None
        assert at > 8


def test_signal_handler_may_use_another_cache(patient):
    """The handler runs on the thread that holds the lock."""
    with TieredCache(patient.store) as other:

        def leave():
            with AtCall(threading.Condition.notify_all, other.reset):
                patient.reset()

        assert Elsewhere(leave).result() is None


def in_a_child(what):
    """Return the error of ``what()`` in a forked child process, as text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(LONG_SECONDS))
        try:
            what()
            text = "nothing"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
class TestChildren:
    @pytest.mark.parametrize("what", ["reset", "begin", "commit", "generate"])
    def test_forked_child_raises_instead_of_waiting_for_its_parents_turn(self, model, generate, tokens, patient, what):
        ids, pause = tokens(30), Pause()
        asks = {
            "reset": patient.reset,
            "begin": lambda: patient.begin(model, ids),
            "commit": lambda: patient.commit(ids),
            "generate": lambda: generate(model, ids, patient),
        }
        first = Elsewhere(lambda: answer_with(model, generate, patient, ids, pause))
        first.reaches(pause.inside)
        found = in_a_child(lambda: when_waiting(lambda: os._exit(3), asks[what]))
        pause.go_on.set()
        assert found.startswith("BusyError")
        assert "forked" in found
        assert torch.equal(first.result(), answer(model, generate, None, ids))
        assert torch.equal(answer(model, generate, patient, ids), first.result())

    def test_forked_child_is_not_blocked_by_a_lock_of_a_parent_thread(self, patient):
        """A thread of the parent holds the lock when another thread forks."""
        locked, go_on = threading.Event(), threading.Event()

        def hold():
            locked.set()
            assert go_on.wait(LONG_SECONDS)

        def first():
            with AtCall(threading.Condition.notify_all, hold):
                patient.reset()

        thread = Elsewhere(first)
        assert locked.wait(LONG_SECONDS)
        with TieredCache(patient.store) as other:
            found = in_a_child(other.reset)
        go_on.set()
        assert found == "nothing"
        assert thread.result() is None

    def test_turn_that_forks_the_process_continues_in_parent_and_child(self, model, generate, tokens, patient):
        ids, sides = tokens(30), []
        expected = answer(model, generate, None, ids)

        def split():
            sides.append(os.fork())
            if sides[0] == 0:
                signal.alarm(int(LONG_SECONDS))
            with pytest.raises(BusyError, match="inside generate"):
                patient.reset()

        right = False
        try:
            found = answer_with(model, generate, patient, ids, Within(split))
            right = torch.equal(found, expected) and torch.equal(answer(model, generate, patient, ids), expected)
        finally:
            if sides[0] == 0:
                os._exit(0 if right else 1)
        assert os.waitpid(sides[0], 0)[1] == 0
        assert right


class Plain:
    """An object to use exclusively, with nothing except ``wait_seconds``."""

    wait_seconds = LONG_SECONDS


@given(st.lists(st.lists(st.sampled_from(["returns", "raises", "asks again"]), min_size=1, max_size=4), max_size=4))
def test_exclusive_use_admits_one_thread_at_a_time(threads):
    cache, inside, wrong, ended = Plain(), [], [], []
    gate = threading.Barrier(len(threads) or 1)

    def use(how):
        inside.append(how)
        if len(inside) > 1:
            wrong.append(list(inside))
        if how == "asks again":
            with contextlib.suppress(BusyError):
                exclusive_use.exclusively(cache, "reset()", lambda: wrong.append("came in"))
            if not exclusive_use.is_serving(cache):
                wrong.append("was put out")
        inside.pop()
        if how == "raises":
            raise RuntimeError
        return how

    def run(hows):
        gate.wait(LONG_SECONDS)
        for how in hows:
            try:
                ended.append(exclusive_use.exclusively(cache, exclusive_use.GENERATE, lambda how=how: use(how)))
            except RuntimeError:
                ended.append("raises")
            assert not exclusive_use.is_serving(cache)

    running = [Elsewhere(lambda hows=hows: run(hows)) for hows in threads]
    assert [thread.result() for thread in running] == [None] * len(threads)
    assert not wrong
    assert sorted(ended) == sorted(how for hows in threads for how in hows)
