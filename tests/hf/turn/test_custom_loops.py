"""Changes to layers that no turn announced are noticed: the changed layers are neither reused nor kept."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn
from transformers import Cache

from kvtier import TieredCache
from kvtier.hf.compat.model_profiles import passed_argument
from kvtier.hf.layers.attention import AttentionLayer, IndexedLayer
from kvtier.hf.layers.states import has_states
from tests.support import families

pytestmark = pytest.mark.sample(2)

KINDS = ["llama", "gemma3", "deepseek_v32", "qwen3_next", "falcon_h1", "lfm2", "mamba2", "jamba", "deepseek_v4"]


def prompt(columns, seed=0):
    return torch.randint(1, 60, (1, columns), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def build():
    models = {}

    def make(name):
        if name == "mamba2" and not hasattr(Cache, "get_conv_state"):
            pytest.skip("this version of transformers does not tell such a cache how many tokens it has seen")
        if name not in families.FAMILIES:
            pytest.skip("this version of transformers does not have it")
        if name not in models:
            models[name] = families.build(name)
        return models[name]

    return make


def ask(model, ids, cache, **settings):
    """Return the sequences, compared with a fresh cache."""
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids), **settings}
    found = model.generate(ids, past_key_values=cache, **settings)
    assert torch.equal(found, model.generate(ids, **settings))
    return found


def feed(model, cache, ids):
    """Run a forward pass over ``ids``, after the cached tokens."""
    begin = cache.get_seq_length()
    positions = torch.arange(begin, begin + ids.shape[1])[None]
    more = {} if type(model).__name__.startswith("Mamba") else {"position_ids": positions}
    with torch.no_grad():
        return model(ids, use_cache=True, **{passed_argument(model): cache}, **more).logits[:, -1:].argmax(-1)


# --- between turns ----------------------------------------------------------------------------------------------------


def by_the_model(model, cache):
    feed(model, cache, prompt(1, seed=9))


def by_the_cache(model, cache):
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "recurrent_states", None) and layer.recurrent_states[0] is not None:
            cache.update_recurrent_state(layer.recurrent_states[0] + 1, index)
        elif getattr(layer, "conv_states", None):
            cache.update_conv_state(layer.conv_states[0][..., -1:] + 1, index)
        elif isinstance(layer, AttentionLayer):
            cache.update(layer.keys[:, :, -1:] + 1, layer.values[:, :, -1:] + 1, index)


def by_the_layer(model, cache):
    for layer in cache.layers:
        if isinstance(layer, IndexedLayer):
            layer.crop(-3)
            layer.update_indexer(layer.indexer.keys[:, 0, -3:] + 1)
            layer.update(layer.keys[:, :, -3:] + 1, layer.values[:, :, -3:] + 1)
        elif getattr(layer, "recurrent_states", None) and layer.recurrent_states[0] is not None:
            layer.update_recurrent_state(layer.recurrent_states[0] + 1)
        elif getattr(layer, "conv_states", None):
            layer.update_conv_state(layer.conv_states[0][..., -1:] + 1)
        elif isinstance(layer, AttentionLayer):  # the length stays the same
            layer.crop(-3)
            layer.update(layer.keys[:, :, -3:] + 1, layer.values[:, :, -3:] + 1)
        else:
            layer.compressed_kv["compressor"] = layer.compressed_kv["compressor"] + 1


def in_place(model, cache):
    layer = next((layer for layer in reversed(cache.layers) if has_states(layer)), None)
    if layer is None:
        pytest.skip("it has no states; its windows are private")
    tensors = [*getattr(layer, "recurrent_states", {}).values(), *getattr(layer, "conv_states", {}).values()]
    tensors = [*(tensor for tensor in tensors if tensor is not None), getattr(layer, "keys", None)]
    tensors[0].mul_(3)


def by_one_layer_that_fails(model, cache):
    with pytest.raises(InterruptedError):
        fail_in(model, 1, lambda: feed(model, cache, prompt(2, seed=9)))


def by_rows_of_layers(model, cache):
    if not any(hasattr(layer, "batch_select_indices") for layer in cache.layers):
        pytest.skip("its layers have no such method")
    for layer in cache.layers:
        if hasattr(layer, "batch_select_indices"):
            layer.batch_select_indices(torch.tensor([0, 0]))
            layer.batch_select_indices(torch.tensor([0]))


WAYS = [by_the_model, by_the_cache, by_the_layer, in_place, by_one_layer_that_fails, by_rows_of_layers]


def fail_in(model, layer, call):
    """Run ``call()`` with a model whose layer number ``layer`` raises before it computes."""

    def fail(*_):
        raise InterruptedError

    layers = next(
        part for name, part in model.named_modules() if name.endswith("layers") and isinstance(part, nn.ModuleList)
    )
    hook = layers[layer].register_forward_pre_hook(fail)
    try:
        call()
    finally:
        hook.remove()


@pytest.mark.sample(6)  # of 54
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KINDS)
def test_layers_changed_between_turns_are_not_reused(build, store, name, way):
    model = build(name)
    with TieredCache(store) as cache:
        ids = ask(model, prompt(30), cache)
        way(model, cache)
        longer = torch.cat([ids, prompt(3, seed=1)], 1)
        found = ask(model, longer, cache)
        assert cache.last_turn.cached_by_tier["device"] == 0
        with TieredCache(store) as other:
            ask(model, torch.cat([found, prompt(3, seed=2)], 1), other)
            ask(model, torch.cat([ids, prompt(9, seed=3)], 1), other)


@pytest.mark.parametrize("name", KINDS)
def test_tokens_fed_without_any_turn_are_not_reused(build, store, name):
    """The cache was only fed by hand. ``config`` gives its layers."""
    model = build(name)
    with TieredCache(store, config=model.config) as cache:
        feed(model, cache, prompt(20, seed=5))
        ask(model, torch.cat([prompt(20, seed=5), prompt(3, seed=1)], 1), cache)
        assert cache.last_turn.cached_tokens == 0
        assert len(store.stats().roots if hasattr(store.stats(), "roots") else ()) <= 1


@pytest.mark.parametrize("name", KINDS)
def test_layers_that_are_only_read_are_reused(build, store, name):
    model = build(name)
    with TieredCache(store) as cache:
        ids = ask(model, prompt(30), cache)
        assert cache.layers[0] in cache.layers
        repr(cache), cache.get_seq_length(), [vars(layer) for layer in cache.layers]
        ask(model, torch.cat([ids, prompt(3, seed=1)], 1), cache)
        assert cache.last_turn.cached_tokens > 0


# --- within a turn ----------------------------------------------------------------------------------------------------


@pytest.mark.sample(11)  # of 54
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("when", ["prompt", "answer"])
@pytest.mark.parametrize("name", KINDS)
def test_turn_after_a_failed_and_repeated_forward_pass_is_exact(build, store, name, when, at):
    """The layers before the failing layer have the tokens twice, so later layers computed useless K and V."""
    model, ids = build(name), prompt(24)
    with TieredCache(store) as cache:
        cache.begin(model, ids)
        if when == "answer":
            sequences = torch.cat([ids, feed(model, cache, ids)], 1)
        else:
            sequences = ids
        new = sequences[:, cache.get_seq_length() :]
        with pytest.raises(InterruptedError):
            fail_in(model, at, lambda: feed(model, cache, new))
        with suppress(RuntimeError, ValueError, IndexError):  # layers of different lengths may fit no mask
            feed(model, cache, new)
        cache.commit(sequences)
        for used in (cache, TieredCache(store)):
            ask(model, torch.cat([sequences, prompt(3, seed=1)], 1), used)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v32"])
def test_prompt_tokens_replaced_after_a_crop_are_not_kept(build, store, name, layerwise):
    model, ids, others = build(name), prompt(24), prompt(24, seed=1)
    with TieredCache(store) as cache:
        cache.begin(model, ids)
        feed(model, cache, ids)
        if layerwise:
            for layer in cache.layers:
                layer.crop(-14)
        else:
            cache.crop(-14)
        feed(model, cache, others[:, 10:])
        cache.commit(ids)
        longer = torch.cat([ids, prompt(3, seed=2)], 1)
        other = TieredCache(store)
        ask(model, longer, other)
        assert other.last_turn.cached_tokens <= 10
        ask(model, longer, cache)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_k_and_v_appended_to_layers_are_not_kept_as_prompt_tokens(build, store, name):
    model, ids = build(name), prompt(24)
    with TieredCache(store) as cache:
        cache.begin(model, ids)
        feed(model, cache, ids[:, :20])
        for layer in cache.layers:
            layer.update(layer.keys[:, :, :4] + 1, layer.values[:, :, :4] + 1)
        feed(model, cache, prompt(1, seed=3))
        cache.commit(ids)
        longer = torch.cat([ids, prompt(3, seed=2)], 1)
        other = TieredCache(store)
        ask(model, longer, other)
        assert other.last_turn.cached_tokens <= 20
        ask(model, longer, cache)
