"""Turns on the test device: every wait, fence and recorded stream is needed, and nothing on the hot path blocks.

Run it with ``KVTIER_DEVICE=test``.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import types
from collections import Counter
from concurrent.futures import Future
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier import PrefixStore, TieredCache
from kvtier.hf.layers import gather
from kvtier.hf.layers.attention import AttentionLayer
from kvtier.testing import Mutant, RaceError, Recorder, drops
from kvtier.transfer import accelerator
from kvtier.transfer.accelerator import StreamEngine
from tests.support.tiny import FedAlike, answer, assert_same_answer, left_padded, tiny

LAYERS = 4  # more than a load has stages
PAGE = 4
PROMPT = (1, 2, 3, 4, 5, 2, 1, 4, 3) * 2
HOT_PATH = ("/kvtier/hf/layers/", "/kvtier/kv/", "/kvtier/transfer/", "/kvtier/store/", "/kvtier/offload/")


def exact_turn(model, ids, cache):
    """The answer is that of a ``DynamicCache`` with the same K and V, to the bit, and that of an empty one, nearly."""
    settings = {"max_new_tokens": 1}
    with FedAlike(cache) as alike:
        found = answer(model, ids, cache, **settings)
    fed_alike = alike.cache(cache.last_turn.cached_tokens // len(ids), model)
    assert_same_answer(found, answer(model, ids, fed_alike, **settings), exact=True)
    assert_same_answer(found, answer(model, ids, **settings), exact=False)
    return found.sequences


def play(engine):
    """Commits, loads from the store into new and into held buffers, crops, and a fork; all turns are exact."""
    model, ids = tiny("llama", LAYERS), left_padded([PROMPT])
    with PrefixStore(block_size=PAGE) as store, TieredCache(store, engine=engine) as cache:
        longer = torch.cat([exact_turn(model, ids, cache), ids[:, :7]], 1)
        cache.crop(-9)
        edited = torch.cat([ids[:, :-6], ids[:, :6].flip(1)], 1)
        exact_turn(model, edited, cache)  # written over columns that are still being copied
        exact_turn(model, longer, cache)
        with cache.fork() as twin:
            exact_turn(model, longer[:, :-2], twin)
        run_late_tasks()
        with TieredCache(store, engine=engine) as other:
            exact_turn(model, longer[:, :6], other)
            exact_turn(model, longer, other)
            assert other.last_turn.cached_by_tier["host"] > PAGE


def early(engine_class):
    """Return the engine with host tasks that run at once, before the copies that were enqueued before them."""

    class Early(engine_class):
        def call(self, task, *, reads=(), writes=(), after=()):
            done = Future()
            try:
                for fence in after:
                    self.settle(fence)
                done.set_result(task())
            except Exception as error:
                done.set_exception(error)
            return done

    return Early


class Late(Future):
    """Runs its task when its result, or its error, is asked for."""

    def __init__(self, task):
        super().__init__()
        self._task = task

    def result(self, timeout=None):
        if not self.done():
            try:
                self.set_result(self._task())
            except Exception as error:
                self.set_exception(error)
        return super().result(timeout)

    def exception(self, timeout=None):
        with contextlib.suppress(Exception):
            self.result()
        return super().exception(timeout)


def late(engine_class):
    """Return the engine with host tasks, and copies after them, that run when something waits for them."""

    class LateTasks(engine_class):
        def copy_all(self, pairs, after=()):
            enqueue = partial(super().copy_all, pairs, after)
            if all(fence.done() for fence in after):
                return enqueue()
            return Late(lambda: ([fence.exception() for fence in after], enqueue().result())[1])

        def call(self, task, *, reads=(), writes=(), after=()):
            def run():
                for fence in after:
                    self.settle(fence)
                task()

            _late.append(Late(run))
            return _late[-1]

    return LateTasks


_late = []


def run_late_tasks():
    """Run them all: another thread that needs one would wait for ten seconds."""
    while _late:
        _late.pop(0).exception()


def finds_a_fault(machine, engine):
    """Whether a turn differs, fails or races with ``engine`` when copies run as late as permitted."""
    return any(fails(machine, partial(engine, tasks)) for tasks in (early, late))


def fails(machine, engine, seed=0, lazy=True):
    machine.restart(seed, lazy=lazy)
    try:
        play(engine)
        return bool(machine.races)
    except (AssertionError, RaceError, RuntimeError, OSError):
        return True
    finally:
        _late.clear()
        machine.restart()


def test_the_turns_are_exact_with_the_released_engine(machine):
    for seed in range(3):
        assert not fails(machine, StreamEngine, seed, lazy=seed == 0)
    assert machine.queued


def test_removing_any_wait_or_fence_of_loads_and_commits_is_found(machine, monkeypatch):
    monkeypatch.setattr(gather, "_STAGE_BYTES", 1)  # as few stages as possible: they are used again
    recorders = []

    def record(tasks, device):
        recorders.append(Recorder(tasks(StreamEngine)(device)))
        return recorders[-1]

    assert not finds_a_fault(machine, record)
    modules = ("staged_load.py", "gather.py")
    tried = [
        drop
        for drop in drops(*recorders)
        if drop.site.file.endswith(modules) and not drop.origin and drop.site.function != "close"
    ]
    assert {drop.what for drop in tried} >= {"wait", "after", "after[0]", "after[-1]"}
    missed = [drop for drop in tried if not finds_a_fault(machine, partial(mutant, drop))]
    assert not missed, "\n".join(map(str, missed))


def mutant(drop, tasks, device):
    return Mutant(tasks(StreamEngine)(device), drop)


# Lines of the engine that order copies, and what is left without them.
LINES = {
    "a copy waits for the kernels before it": ("stream.wait_event(before)", "pass"),
    "kernels wait for a copy": ("self._current().wait_event(event)", "pass"),
    "the host waits for a copy": ("event.synchronize()", "pass"),
    "a host task waits for the copies before it": (
        "self.settle(fence)\n            task()",
        "pass\n            task()",
    ),
    "memory is recorded with the stream that uses it": ("tensor.record_stream(stream)", "pass"),
    "a mark is a new event": ("marked.set_result(self._current().record_event())", "marked.set_result(None)"),
    "a copy has an event": ("return stream.record_event()", "return None"),
    "a copy is on a side stream": ("side.entry() as stream", "self._current() as stream"),
    "each entry is an object of its own": ("with side.entry() as stream", "with side.stream as stream"),
}


def without(line, replacement):
    """Return ``StreamEngine`` with one line of its module replaced."""
    source = inspect.getsource(accelerator)
    assert source.count(line) == 1
    module = types.ModuleType(accelerator.__name__)
    exec(compile(source.replace(line, replacement), accelerator.__file__, "exec"), module.__dict__)
    return module.StreamEngine


def check_engine(machine, engine_class):
    """Each line of ``LINES`` is needed for one of these."""
    device, size = torch.device(torch.get_default_device()), 2**14
    engine = engine_class(device)
    try:
        there = torch.ones(size, device=device)
        host = engine.host_empty(there.nbytes).view(torch.float32)
        ready = engine.mark()
        down = engine.copy(host, there, after=[ready])
        del there
        others = torch.full((size,), 2.0, device=device)
        seen = []
        engine.settle(engine.call(lambda: seen.append(host.clone()), after=[down]))
        assert (seen[0] == 1).all()
        up = engine.copy(others, host, after=[down, engine.mark()])
        engine.wait(up)
        assert (others == 1).all()
        others += 1
        engine.settle(engine.copy(host, others, after=[engine.mark()]))
        assert (host == 2).all()
    finally:
        engine.close()


@pytest.mark.parametrize("line", LINES)
def test_every_line_of_the_engine_that_orders_copies_is_needed(machine, line):
    machine.restart(lazy=True)
    check_engine(machine, StreamEngine)
    assert not machine.races
    try:
        check_engine(machine, without(*LINES[line]))
        found = bool(machine.races) or fails(machine, without(*LINES[line]))
    except (AssertionError, RuntimeError):
        found = True
    machine.restart()
    assert found


# --- the hot path -----------------------------------------------------------------------------------------------------


def blocking_in_a_turn(machine, monkeypatch, layers, new_tokens, rows=1):
    """Return kvtier's blocking copies, by file, in a turn that loads and commits; and those after the first update."""
    model, ids = tiny("llama", layers), left_padded([PROMPT] * rows)
    in_turn, update, engine = [], AttentionLayer.update, StreamEngine

    def noted(layer, *arguments, **settings):
        if not in_turn:
            in_turn.append(machine.blocking.copy())
        return update(layer, *arguments, **settings)

    with PrefixStore(block_size=PAGE) as store, TieredCache(store, engine=engine) as cache:
        ids = answer(model, ids, cache).sequences
        with TieredCache(store, engine=engine) as other, monkeypatch.context() as patched:
            patched.setattr(AttentionLayer, "update", noted)
            waits, queued = machine.streams.host_waits.copy(), machine.queued
            with machine.blocking_copies() as whole:
                answer(model, torch.cat([ids, ids[:, :3]], 1), other, max_new_tokens=new_tokens)
            after = machine.blocking - in_turn[0]
            assert other.last_turn.cached_by_tier["host"] > 0
            assert machine.queued - queued >= 2 * 2 * layers, "K and V of each layer came and went"
            assert not (machine.streams.host_waits - waits)["MainThread"], "the host waited for a copy"
    return ours(whole), ours(after)


def ours(counts):
    return Counter({name[name.rindex("/kvtier/") :]: n for name, n in counts.items() if "/kvtier/" in name})


def test_no_copy_blocks_between_begin_and_the_return_of_generate_but_the_reports(machine, monkeypatch):
    machine.restart(lazy=True)
    whole, after = blocking_in_a_turn(machine, monkeypatch, layers=2, new_tokens=3)
    assert after == {"/kvtier/hf/turn/turn.py": 1}, "the answer's tokens, to name them"
    assert not [name for name in whole if name.startswith(HOT_PATH)]
    assert blocking_in_a_turn(machine, monkeypatch, layers=6, new_tokens=9) == (whole, after)


@settings(max_examples=max(2, settings().max_examples // 6))
@given(seed=st.integers(0, 2**16))
def test_random_schedules_of_turns_are_exact(machine, seed):
    machine.restart(seed, lazy=random.Random(seed).random() < 0.3)
    play(StreamEngine)
    assert not machine.races
