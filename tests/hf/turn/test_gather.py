"""Commits beside an accelerator: pages go to the host beside the computation, and are read only when they arrived."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier import PrefixStore, TieredCache
from kvtier.errors import UnavailableError
from kvtier.hf.layers import gather as module
from kvtier.hf.layers.gather import Gather
from kvtier.hf.layers.row_pages import RowPages
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.spec import LayerSpec
from kvtier.testing import Mutant, RaceError, Recorder, SimulatedEngine, drops
from kvtier.transfer.base import InlineEngine
from tests.support import samples
from tests.support.places import StandIn
from tests.support.stores import block_files
from tests.support.tiny import answer, assert_same_answer, left_padded, tiny
from tests.support.upstream import CACHE

LAYERS = 5
PAGE = 4
_SPEC = LayerSpec(8, 16, 8, 16, torch.bfloat16)
words = st.integers(1, 5)
rows = st.lists(st.lists(words, min_size=3, max_size=22).map(tuple), min_size=1, max_size=3)
modes = st.sampled_from([{}, {"num_beams": 2}, {"do_sample": True, "top_k": 0, "num_return_sequences": 2}])


def held_blocks(store):
    """K and V of all blocks of a store in RAM, by their keys."""
    blocks = {}
    for entry in store._tiers.host.entries():
        block = store._tiers.host.block(entry.key)
        block.arrive()
        blocks[entry.key] = torch.cat([part.reshape(-1) for page in block.pages for part in (page.k_htd, page.v_htd)])
    return blocks


def assert_same_blocks(store, other):
    ours, theirs = held_blocks(store), held_blocks(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@settings(max_examples=max(1, settings().max_examples // 3))
@given(
    family=st.sampled_from(["llama", "gemma3"]),
    prompts=rows,
    more=st.lists(words, min_size=1, max_size=5),
    mode=modes,
    lazy=st.booleans(),
    removed=st.integers(0, 9),
    watched=st.sampled_from([True, False, False, False]),
    choices=st.randoms(use_true_random=False),
)
def test_blocks_of_every_order_equal_blocks_that_are_copied_at_once(
    family, prompts, more, mode, lazy, removed, watched, choices
):
    """Also where the next turn crops the buffers, and writes over columns that are still being copied."""
    model, ids = tiny(family, LAYERS), left_padded(prompts)
    engine = SimulatedEngine(choices, lazy=lazy)
    watching = engine.watching() if watched else contextlib.nullcontext()
    with (
        PrefixStore(block_size=PAGE) as store,
        PrefixStore(block_size=PAGE) as other,
        TieredCache(store, engine=lambda device: engine) as cache,
        TieredCache(other) as plain,
        watching,
    ):
        for ask in (lambda c: answer(model, ids, c, **mode), lambda c: answer(model, ids, c)):
            found, expected = ask(cache), ask(plain)
            assert_same_answer(found, expected, exact=True)
            for each in (cache, plain):
                each.crop(-min(removed, each.get_seq_length()))
        ids = torch.cat([found.sequences, torch.tensor([more] * len(ids))], 1)
        assert_same_answer(answer(model, ids, cache), answer(model, ids, plain), exact=True)
        with cache.fork() as twin:
            answer(model, ids[:, :-1], twin)
            answer(model, ids[:, :-1], plain)
        cache.flush()
        assert_same_blocks(store, other)


@contextlib.contextmanager
def two_caches(engine):
    """One that copies with ``engine`` and one that copies at once; their blocks must be the same at the end."""
    with (
        PrefixStore(block_size=PAGE) as store,
        PrefixStore(block_size=PAGE) as other,
        TieredCache(store, engine=lambda device: engine) as cache,
        TieredCache(other) as plain,
        engine.watching(),
    ):
        yield cache, plain
        cache.flush()
        assert_same_blocks(store, other)


def play_crops(engine):
    """Three turns: the second one crops and writes over committed columns, the third one moves rows."""
    model, ids = tiny("llama", LAYERS), left_padded([(1, 2, 3, 4, 5, 2, 1, 4, 3) * 2])
    with two_caches(engine) as caches:
        for each in caches:
            answer(model, ids, each)
            each.crop(-9)
            answer(model, ids.flip(1), each)
            each.crop(-7)
            with torch.no_grad():
                model(ids[:, :3], **{CACHE: each})  # tokens outside of a turn
            answer(model, ids, each, num_beams=2)
            each.reorder_cache(torch.tensor([1, 0]))


def play_windows(engine):
    """Two turns with prompts and answers longer than the windows of sliding layers."""
    model, ids = tiny("gemma3", 3), left_padded([(1, 2, 3, 4, 5, 2, 1, 4, 3) * 2])
    with two_caches(engine) as caches:
        for each in caches:
            answer(model, ids, each, max_new_tokens=10)
            answer(model, torch.cat([ids, ids[:, :12].flip(1)], 1), each)


@pytest.mark.parametrize("play", [play_crops, play_windows])
def test_removing_any_fence_of_a_commit_makes_it_fail(monkeypatch, play):
    monkeypatch.setattr(module, "_STAGE_BYTES", 1)  # as few stages as possible: they are used again
    recorder = Recorder(SimulatedEngine(random.Random(0), lazy=True))
    play(recorder)
    files = ("gather", "dropped")
    tried = [drop for drop in drops(recorder) if any(file in drop.site.file for file in files) and not drop.origin]
    if play is play_crops:
        assert {drop.what for drop in tried} >= {"wait", "settle", "after", "after[0]", "after[-1]"}
    else:
        assert "dropped" in "".join(drop.site.file for drop in tried)
    tried = samples.some(sorted(tried, key=str), len(tried) // 6, f"dropped fences of {play.__name__}")
    survived = [drop for drop in tried if survives(drop, play)]
    assert not survived, "\n".join(map(str, survived))


def survives(drop, play):
    for seed, lazy in ((0, True), (1, False)):
        try:
            play(Mutant(SimulatedEngine(random.Random(seed), lazy=lazy), drop))
        except (AssertionError, RaceError, RuntimeError, OSError):
            return False
    return True


def test_commit_of_many_blocks_takes_two_copies_a_layer_and_blocks_nothing(monkeypatch):
    """8,192 tokens in blocks of 256, with the heads of an 8B model and short ones."""
    engine, layers, tokens, block = Recorder(SimulatedEngine(lazy=True)), 6, 8192, 256
    buffers = [KVBuffer(1, _SPEC, tokens, "cpu") for _ in range(layers)]
    for buffer in buffers:
        buffer.k.copy_(torch.randn(buffer.k.shape))
        buffer.v.copy_(torch.randn(buffer.v.shape))
    copies = []
    copy_all = engine.copy_all

    def counted(pairs, after=()):
        copies.append(len(pairs))
        return copy_all(pairs, after)

    engine.copy_all = counted
    gather = Gather(engine, buffers)
    row = RowPages(buffers, (), None, row=0, prompt_row=0, pad=0, gather=gather)
    read = [row.read(start, start + block) for start in range(0, tokens, block)]
    gather.launch()
    assert copies == [2] * layers
    assert not [drop for drop in engine.seen if drop.what in ("settle", "wait")]
    gather.settle()
    assert gather.is_done is False, "kernels must not write yet"
    gather.before_writing()
    assert gather.is_done
    for start, pages in zip(range(0, tokens, block), read, strict=True):
        for page, buffer in zip(pages, buffers, strict=True):
            assert torch.equal(page.k_htd, buffer.k[0, :, start : start + block])
            assert torch.equal(page.v_htd, buffer.v[0, :, start : start + block])


def test_generate_neither_waits_for_a_commit_nor_copies_in_blocking_ways(monkeypatch):
    """Between the begin and the end of two turns, the host waits for no copy to or from the device."""
    recorder = Recorder(SimulatedEngine(random.Random(0), lazy=True))
    model, ids = tiny("llama", LAYERS), left_padded([(1, 2, 3, 4, 5, 2, 1, 4, 3) * 2])
    blocking = []
    monkeypatch.setattr(KVBuffer, "page", lambda *_: blocking.append("page"))
    with PrefixStore(block_size=PAGE) as store, TieredCache(store, engine=lambda device: recorder) as cache:
        ids = answer(model, ids, cache).sequences
        answer(model, torch.cat([ids, ids[:, :3]], 1), cache)
        assert not [drop for drop in recorder.seen if drop.what == "settle"]
        assert not blocking
        assert recorder.pending > 0, "the copies of the second commit"


def test_committed_blocks_reach_disk_and_other_caches(tmp_path):
    model, ids = tiny("llama", LAYERS), left_padded([(1, 2, 3, 4, 5, 2, 1, 4, 3) * 2])
    with PrefixStore(tmp_path, block_size=PAGE) as store:
        with TieredCache(store, engine=lambda device: StandIn()) as cache:
            first = answer(model, ids, cache)
        with TieredCache(store, engine=lambda device: StandIn()) as other:
            assert_same_answer(answer(model, ids, other), first, exact=False)
            assert other.last_turn.cached_by_tier["host"] == ids.shape[1] - 1
    assert len(block_files(tmp_path)) == 5
    with PrefixStore(tmp_path, block_size=PAGE) as store, TieredCache(store) as cache:
        assert_same_answer(answer(model, ids, cache), first, exact=False)
        assert cache.last_turn.cached_by_tier["disk"] == ids.shape[1] - 1
        assert store.verify().ok


def test_no_room_in_ram_writes_a_block_at_once(tmp_path):
    """The write waits for the pages, which are not launched yet."""
    model, ids = tiny("llama", LAYERS), left_padded([(1, 2, 3, 4, 5, 2, 1, 4, 3) * 2])
    with (
        PrefixStore(tmp_path, block_size=PAGE, host_budget=1) as store,
        TieredCache(store, engine=lambda device: InlineEngine()) as cache,
    ):
        answer(model, ids, cache)
    with PrefixStore(tmp_path, block_size=PAGE) as store, TieredCache(store) as cache:
        answer(model, ids, cache)
        assert cache.last_turn.cached_by_tier["disk"] == ids.shape[1] - 1


def failing(step, ordinal):
    if step == "copy":
        raise RuntimeError("the device failed")


def test_pages_that_do_not_arrive_are_a_miss(monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_WAIT_SECONDS", 0.05)
    model, ids = tiny("llama", LAYERS), left_padded([(1, 2, 3, 4, 5, 2, 1, 4, 3) * 2])
    engine = SimulatedEngine(random.Random(0), fail=failing)
    with PrefixStore(block_size=PAGE) as store:
        with TieredCache(store, engine=lambda device: engine) as cache:
            first = answer(model, ids, cache)
            assert_same_answer(answer(model, ids, cache), first, exact=False)  # the next turn on the device goes on
        with TieredCache(store) as other:
            assert_same_answer(answer(model, ids, other), first, exact=False)
            assert other.last_turn.cached_tokens == 0


def test_a_waiter_on_another_thread_or_in_a_forked_process_waits_a_bounded_time(monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_WAIT_SECONDS", 0.05)
    gather, errors = Gather(SimulatedEngine(lazy=True), [KVBuffer(1, _SPEC, 8, "cpu")]), []

    def wait():
        try:
            gather.wait()
        except UnavailableError as error:
            errors.append(error)

    gather.read(0, 0, 4, {0}, {})
    gather.launch()
    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(30)
    assert len(errors) == 1
    pid = os.fork()
    if pid == 0:
        wait()
        os._exit(0 if len(errors) == 2 else 1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("pages", [0, 1])
def test_a_gather_is_done_when_nothing_is_left(pages):
    gather = Gather(InlineEngine(), [KVBuffer(1, _SPEC, 8, "cpu"), None])
    for _ in range(pages):
        page, nothing = gather.read(0, 0, 4, {0, 1}, {})
        assert page.k_htd.shape[1] == 4
        assert nothing.nbytes == 0
    gather.launch()
    gather.before_writing()
    assert gather.is_done
    gather.wait()


def test_small_ram_makes_pages_arrive_while_the_commit_goes_on(tmp_path):
    """RAM has room for one block, whose write waits for its pages: the next block must not wait for that in vain."""
    model, ids = tiny("llama", LAYERS), left_padded([(1, 2, 3, 4, 5, 2, 1, 4, 3) * 2])
    engine = SimulatedEngine(random.Random(0), lazy=True)
    with PrefixStore(block_size=PAGE) as plain_store, TieredCache(plain_store) as plain:
        answer(model, ids, plain)
        one_block = max(entry.nbytes for entry in plain_store._tiers.host.entries())
    with PrefixStore(tmp_path, block_size=PAGE, host_budget=one_block + 1) as store:
        with TieredCache(store, engine=lambda device: engine) as cache:
            answer(model, ids, cache)
            cache.flush()
        with TieredCache(store) as other:
            answer(model, ids, other)
            assert other.last_turn.cached_tokens == ids.shape[1] - 1


def test_stored_blocks_keep_no_buffer_alive():
    model, ids = tiny("llama", LAYERS), left_padded([(1, 2, 3, 4, 5, 2, 1, 4, 3) * 2])
    with PrefixStore(block_size=PAGE) as store, TieredCache(store, engine=lambda device: StandIn()) as cache:
        answer(model, ids, cache)
        buffers = [weakref.ref(layer.memory) for layer in cache.layers]
        cache.reset()
        cache.flush()
        gc.collect()
        assert [buffer() for buffer in buffers] == [None] * LAYERS
        assert list(store._tiers.host.entries())
