"""Offloading on an accelerator gives the bits of ``DynamicCache`` and keeps its budget.

On the test device they run with fewer tokens.
"""

from __future__ import annotations

import random

import pytest
import torch
from transformers import DynamicCache

from kvtier import PrefixStore, TieredCache
from kvtier.cli.doctor.scripts import (
    LAYERS,
    ScriptedTurn,
    budgets,
    first_difference,
    longest_sequence,
    random_script,
    run_plain,
    run_tiered,
    tiny_model,
)
from kvtier.cli.doctor.selftest import busy
from kvtier.hf.compat.names import CHUNKS_CONTINUE
from kvtier.transfer.accelerator import StreamEngine
from tests.support.places import Place

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
# Allocators round each tensor up, some to whole MiB. Each layer has K and V in a buffer or tail, beside two slots and
# the K and V that are fed.
ALLOWANCE_BYTES = (4 * LAYERS + 4) * 2**20


def conversation(seed=0, prompt=120, new_tokens=16, chunk=None):
    """Two turns: a long prompt, then a short one."""
    chance = random.Random(seed)
    first = tuple(chance.randrange(16, 256) for _ in range(prompt))
    second = (1, *(chance.randrange(16, 256) for _ in range(9)))
    return [
        ScriptedTurn(cut=0, crop=0, prompt=(first,), chunk=chunk, new_tokens=new_tokens),
        ScriptedTurn(cut=0, crop=0, prompt=(second,), chunk=None, new_tokens=new_tokens),
    ]


def new_tokens(place):
    """Fewer tokens suffice on the test device: its copies are late more often."""
    return 16 if place.real else 4


def compare(place: Place, model, script, tmp_path, *, page_tokens=8, **settings):
    """Run ``script`` on both caches. Return the first difference, and the report of the last turn."""
    with (
        PrefixStore(block_size=page_tokens) as store,
        TieredCache(store, config=model.config, spill_dir=tmp_path, engine=place.engine, **settings) as cache,
    ):
        ours = run_tiered(model, script, cache)
        report = cache.last_turn
    theirs = run_plain(model, script, [answer.known for answer in ours])
    return first_difference(ours, theirs), report


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.sample(3)  # of 8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [None, 17])
def test_output_is_exact_for_every_budget_from_all_cold_to_all_hot(place, tmp_path, dtype, chunk):
    model, script = tiny_model(place.device, dtype), conversation(new_tokens=new_tokens(place), chunk=chunk)
    cold = []
    for budget in budgets(model, longest_sequence(script), 8, steps=LAYERS + 1):
        difference, report = compare(place, model, script, tmp_path, device_budget=budget)
        assert difference is None
        assert report.peak_device_bytes <= budget
        assert report.hot_layers + report.cold_layers == LAYERS
        cold.append(report.cold_layers)
    assert cold == sorted(cold, reverse=True)
    assert cold[0] == LAYERS
    assert chunk is None or LAYERS - 1 in cold  # one layer hot
    assert cold[-1] == 0


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_offloading_is_exact_for_model_families_and_attention_kernels(
    place, make_model, generate, tokens, tmp_path, kind, attention
):
    model = make_model(kind, attention=attention).to(place.device)
    ids = tokens(120, rows=2).to(place.device)
    reference = DynamicCache(config=model.config)
    with (
        PrefixStore(block_size=8) as store,
        TieredCache(store, device_budget=170_000, spill_dir=tmp_path, engine=place.engine) as cache,
    ):
        for turn in range(2):
            chunked = {"prefill_chunk_size": 24} if CHUNKS_CONTINUE else {}
            ours = generate(model, ids, cache, **chunked)
            theirs = generate(model, ids, reference, **chunked)
            assert cache.last_turn.cold_layers
            assert torch.equal(ours.sequences, theirs.sequences)
            if attention == "eager":  # other kernels may be chosen by the memory layout of K and V
                assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
            ids = torch.cat([ours.sequences, tokens(5, rows=2, seed=turn + 1).to(place.device)], 1)


