"""TieredCache and its layers answer transformers' cache methods like the originals, or raise an error with advice."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import DynamicCache, cache_utils

from kvtier import ConfigurationError, TieredCache
from kvtier.errors import KvtierError
from kvtier.hf.compat.model_profiles import passed_argument
from kvtier.hf.compat.names import INSTALLED
from kvtier.hf.layers.build import build_layers, upstream_layers
from tests.support import families

STATE = torch.ones(1, 2, 3)
CALLS = {
    "get_conv_state": lambda c: c.get_conv_state(0),
    "update_conv_state": lambda c: c.update_conv_state(STATE, 0),
    "get_recurrent_state": lambda c: c.get_recurrent_state(0),
    "update_recurrent_state": lambda c: c.update_recurrent_state(STATE, 0),
    "has_previous_state of the last": lambda c: c.has_previous_state(),
    "has_previous_state": lambda c: c.has_previous_state(0),
    "update_indexer": lambda c: c.update_indexer(STATE, 0),
    "is_recording_past": lambda c: c.is_recording_past(0),
    "get_mask_sizes": lambda c: c.get_mask_sizes(3, 0),
    "get_query_offset": lambda c: c.get_query_offset(),
    "get_seq_length": lambda c: c.get_seq_length(),
    "get_max_length": lambda c: c.get_max_length(),
    "get_max_length of one": lambda c: c.get_max_length(0),
    "is_sliding": lambda c: c.is_sliding,
    "is_linear": lambda c: c.is_linear,
    "is_dummy": lambda c: c.is_dummy,
    "is_compileable": lambda c: c.is_compileable,
    "is_croppable": lambda c: c.is_croppable,
    "is_initialized": lambda c: c.is_initialized,
    "batch_size": lambda c: c.batch_size,
    "crop": lambda c: c.crop(-1),
    "reset": lambda c: c.reset(),
    "reorder_cache": lambda c: c.reorder_cache(torch.tensor([0])),
    "batch_select_indices": lambda c: c.batch_select_indices(torch.tensor([0])),
    "batch_repeat_interleave": lambda c: c.batch_repeat_interleave(2),
    "activate_past_recording": lambda c: c.activate_past_recording(),
    "len": len,
    "iter": list,
    "update": lambda c: c.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0),
}


def outcome(call, cache):
    try:
        return call(cache), None
    except Exception as error:
        return None, error


@pytest.mark.parametrize("name", CALLS)
def test_cache_without_layers_answers_like_dynamic_cache_or_advises_config(cache, name):
    theirs, refused = outcome(CALLS[name], DynamicCache())
    if isinstance(refused, AttributeError):
        pytest.skip("this version of transformers does not have it")
    ours, error = outcome(CALLS[name], cache)
    if name == "is_recording_past":
        assert ours is False
    elif name == "get_max_length":
        assert ours == -1
    elif refused is None:
        assert error is None
        assert str(ours) == str(theirs)
    else:
        assert isinstance(error, ConfigurationError)
        assert "config=model.config" in str(error)
        assert "begin(model, input_ids)" in str(error)


def test_calls_table_covers_every_public_cache_method():
    public = {name for name in dir(DynamicCache) if not name.startswith("_")}
    elsewhere = {
        "offload",
        "prefetch",
        "early_initialization",
        "max_batch_size",
        "max_cache_len",
        "get_max_cache_shape",
    }
    assert public - {name.split()[0] for name in CALLS} - elsewhere == set()


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "falcon_h1", "lfm2", "deepseek_v32"])
def test_forward_on_cache_without_layers_raises_but_generate_works(store, name):
    model, ids = families.build(name), torch.arange(1, 9)[None]
    with TieredCache(store) as cache:
        if not hasattr(DynamicCache, "get_conv_state"):
            pytest.skip("this version of transformers looks into layers by itself")
        with pytest.raises(KvtierError, match=r"config=model\.config"):
            model(ids, use_cache=True, **{passed_argument(model): cache})
        found = model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
        assert torch.equal(found, model.generate(ids, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_layers_match_the_types_and_attributes_of_transformers_layers(name):
    """Code that checks ``isinstance`` accepts kvtier's layers. Pure state layers are transformers' own."""
    config = families.build(name).config
    theirs = upstream_layers(config)
    for ours, their in zip(build_layers(config)[0], theirs, strict=True):
        if type(their).__name__ != "MiniMaxM3VLSparseCacheLayer":
            assert isinstance(ours, type(their))
        for attribute in ("is_sliding", "is_compileable", "is_croppable", "is_initialized"):
            assert getattr(ours, attribute, None) == getattr(their, attribute, None) or attribute == "is_croppable"
        assert ours.get_max_length() == their.get_max_length()
    linear = TieredCache(config=config).is_linear
    assert linear == DynamicCache(config=config).is_linear


def test_kvtier_registers_no_layer_type_in_transformers():
    mapping = getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {})
    assert not [kind for kind in mapping.values() if inspect.getmodule(kind).__name__.startswith("kvtier")]


@pytest.mark.parametrize(("k", "v"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_update_accepts_k_and_v_of_different_dtypes(cache, k, v):
    theirs = DynamicCache()
    for _ in range(2):
        keys, values = torch.randn(1, 2, 3, 4).to(k), torch.randn(1, 2, 3, 4).to(v)
        for ours, their in zip(cache.update(keys, values, 0), theirs.update(keys, values, 0), strict=True):
            assert torch.equal(ours.float(), their.float())
        assert (ours.dtype, their.dtype) == (v, v if INSTALLED >= (5, 24) else torch.promote_types(k, v))


@pytest.mark.parametrize("edit", [{"sliding_window": 5}, {"layer_types": ["full_attention"] * 3}])
@pytest.mark.parametrize("known", [False, True], ids=["no root is known", "a root is known"])
def test_layers_follow_an_edit_of_the_model_config(store, edit, known):
    """The config at the start of a turn decides the layers, not the config at the creation of the cache."""
    model, ids = families.build("gemma3"), torch.arange(1, 31)[None]
    with TieredCache(store, config=model.config) as cache:
        if known:
            model.generate(ids, past_key_values=cache, max_new_tokens=3)
        for name, value in edit.items():
            if isinstance(value, list):
                getattr(model.config, name)[:] = value
            else:
                setattr(model.config, name, value)
        found = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        shapes = [getattr(layer, "sliding_window", None) for layer in cache.layers]
        theirs = DynamicCache(config=model.config)
        assert shapes == [getattr(layer, "sliding_window", None) for layer in theirs.layers]
        assert torch.equal(found, model.generate(ids, max_new_tokens=6, do_sample=False))
