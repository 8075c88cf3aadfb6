"""Loads beside an accelerator: pages arrive on a side stream while earlier layers compute, and the bits are the same.

The simulated engine treats the memory of the CPU as a device's, and lets operations run in every order that the fences
allow.
"""

from __future__ import annotations

import contextlib
import random
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier import PrefixStore, TieredCache
from kvtier.hf.generate.request import read_loop_request
from kvtier.hf.layers.attention import AttentionLayer
from kvtier.hf.layers.loads.staged_load import StagedPrefixLoad
from kvtier.testing import Drop, Mutant, RaceError, Recorder, SimulatedEngine, drops
from kvtier.transfer.base import InlineEngine
from tests.support.places import StandIn
from tests.support.stores import block_files, damage
from tests.support.tiny import FedAlike, answer, assert_same_answer, left_padded, tiny
from tests.support.upstream import CACHE

LAYERS = 5  # more than there are stages of host memory
PAGE = 4
words = st.integers(1, 5)
rows = st.lists(st.lists(words, min_size=6, max_size=22).map(tuple), min_size=1, max_size=3)
modes = st.sampled_from([{}, {}, {"num_beams": 2}, {"do_sample": True, "top_k": 0, "num_return_sequences": 2}])


def check_turn(model, ids, cache, **settings):
    """The answer is that of a ``DynamicCache`` that was fed the same way."""
    with FedAlike(cache) as alike:
        found = answer(model, ids, cache, **settings)
    if not settings:
        fed_alike = alike.cache(cache.last_turn.cached_tokens if len(ids) == 1 else 0, model)
        assert_same_answer(found, answer(model, ids, fed_alike), exact=len(ids) == 1)
    assert_same_answer(found, answer(model, ids, **settings), exact=False)
    return found