def test_offloading_is_exact_for_a_long_answer_with_small_pages(place, tmp_path):
    """Every step fetches all pages of every layer, and every fourth step writes a page to the host."""
    steps = 150 if place.real else 6
    model, script = tiny_model(place.device, torch.float32), conversation(prompt=40, new_tokens=steps)
    least, *_ = budgets(model, longest_sequence(script), 4)
    difference, report = compare(place, model, script, tmp_path, page_tokens=4, device_budget=least)
    assert difference is None
    assert report.cold_layers == LAYERS
    assert report.waits >= steps * LAYERS


@pytest.mark.sample(1)  # of 2
def test_offloading_is_exact_under_random_load(place, tmp_path):
    """Random turns, budgets, pages and batches, while another thread keeps the device and its links busy."""
    model, wrong = tiny_model(place.device, torch.float32), {}
    with busy(place.engine(place.device), place.device):
        for seed in range(100 if place.real else 2):
            chance = random.Random(seed)
            rows, page_tokens = chance.choice((1, 1, 3)), chance.choice((2, 4, 8))
            script = random_script(chance, 200, rows)
            least, *_, most = budgets(model, longest_sequence(script), page_tokens, rows)
            budget, host_budget = chance.randint(least, most), chance.choice((None, 2**18))
            settings = {"device_budget": budget, "host_budget": host_budget}
            difference, _ = compare(place, model, script, tmp_path, page_tokens=page_tokens, **settings)
            if difference is not None:
                wrong[seed] = difference
    assert wrong == {}


def test_offloading_is_exact_on_a_non_default_stream(place, tmp_path):
    """Copies are ordered against the current stream, which may differ from the default stream."""
    model, script = tiny_model(place.device, torch.float32), conversation()
    least, *_ = budgets(model, longest_sequence(script), 8)
    place.synchronize()
    with place.other_stream():
        difference, report = compare(place, model, script, tmp_path, device_budget=least)
        place.synchronize()
    assert difference is None
    assert report.cold_layers == LAYERS


def test_offloading_is_exact_when_the_current_stream_changes_between_turns(place, tmp_path):
    model, script = tiny_model(place.device, torch.float32), conversation()
    least, *_ = budgets(model, longest_sequence(script), 8)
    with (
        PrefixStore(block_size=8) as store,
        TieredCache(store, config=model.config, device_budget=least, spill_dir=tmp_path, engine=place.engine) as cache,
    ):
        ours = []
        for turn in script:
            place.synchronize()
            with place.other_stream():
                ours += run_tiered(model, [turn], cache) if not ours else continue_tiered(model, turn, cache, ours)
            place.synchronize()
    assert first_difference(ours, run_plain(model, script, [answer.known for answer in ours])) is None


def continue_tiered(model, turn, cache, before):
    """Run one more turn after the turns in ``before``."""
    prompt = (*before[-1].sequences[0].tolist(), *turn.prompt[0])
    whole = ScriptedTurn(cut=0, crop=0, prompt=(prompt,), chunk=turn.chunk, new_tokens=turn.new_tokens)
    return run_tiered(model, [whole], cache)


# --- tiers ------------------------------------------------------------------------------------------------------------


def test_pages_beyond_the_host_budget_go_to_files(place, tmp_path):
    model, script = tiny_model(place.device, torch.float32), conversation(prompt=200)
    least, *_ = budgets(model, longest_sequence(script), 8)
    host_budget = 2**18
    difference, report = compare(place, model, script, tmp_path, device_budget=least, host_budget=host_budget)
    assert difference is None
    assert 0 < report.peak_host_bytes <= host_budget
    pages = LAYERS * longest_sequence(script) * 512  # K and V of a token in a layer
    assert pages > host_budget
    assert list(tmp_path.iterdir()) == []


def synthetic(place: Place, cache: TieredCache, tokens: int, chunk: int, seed: int) -> list[tuple[torch.Tensor, ...]]:
    """Feed random K and V, ``[1, 4, tokens, 128]`` per layer, to ``cache``; return the expected contents of each layer.

    No model runs in between: all device memory goes to the cache.
    """
    chance = torch.Generator().manual_seed(seed)
    whole = [
        tuple(torch.randn(1, 4, tokens, 128, generator=chance, device="cpu") for _ in range(2)) for _ in range(LAYERS)
    ]
    for first in range(0, tokens, chunk):
        for layer, (k, v) in enumerate(whole):
            new = [part[:, :, first : first + chunk].to(place.device) for part in (k, v)]
            seen_k, seen_v = cache.update(*new, layer)
            assert torch.equal(seen_k.cpu(), k[:, :, : first + chunk])
            assert torch.equal(seen_v.cpu(), v[:, :, : first + chunk])
            del new, seen_k, seen_v
    return whole


