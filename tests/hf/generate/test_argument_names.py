"""generate() finds a TieredCache under any argument name, and passes it on under the name that transformers uses."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import DynamicCache

from kvtier import ConfigurationError, ReuseWarning, TieredCache
from tests.support.reuse import states_alone_off
from tests.support.upstream import CACHE, given

SETTINGS = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [0]}
NAMES = ("cache", "past_key_values", "cache_params")


@pytest.fixture(params=["llama", "gemma3", "mamba2", "falcon_h1", "deepseek_v32"])
def any_model(request, make_model):
    return make_model(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_each_argument_name_reuses_the_prefix_without_warnings(any_model, store, tokens, name):
    with warnings.catch_warnings(), TieredCache(store) as cache:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*for a cache of states alone", ReuseWarning)  # before 5.21
        ids = tokens(20)
        for _ in range(3):
            found = any_model.generate(ids, **{name: cache}, **SETTINGS)
            assert torch.equal(found, any_model.generate(ids, **SETTINGS))
            ids = torch.cat([found, tokens(3, seed=1)], 1)
    if cache.last_turn.miss_reason is None:
        assert cache.last_turn.cached_tokens >= 27
    else:
        assert "before 5.21" in cache.last_turn.miss_reason


def test_argument_name_may_change_between_turns(model, store, tokens):
    with TieredCache(store) as cache:
        ids = tokens(20)
        for name in NAMES:
            found = model.generate(ids, **{name: cache}, **SETTINGS)
            assert torch.equal(found, model.generate(ids, **SETTINGS))
            ids = torch.cat([found, tokens(3, seed=1)], 1)
        assert cache.last_turn.cached_tokens == 20 + 2 * 8 - 4
        edited = ids.clone()
        edited[0, 7] = edited[0, 7] % 199 + 1
        assert torch.equal(model.generate(edited, cache=cache, **SETTINGS), model.generate(edited, **SETTINGS))
        assert cache.last_turn.cached_tokens == 7


@pytest.mark.parametrize("others", [("cache", "past_key_values"), ("past_key_values", "cache_params")])
def test_caches_under_two_argument_names_raise_configuration_error(model, store, tokens, others):
    with TieredCache(store) as one, TieredCache(store) as two:
        for values in ((one, two), (one, DynamicCache(config=model.config)), (DynamicCache(config=model.config), one)):
            with pytest.raises(ConfigurationError, match="several names"):
                model.generate(tokens(12), **dict(zip(others, values, strict=True)), **SETTINGS)
        assert torch.equal(model.generate(tokens(12), cache=one, **SETTINGS), model.generate(tokens(12), **SETTINGS))


def test_unknown_argument_name_raises_the_error_of_transformers(model, store, tokens):
    """The call begins no turn that would be kept, and does not take cached tokens for the start of its prompt."""
    with TieredCache(store) as cache:
        model.generate(tokens(12), past_key_values=cache, **SETTINGS)
        with pytest.raises(ValueError, match="kv_memory"):
            model.generate(tokens(14, seed=1), kv_memory=cache, **SETTINGS)
        assert "kv_memory=" in cache.last_turn.miss_reason


def test_custom_generate_gets_an_empty_cache_under_its_own_argument_name(model, store, tokens):
    """The custom function names the argument ``kv_memory``."""

    def custom(model, input_ids, generation_config, kv_memory=None, **model_kwargs):
        assert kv_memory.get_seq_length() == 0
        for _ in range(3):
            feed = input_ids[:, kv_memory.get_seq_length() :]
            logits = model(feed, **given(model, kv_memory)).logits[:, -1]
            input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], 1)
        return input_ids

    with TieredCache(store) as cache:
        for seed in range(2):
            ids = tokens(12, seed=seed)
            expected = custom(model, ids, None, DynamicCache(config=model.config))
            assert torch.equal(model.generate(ids, kv_memory=cache, custom_generate=custom, **SETTINGS), expected)
            assert "kv_memory=" in cache.last_turn.miss_reason


@states_alone_off
def test_custom_loop_with_the_models_argument_name_matches_a_cold_pass(any_model, store, tokens):
    with TieredCache(store) as cache, torch.no_grad():
        for columns in (10, 20):
            ids = tokens(columns)
            known = cache.begin(any_model, ids).cached_tokens
            if known == 0 and cache.last_turn.miss_reason != "no stored prefix matches the start of this prompt":
                return
            position = {"position_ids": torch.arange(known, columns)[None]} if CACHE in given(any_model, 0) else {}
            logits = any_model(ids[:, known:], use_cache=True, **position, **given(any_model, cache)).logits[:, -1]
            assert torch.allclose(logits, any_model(ids).logits[:, -1], atol=1e-4)
            cache.commit(ids)