@settings(max_examples=max(1, settings().max_examples // 3))
@given(
    family=st.sampled_from(["llama", "gemma3"]),
    prompts=rows,
    more=st.lists(words, min_size=1, max_size=5),
    cut=st.integers(0, 12),
    mode=modes,
    lazy=st.booleans(),
    watched=st.sampled_from([True, False, False, False]),
    choices=st.randoms(use_true_random=False),
)
def test_every_order_of_a_load_gives_the_bits_of_dynamic_cache(
    family, prompts, more, cut, mode, lazy, watched, choices
):
    """From the store alone, in place behind held tokens, with padding, beams and samples."""
    model, ids = tiny(family, LAYERS), left_padded(prompts)
    engine = SimulatedEngine(choices, lazy=lazy)
    watching = engine.watching() if watched else contextlib.nullcontext()
    with PrefixStore(block_size=PAGE) as store, TieredCache(store) as plain:
        first = answer(model, ids, plain)
        longer = torch.cat([first.sequences, torch.tensor([more] * len(ids))], 1)
        answer(model, longer, plain)
        with TieredCache(store, engine=lambda device: engine) as cache, watching:
            check_turn(model, ids, cache, **mode)
            check_turn(model, longer[:, : longer.shape[1] - cut], cache, **mode)
            cache.crop(-min(cut, cache.get_seq_length()))
            check_turn(model, longer, cache)
            with cache.fork() as twin:
                check_turn(model, longer, twin)
                check_turn(model, longer, cache)
    assert engine.pending == 0


def played(engine):
    """A model, a long prompt that the store knows, and a cache over it."""
    model, ids = tiny("llama", LAYERS), left_padded([(1, 2, 3, 4, 5, 2, 1, 4, 3) * 3])
    store = PrefixStore(block_size=PAGE)
    with TieredCache(store) as plain:
        answer(model, ids, plain)
    return model, ids, store, TieredCache(store, engine=lambda device: engine)


def play_restore(engine):
    model, ids, store, cache = played(engine)
    with store, cache, engine.watching():
        check_turn(model, ids, cache)
        assert cache.last_turn.cached_by_tier["host"] == ids.shape[1] - 1


def play_in_place(engine):
    """Kernels of the turn before still use the buffers that pages are loaded into."""
    model, ids, store, cache = played(engine)
    with store, cache, engine.watching():
        answer(model, ids[:, :9], cache)
        check_turn(model, ids, cache)
        assert cache.last_turn.cached_by_tier["host"] > 10
        assert cache.last_turn.cached_by_tier["device"] > 5


def play_loop(engine):
    """A custom loop waits for all pages before the first forward pass."""
    model, ids, store, cache = played(engine)
    with store, cache, engine.watching(), torch.no_grad(), FedAlike(cache) as alike:
        cache.begin(model, ids)
        known = cache.get_seq_length()
        logits = model(ids[:, known:], **{CACHE: cache}).logits[:, -1]
        fed_alike = alike.cache(known, model)
        assert torch.equal(logits, model(ids[:, known:], **{CACHE: fed_alike}).logits[:, -1])


SCENES = (play_restore, play_in_place, play_loop)


def test_removing_any_wait_or_fence_of_a_load_makes_a_scene_fail():
    shown_by: dict[Drop, list] = {}
    for play in SCENES:
        recorder = Recorder(SimulatedEngine(random.Random(0), lazy=True))
        play(recorder)
        for drop in drops(recorder):
            if "staged_load" in drop.site.file and not drop.origin and drop.site.function != "close":
                shown_by.setdefault(drop, []).append(play)
    assert {drop.what for drop in shown_by} >= {"wait", "settle", "after", "after[0]", "after[-1]"}
    survived = [drop for drop, scenes in shown_by.items() if all(survives(drop, play) for play in scenes)]
    assert not survived, "\n".join(map(str, survived))


def survives(drop, play):
    for seed, lazy in ((0, True), (1, False)):
        try:
            play(Mutant(SimulatedEngine(random.Random(seed), lazy=lazy), drop))
        except (AssertionError, RaceError, RuntimeError, OSError):
            return False
    return True


def test_later_layers_arrive_while_earlier_layers_compute(monkeypatch):
    """The update of a layer makes only its own pages come; nothing in a turn blocks the host until a copy has ended."""
    recorder = Recorder(SimulatedEngine(random.Random(0), lazy=True))
    model, ids, store, cache = played(recorder)
    pending, update = [], AttentionLayer.update

    def noted(layer, *arguments, **settings):
        states = update(layer, *arguments, **settings)
        pending.append(recorder.pending)
        return states

    monkeypatch.setattr(AttentionLayer, "update", noted)
    with store, cache:
        answer(model, ids, cache)
    assert pending[: LAYERS + 1] == [8, 6, 4, 2, 0, 0], "a read and a copy for each layer"
    blocking = [drop for drop in recorder.seen if drop.what == "settle"]
    assert not blocking, "\n".join(map(str, blocking))


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_a_damaged_page_in_mid_load_is_computed_again(tmp_path, how):
    model, ids = tiny("llama", LAYERS), left_padded([(1, 2, 3, 4, 5, 2, 1, 4, 3) * 3])
    with PrefixStore(tmp_path, block_size=PAGE, host_budget=1) as store:
        with TieredCache(store) as plain:
            answer(model, ids, plain)
        store.flush()
        with TieredCache(store, engine=lambda device: StandIn()) as cache:
            damage(block_files(tmp_path)[0], how)
            found = answer(model, ids, cache)
            assert_same_answer(found, answer(model, ids), exact=False)
            assert cache.last_turn.cached_tokens < ids.shape[1] - 1


def test_closing_a_load_waits_for_the_page_that_is_being_read(monkeypatch):
    """Afterwards nothing reads files or writes to buffers."""
    reading, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    read = StagedPrefixLoad._read

    def slow(load, layer, stage):
        reading.set()
        go_on.wait(30)
        read(load, layer, stage)

    monkeypatch.setattr(StagedPrefixLoad, "_read", slow)
    model, ids, store, cache = played(StandIn())
    with store, cache:
        cache.turns.begin(model, read_loop_request(model, ids, None, cache.turns.resident()))
        assert reading.wait(30)
        closing = threading.Thread(target=lambda: (cache.turns.turn.prefix.close(), closed.set()))
        closing.start()
        assert not closed.wait(0.2)
        go_on.set()
        closing.join(30)
        assert closed.is_set()


def test_a_batch_without_the_expected_copies_gets_its_own_rows():
    """The buffers were made for two samples of each row, and the model is fed one."""
    model, ids = tiny("llama", LAYERS), left_padded([(1, 2, 3, 4, 5, 2, 1, 4, 3), (5, 4, 3, 3, 1, 1, 2, 5, 4)])
    with PrefixStore(block_size=PAGE) as store, TieredCache(store) as plain:
        answer(model, ids, plain)
        with TieredCache(store, engine=lambda device: InlineEngine()) as cache, torch.no_grad():
            request = replace(read_loop_request(model, ids, None, cache.turns.resident()), repeats=2)
            known = cache.turns.begin(model, request).cached_tokens // len(ids)
            with FedAlike(cache) as alike:
                logits = model(ids[:, known:], **{CACHE: cache}).logits
            fed_alike = alike.cache(known, model)
            assert known > PAGE
            assert torch.equal(logits, model(ids[:, known:], **{CACHE: fed_alike}).logits)
            assert_same_rows(fed_alike, plain, known)


def assert_same_rows(cache, other, columns):
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(ours.keys[:, :, :columns], theirs.keys[:, :, :columns])
        assert torch.equal(ours.values[:, :, :columns], theirs.values[:, :, :columns])