@pytest.mark.parametrize("part", [0.4, 0.6, 1.5])
def test_device_memory_stays_within_the_budget(place, tmp_path, part):
    tokens, chunk = (16_384, 512) if place.real else (1024, 256)  # what allocators round up is small beside the budget
    all_bytes = LAYERS * tokens * 4096
    budget = int(part * all_bytes)
    model = tiny_model(place.device, torch.float32)
    ids = torch.randint(16, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    with (
        PrefixStore(block_size=16) as store,
        TieredCache(store, config=model.config, device_budget=budget, spill_dir=tmp_path, engine=place.engine) as cache,
    ):
        cache.begin(model, ids)
        with place.peak() as grown:
            synthetic(place, cache, tokens, chunk, seed=0)
        report = cache.commit(ids)
    assert report.peak_device_bytes <= budget
    assert (report.cold_layers > 0) == (part < 1)
    new_bytes = chunk * 4096  # the last chunk fed, which does not belong to the cache
    assert all(nbytes <= budget + new_bytes + ALLOWANCE_BYTES for nbytes in grown)


def test_host_memory_is_reused_across_rounds(place, tmp_path):
    """Each of 12 rounds writes some 25 MB to the host.

    Without reuse, the total would be four slabs larger than after the third round.
    """
    config = tiny_model(torch.device("cpu"), torch.float32).config
    asked = []
    with (
        PrefixStore(block_size=16) as store,
        TieredCache(store, config=config, device_budget=12 * 2**20, spill_dir=tmp_path, engine=place.engine) as cache,
    ):
        for seed in range(12):
            synthetic(place, cache, 1024, 256, seed)
            asked.append(place.host_bytes)
            cache.reset()
    assert asked[0] > 0
    assert len(set(asked[4:])) == 1
    assert asked[-1] < asked[0] + 12 * 20 * 2**20
    assert all(memory.is_pinned() for memory in place.host_memory)


# --- accelerator only -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_copy_to_host_does_not_wait_for_earlier_copies_to_device(accelerator):
    """The engine has two side streams, so a copy to the host does not queue behind copies to the device."""
    place = Place.on(accelerator)
    engine = place.engine(place.device)
    if not isinstance(engine, StreamEngine):
        pytest.skip("no side streams")
    try:
        large, small = engine.host_empty(256 * 2**20), engine.host_empty(2**10)
        there = torch.zeros(256 * 2**20, dtype=torch.uint8, device=place.device)
        source = torch.ones(2**10, dtype=torch.uint8, device=place.device)
        ready = engine.mark()
        up = ready
        for _ in range(40):  # some hundred milliseconds on the fastest links
            up = engine.copy(there, large, after=[up])
        engine.settle(engine.copy(small, source, after=[ready]))
        assert not up.result().query()
        assert small.eq(1).all()
        engine.settle(up)
    finally:
        engine.close()


@pytest.mark.gpu
def test_offloading_is_exact_with_layers_on_two_devices(accelerator, tmp_path):
    """Each device has its own budget and ring; both share the host RAM."""
    if torch.accelerator.device_count() < 2:
        pytest.skip("one accelerator")
    accelerate = pytest.importorskip("accelerate")
    script = conversation()
    model = tiny_model(torch.device("cpu"), torch.float32)
    half = LAYERS // 2
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    device_map |= {f"model.layers.{index}": int(index >= half) for index in range(LAYERS)}
    model = accelerate.dispatch_model(model, device_map)
    least, *_ = budgets(model, longest_sequence(script), 8)
    place = Place(torch.device(accelerator.type, 0), real=True)
    difference, report = compare(place, model, script, tmp_path, device_budget=least)
    assert difference is None
    assert report.peak_device_bytes <= least
    assert report.cold_layers
