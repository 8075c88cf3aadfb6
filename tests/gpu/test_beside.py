"""What runs beside the computation on an accelerator, and the memory that it takes."""

from __future__ import annotations

import gc
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from kvtier import PrefixStore, TieredCache
from kvtier.kv.room import with_slack
from kvtier.testing import Recorder
from kvtier.transfer.accelerator import StreamEngine
from tests.support.families import build

HOT_PATH = ("/kvtier/hf/layers/", "/kvtier/kv/", "/kvtier/transfer/", "/kvtier/store/", "/kvtier/offload/")
SMALL_BYTES = 2**13  # token ids and masks, each of them rounded up to 512 bytes


@contextmanager
def blocking(place, request):
    """Yield a list that gets the files of the hot path in which the host waits for the device."""
    found = []
    if not place.real:
        with request.getfixturevalue("machine").blocking_copies() as counts:
            yield found
        found += counts
    elif not hasattr(place.module, "set_sync_debug_mode"):
        pytest.skip("the device does not tell when the host waits")
    else:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            place.module.set_sync_debug_mode("warn")
            yield found
            place.module.set_sync_debug_mode("default")
        found += [warning.filename for warning in caught if "synchroniz" in str(warning.message)]
    found[:] = [name for name in found if any(part in name for part in HOT_PATH)]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_loads_and_commits_do_not_block_generate(place, request, make_model, generate, tokens, kind):
    """Pages come and go on side streams; the host waits for none of them before ``generate()`` has returned."""
    model, ids, recorders = make_model(kind).to(place.device), tokens(60).to(place.device), []

    def engine(device):
        recorders.append(Recorder(place.engine(device)))
        return recorders[-1]

    with PrefixStore(block_size=8) as store:
        with TieredCache(store, engine=engine) as cache:
            ids = generate(model, ids, cache).sequences
        ids = torch.cat([ids, tokens(9, seed=1).to(place.device)], 1)
        with TieredCache(store, engine=engine) as cache:
            with blocking(place, request) as found:
                generate(model, ids, cache)
            assert cache.last_turn.cached_by_tier["host"] == 67
            assert not [drop for drop in recorders[-1].seen if drop.what == "settle"]
            assert not found


def bytes_of_turns(place, model, ids, cache, turns=2, **settings):
    """Return the bytes held after each turn, and its peak, beyond what was held before."""
    counts = []
    gc.collect()
    place.synchronize()
    before = place.module.memory_allocated(place.device)
    for _ in range(turns):
        with place.peak() as grown, torch.no_grad():
            out = model.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), **settings)
        ids = torch.cat([out[: len(ids)], ids[:, :5]], 1)
        del out
        place.synchronize()
        held = place.module.memory_allocated(place.device)
        counts.append((held - before, grown[0]))
    return counts


MOST_HELD = {"llama": 1.05, "gemma3": 1.1}  # times that of DynamicCache; sliding layers have a spare tenth
LAYERS = {"llama": {}, "gemma3": {"sliding_window": 96, "num_hidden_layers": 6, "layer_types": None}}


@pytest.mark.sample(2)  # of 18
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize(
    ("rows", "settings"), [(1, {}), (4, {}), (1, {"num_beams": 3})], ids=["one row", "batch", "beams"]
)
@pytest.mark.parametrize("length", [256, 1_024, 8_192])
@pytest.mark.parametrize("kind", LAYERS)
def test_device_memory_is_as_tight_as_dynamic_cache(place, kind, length, rows, settings):
    if length > 1_024 and not place.real:
        pytest.skip("hardware only: it takes minutes")
    shape = {"vocab_size": 200, "head_dim": 64, "num_key_value_heads": 4, "max_position_embeddings": 2**14}
    model = build(kind, attention="sdpa" if kind == "llama" else "eager", **shape, **LAYERS[kind])
    model, settings = model.to(place.device), {"max_new_tokens": 4, "do_sample": False, **settings}
    ids = torch.randint(1, 90, (rows, length), generator=torch.Generator().manual_seed(0), device="cpu")
    ids = ids.to(place.device)
    theirs = bytes_of_turns(place, model, ids, DynamicCache(config=model.config), **settings)
    with PrefixStore(block_size=64) as store, TieredCache(store, engine=place.engine) as cache:
        with TieredCache(store, engine=place.engine) as first:  # its first turn reads the weights
            bytes_of_turns(place, model, torch.full_like(ids[:, :8], 99), first, **settings)
        ours = bytes_of_turns(place, model, ids, cache, **settings)
        # A replaced buffer stays until copies from it have ended: at worst, a window of each sliding layer.
        windows = sum(n.window.most_columns * n.memory.spec.token_bytes for _, n in cache._container.sliding)
        late_bytes = len(ids) * settings.get("num_beams", 1) * windows
    for (held, peak), (their_held, their_peak) in zip(ours, theirs, strict=True):
        assert held <= MOST_HELD[kind] * their_held
        assert peak <= their_peak + SMALL_BYTES + late_bytes


