"""Offloading on a simulated device that runs every order allowed by the fences: equal bits, and no race."""

from __future__ import annotations

import contextlib
import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier import PrefixStore, TieredCache
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.spec import LayerSpec
from kvtier.offload.accounting import MemoryBudget
from kvtier.offload.extents import HostExtent, Part
from kvtier.offload.host_memory import HostPool
from kvtier.offload.manager import OffloadManager
from kvtier.testing import Drop, Mutant, RaceError, Recorder, SimulatedEngine, drops
from tests.support import samples
from tests.support.tiny import CHUNKS, HEAD_DIM, FedAlike, answer, assert_same_answer, left_padded, tiny

LAYERS = 4
PAGE = 4
TOKEN_BYTES = 2 * HEAD_DIM * 4 * LAYERS
words = st.integers(1, 5)
modes = st.sampled_from([{}, CHUNKS, {"num_beams": 2}, {"do_sample": True, "top_k": 0, "num_return_sequences": 2}])


def budget(rows: int, columns: int, share: float) -> int:
    return int(share * rows * (columns + 2 * PAGE) * TOKEN_BYTES)


@settings(max_examples=max(1, settings().max_examples // 2))
@given(
    family=st.sampled_from(["llama", "gemma3"]),
    prompt=st.lists(words, min_size=9, max_size=20),
    more=st.lists(words, min_size=1, max_size=5),
    mode=modes,
    share=st.sampled_from([0.8, 1.0, 1.2]),
    host_bytes=st.sampled_from([2**30, 12_000, 4_000]),
    compression=st.sampled_from(["raw", "zstd"]),
    lazy=st.booleans(),
    removed=st.integers(0, 9),
    watched=st.sampled_from([True, False, False, False]),  # watching every kernel takes four times as long
    choices=st.randoms(use_true_random=False),
)
def test_every_transfer_schedule_gives_the_bits_of_dynamic_cache(
    family, prompt, more, mode, share, host_bytes, compression, lazy, removed, watched, choices, tmp_path_factory
):
    """A turn, a crop between turns, a continuation, and a restore into another cache."""
    model, rows = tiny(family, LAYERS), 2 if mode.get("num_beams") or mode.get("num_return_sequences") else 1
    engine = SimulatedEngine(choices, lazy=lazy)
    arguments = {
        "device_budget": budget(rows, len(prompt) + len(more) + 6, share),
        "host_budget": host_bytes,
        "spill_dir": tmp_path_factory.getbasetemp() / "spill",
        "page_compression": compression,
        "engine": lambda device: engine,
    }
    ids = left_padded([tuple(prompt)])
    watching = engine.watching() if watched else contextlib.nullcontext()
    with PrefixStore(block_size=PAGE) as store, TieredCache(store, **arguments) as cache, watching:
        first = answer(model, ids, cache, **mode)
        assert_same_answer(first, answer(model, ids, **mode), exact=True)
        if removed:
            cache.crop(-min(removed, cache.get_seq_length()))
        ids = torch.cat([first.sequences[:1], torch.tensor([more])], 1)
        check_turn(model, ids, cache)
        with TieredCache(store, **arguments) as other:
            check_turn(model, ids, other)
    assert engine.pending == 0


def check_turn(model, ids, cache):
    with FedAlike(cache) as alike:
        found = answer(model, ids, cache)
    fed_alike = answer(model, ids, alike.cache(cache.last_turn.cached_tokens, model))
    assert_same_answer(found, fed_alike, exact=True)
    assert 0 < cache.last_turn.peak_device_bytes <= cache._offload_config.arguments["device_budget"]
    assert cache.last_turn.peak_host_bytes <= cache._offload_config.arguments["host_budget"]


def arguments_of(engine, folder, host_bytes):
    return {
        "device_budget": budget(1, 40, 0.7),
        "host_budget": host_bytes,
        "spill_dir": folder,
        "engine": lambda device: engine,
    }


def play_turns(engine, folder, host_bytes):
    """Layers turn cold as tokens arrive, pages fill, a cache is copied, a store reads pages, and a crop follows."""
    model, ids = tiny("llama", LAYERS), left_padded([(1, 2, 3, 4, 5, 2, 1, 4, 3)])
    arguments = arguments_of(engine, folder, host_bytes)
    with PrefixStore(block_size=PAGE) as store, TieredCache(store, **arguments) as cache, engine.watching():
        found = answer(model, ids, cache, max_new_tokens=20)
        assert_same_answer(found, answer(model, ids, max_new_tokens=20), exact=True)
        assert cache.last_turn.cold_layers > 2
        more = torch.cat([found.sequences, ids[:, :2]], 1)
        with copy.deepcopy(cache) as twin, TieredCache(store) as other:
            check_turn(model, more, twin)
            assert_same_answer(answer(model, more, twin), answer(model, more), exact=False)
            assert_same_answer(answer(model, more, other), answer(model, more), exact=False)
        cache.crop(-6)
        check_turn(model, torch.cat([found.sequences[:, :24], ids], 1), cache)


def play_prompt(engine, folder, host_bytes):
    """A prompt in chunks that exceeds the budget from the start: kernels fill slots before any page is loaded."""
    model, ids = tiny("llama", LAYERS), left_padded([(1, 2, 3, 4, 5, 2, 1, 4, 3) * 4])
    arguments = arguments_of(engine, folder, host_bytes)
    with PrefixStore(block_size=PAGE) as store, TieredCache(store, **arguments) as cache, engine.watching():
        found = answer(model, ids, cache, prefill_chunk_size=18)
        assert_same_answer(found, answer(model, ids, prefill_chunk_size=18), exact=True)
        assert cache.last_turn.cold_layers > 2


def play_slab(engine, folder, host_bytes):
    """Two rings read the same pages at once, the pages are released, and their memory is reused."""
    host_pool = HostPool(engine.host_empty, MemoryBudget(None), slab_bytes=256)
    spec = LayerSpec(1, 2, 1, 2, torch.float32)
    with engine.watching():
        k = torch.arange(8.0).view(1, 1, 4, 2)
        run = HostExtent(engine, host_pool, host_pool.take(64), 1, 4, spec)
        down = run.fill(k, k, [engine.mark()])
        buffers = [KVBuffer(1, spec, 4, "cpu") for _ in range(2)]
        ready = engine.mark()
        fences = [run.lift(buffer, 0, Part(run, 0, 4, (0,)), [ready])[0] for buffer in buffers]
        del run
        other = HostExtent(engine, host_pool, host_pool.take(64), 1, 4, spec)
        other.fill(k + 1, k + 1, [engine.mark()])
        for fence in (*down, *fences):
            engine.wait(fence)
        assert all(torch.equal(buffer.k, k) for buffer in buffers)
        engine.settle(other.lift(buffers[0], 0, Part(other, 0, 4, (0,)), [engine.mark()])[0])
        assert torch.equal(buffers[0].k, k + 1)


# The first and last entries of ``after`` are the expressions from which it is built.
ORDERING = ("wait", "settle", "after", "after[0]", "after[-1]")
# These waits free the memory that the budget counts as free: see
# test_released_buffers_and_slots_have_no_pending_transfers.
FREES_MEMORY = ("turn_cold", "_give_up")
SCENES = [(play, host_bytes) for play in (play_turns, play_prompt) for host_bytes in (2**30, 2_000)]
SCENES.append((play_slab, 0))
_CPU_ONLY = pytest.mark.cpu_only("it simulates a device in the memory of the CPU")


@_CPU_ONLY
def test_removing_any_wait_or_fence_makes_a_scene_fail(tmp_path):
    """A scene fails by a race, by other bits, or by an error."""
    shown_by: dict[Drop, list[tuple[Any, int]]] = {}
    for play, host_bytes in SCENES:
        recorder = Recorder(SimulatedEngine(random.Random(0), lazy=True))
        play(recorder, tmp_path, host_bytes)
        for drop in drops(recorder):
            inside = "kvtier/offload" in drop.site.file
            if inside and drop.what in ORDERING and not drop.origin and drop.site.function not in FREES_MEMORY:
                shown_by.setdefault(drop, []).append((play, host_bytes))
    assert len(shown_by) > 10
    tried = samples.some(sorted(shown_by, key=str), len(shown_by) // 8, "dropped fences")
    survived = [drop for drop in tried if all(survives(drop, tmp_path, *scene) for scene in shown_by[drop])]
    assert not survived, "\n".join(map(str, survived))


def survives(drop: Drop, folder, play, host_bytes) -> bool:
    for seed, lazy in ((0, True), (1, False)):
        mutant = Mutant(SimulatedEngine(random.Random(seed), lazy=lazy), drop)
        try:
            play(mutant, folder, host_bytes)
        except (AssertionError, RaceError, RuntimeError, OSError):
            return False
    return True


@_CPU_ONLY
def test_released_buffers_and_slots_have_no_pending_transfers(tmp_path):
    """No pending transfer holds a buffer that turned cold, or a slot that was replaced."""
    engine = SimulatedEngine(random.Random(0), lazy=True)
    offload = OffloadManager(400 * PAGE, 2**20, tmp_path, PAGE, lambda: 3, lambda device: engine)
    device_memory = offload.device_memory(torch.device("cpu"))
    with engine.watching():
        k = torch.randn(1, 1, 3 * PAGE, 2)
        layer = offload.layer(0, k, k, None, True)
        device_memory.keep_hot(layer, 0)
        layer.append(0, k, k, 0)
        layer.turn_cold()
        assert engine.pending == 0, "a window is still being copied"
        device_memory.ring.prefetch(1)
        assert engine.pending > 0
        layer.append(3 * PAGE, k[:, :, :1].repeat(1, 1, 5 * PAGE, 1), k[:, :, :1].repeat(1, 1, 5 * PAGE, 1), 0)
        at_once = engine.pending
        assert at_once == len(layer.wanted_next().pages) - 1, "pages went down, and nothing else is on its way"
    offload.close()
