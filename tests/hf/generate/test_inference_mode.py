"""Turns may alternate between inference mode and normal mode: kvtier can write its tensors in both."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch
from transformers import Cache, DynamicCache

from kvtier import PrefixStore, TieredCache
from kvtier.hf.compat.model_profiles import passed_argument
from kvtier.kv.allocation import as_writable, new_buffer, writable_results
from kvtier.testing import SimulatedEngine
from sweep.models import tiny_model
from tests.support import families

# K and V, sliding K and V, indexer keys, all kinds of states, pools, K and V that layers share, states outside a cache.
pytestmark = pytest.mark.sample(2)

KINDS = [
    *[
        "llama",
        "gemma3",
        "gemma3n",
        "deepseek_v32",
        "qwen3_next",
        "falcon_h1",
        "lfm2",
        "mamba2",
        "jamba",
        "deepseek_v4",
    ],
    *["rwkv", "xlstm", "minimax"],
]
CARRIED = ("rwkv", "xlstm", "minimax")
STATES_ALONE = ("mamba2",)
STATES_ONLY = ("mamba2", "rwkv", "xlstm", "deepseek_v4")  # they report no tier for K and V
MODES = {"out": nullcontext, "in": torch.inference_mode, "none": torch.no_grad}
ORDERS = ["in out in", "out in out", "in none in", "in in out"]


def prompt(columns, rows=1, seed=0):
    return torch.randint(1, 60, (rows, columns), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def build():
    models = {}

    def make(name):
        if name in STATES_ALONE and not hasattr(Cache, "get_conv_state"):
            pytest.skip("this version of transformers does not tell such a cache how many tokens it has seen")
        if name not in families.FAMILIES and name not in CARRIED:
            pytest.skip("this version of transformers does not have it")
        if name not in models:
            models[name] = tiny_model(name) if name in CARRIED else families.build(name)
        return models[name]

    return make


def ask(model, ids, cache, mode, **settings):
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids), **settings}
    with MODES[mode]():
        found = model.generate(ids, past_key_values=cache, **settings)
    expected = model.generate(ids, **settings)
    assert torch.equal(found, expected)
    return found.clone()


@pytest.mark.sample(6)  # of 52
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", KINDS)
def test_conversation_across_modes_is_exact_and_reused(build, store, name, order):
    model, ids, reused = build(name), prompt(20), []
    with TieredCache(store) as cache:
        for turn, mode in enumerate(order.split()):
            ids = torch.cat([ask(model, ids, cache, mode), prompt(3, seed=turn + 1)], 1)
            reused.append(cache.last_turn.cached_tokens)
    assert reused[0] == 0
    assert all(reused[1:]), cache.last_turn.miss_reason


@pytest.mark.sample(5)  # of 26
@pytest.mark.parametrize("tier", ["ram", "disk"])
@pytest.mark.parametrize("name", KINDS)
def test_prefix_restored_in_another_mode_is_exact(build, tmp_path, name, tier):
    model, ids = build(name), prompt(20)
    first, second = "in", "out"
    store = PrefixStore(tmp_path, block_size=8)
    with TieredCache(store) as cache:
        ids = torch.cat([ask(model, ids, cache, first), prompt(3, seed=1)], 1)
    if tier == "disk":
        store.close()
        store = PrefixStore(tmp_path, block_size=8)
    with store, TieredCache(store) as cache:
        ids = torch.cat([ask(model, ids, cache, second), prompt(3, seed=2)], 1)
        assert cache.last_turn.cached_by_tier["disk" if tier == "disk" else "host"] or name in STATES_ONLY
        ask(model, ids, cache, first)


@pytest.mark.sample(6)  # of 20
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next", "falcon_h1", "deepseek_v4"])
def test_fork_in_another_mode_is_exact(build, store, name, order):
    model = build(name)
    one, two, three = order.split()
    with TieredCache(store) as cache:
        ids = ask(model, prompt(20), cache, one)
        with MODES[two]():
            twin = cache.fork()
        ask(model, torch.cat([ids, prompt(3, seed=1)], 1), twin, three)
        ask(model, torch.cat([ids, prompt(3, seed=2)], 1), cache, two)
        ask(model, torch.cat([ids, prompt(3, seed=3)], 1), twin, one)
        twin.close()


@pytest.mark.sample(4)  # of 24
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("share", [0.45, 0.6, 1.0])
@pytest.mark.parametrize("where", ["files", "ram below a device"])
def test_device_budget_across_modes_is_exact_and_reused(tmp_path, order, share, where):
    model, ids = families.build("llama", num_hidden_layers=6), prompt(40)
    one, two, three = order.split()
    column = sum(part.nbytes for layer in layers_of(model) for part in (layer.keys, layer.values))
    settings = {"device_budget": int(share * column * (75 + 75 // 8 + 24)), "spill_dir": tmp_path / "spill"}
    if where != "files":
        settings["engine"] = lambda device: engine
        engine = SimulatedEngine(random.Random(0))
    with PrefixStore(block_size=8) as store:
        with TieredCache(store, **settings) as cache:
            ids = ask(model, ids, cache, one, max_new_tokens=16)
            assert (cache.last_turn.cold_layers > 0) == (share < 1)
            # A shorter prompt: all buffers are large enough, and are written as they are.
            ids = torch.cat([ask(model, ids[:, :46], cache, two), prompt(5, seed=1)], 1)
            assert cache.last_turn.cached_tokens
            with MODES[three]():
                twin = cache.fork()
            ask(model, ids, twin, one)
            twin.close()
        with TieredCache(store, **settings) as cache:
            ask(model, ids, cache, three)
            assert cache.last_turn.cached_tokens


def layers_of(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.long), **{passed_argument(model): cache})
    return cache.layers


@pytest.mark.sample(6)  # of 16
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["gemma3", "falcon_h1"])
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beam_search_across_modes_is_exact(build, store, name, order, settings):
    model, ids = build(name), prompt(20)
    with TieredCache(store) as cache:
        for turn, mode in enumerate(order.split()):
            found = ask(model, ids, cache, mode, **settings)
            ids = torch.cat([found[:1], prompt(3, seed=turn + 1)], 1)


@pytest.mark.sample(7)  # of 28
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "deepseek_v32", "qwen3_next", "falcon_h1", "mamba2", "deepseek_v4"]
)
def test_rows_can_be_moved_in_another_mode_than_their_turn(build, store, name, order):
    model = build(name)
    one, two, three = order.split()
    with TieredCache(store) as cache:
        ask(model, prompt(20, rows=3), cache, one)
        for move in (
            lambda: cache.reorder_cache(torch.tensor([2, 0, 1])),  # in place
            lambda: cache.batch_select_indices(torch.tensor([True, False, True])),
            lambda: cache.reorder_cache(torch.tensor([1, 0])),
            lambda: cache.batch_repeat_interleave(2),
        ):
            with MODES[two]():
                move()
        assert cache.turns.layers.row_count == 4
        ask(model, prompt(20, rows=3), cache, three)


def test_buffers_made_in_inference_mode_are_writable_outside_of_it():
    with torch.inference_mode():
        made, other = new_buffer(2, 3, dtype=torch.bfloat16), torch.zeros(2)
        with writable_results():
            derived = other + 1
            assert not torch.is_grad_enabled()
        copied = as_writable(other)
    assert made.shape == (2, 3)
    assert made.dtype == torch.bfloat16
    for tensor in (made, derived, copied):
        tensor.fill_(1)  # raises for a tensor made in inference mode
        assert not tensor.requires_grad
    assert as_writable(made) is made
    with writable_results():
        assert torch.is_grad_enabled()