def without_scores(module, query, key, value, attention_mask, **_):
    """Attention without scores, which would take far more memory than K and V: it adds one key and one value."""
    groups = query.shape[1] // key.shape[1]
    seen = key[:, :, :1].repeat_interleave(groups, 1) + value[:, :, -1:].repeat_interleave(groups, 1)
    return (query + seen).transpose(1, 2).contiguous(), None


@pytest.fixture
def attention_without_scores():
    AttentionInterface.register("without_scores", without_scores)
    AttentionMaskInterface.register("without_scores", lambda *_, **__: None)
    yield "without_scores"
    del AttentionInterface._global_mapping["without_scores"], AttentionMaskInterface._global_mapping["without_scores"]


@pytest.mark.sample(2)  # of 24
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("budget", [None, 2**40])
@pytest.mark.parametrize(
    ("rows", "settings"), [(1, {}), (2, {}), (1, {"num_beams": 3})], ids=["one row", "batch", "beams"]
)
@pytest.mark.parametrize("length", [512, 2_048, 8_192, 16_384])
def test_long_prompts_are_as_tight_as_with_dynamic_cache(
    place, attention_without_scores, length, rows, settings, budget
):
    """Of a model that keeps nothing large besides K and V. Hot layers under a budget have some spare columns."""
    shape = {"vocab_size": 200, "num_hidden_layers": 2, "head_dim": 64, "max_position_embeddings": 2**15}
    model = build("llama", attention=attention_without_scores, **shape).to(place.device)
    settings = {"max_new_tokens": 4, "do_sample": False, **settings}
    ids = torch.randint(1, 90, (rows, length), generator=torch.Generator().manual_seed(0), device="cpu")
    ids = ids.to(place.device)
    theirs = bytes_of_turns(place, model, ids, DynamicCache(config=model.config), **settings)
    with (
        PrefixStore(block_size=64) as store,
        TieredCache(store, engine=place.engine, device_budget=budget) as cache,
    ):
        with TieredCache(store, engine=place.engine) as first:  # its first turn reads the weights
            bytes_of_turns(place, model, torch.full_like(ids[:, :8], 99), first, **settings)
        ours = bytes_of_turns(place, model, ids, cache, **settings)
        spare = with_slack(length + 32) - length if budget else 0
        spare_bytes = spare * sum(layer.memory.rows * layer.memory.spec.token_bytes for layer in cache.layers)
    for (held, peak), (their_held, their_peak) in zip(ours, theirs, strict=True):
        assert held <= 1.05 * their_held
        assert peak <= their_peak + SMALL_BYTES + spare_bytes


def test_threads_use_one_engine_without_mixing_up_their_streams(place):
    """Each thread copies up, computes and copies down, while the others do."""
    engine = place.engine(place.device)
    if not isinstance(engine, StreamEngine):
        pytest.skip("no side streams")
    wrong = []

    def work(number):
        host = engine.host_empty(4096).view(torch.int32)
        for step in range(20):
            value = 100 * number + step
            filled = engine.call(lambda value=value: host.fill_(value), writes=(host,))
            there = torch.empty(1024, dtype=torch.int32, device=place.device)
            engine.wait(engine.copy(there, host, after=[filled, engine.mark()]))
            there += 1
            engine.settle(engine.copy(host, there, after=[engine.mark()]))
            if not bool((host == value + 1).all()):
                wrong.append((number, step))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert not wrong


def test_pinned_memory_takes_the_bytes_that_the_engine_says(place):
    """Host budgets count what the machine gives, which is more than what was asked for."""
    if not hasattr(place.module, "host_memory_stats"):
        pytest.skip("the device does not tell how much memory is pinned")
    engine, kept = place.engine(place.device), []
    for nbytes in (1, 4096, 5000, 3 * 2**20):
        before = place.module.host_memory_stats()["allocated_bytes.current"]
        kept.append(engine.host_empty(nbytes))
        assert kept[-1].is_pinned()
        assert place.module.host_memory_stats()["allocated_bytes.current"] - before == engine.host_nbytes(nbytes)
    engine.close()
