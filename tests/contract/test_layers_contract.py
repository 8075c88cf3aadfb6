"""Behaviour of transformers' layers that kvtier's layers reproduce, and its changes in 5.24."""

from __future__ import annotations

import inspect

import pytest
import torch
from reliance import INSTALLED
from transformers import DynamicCache, GenerationMixin, MambaConfig, MambaForCausalLM, cache_utils

from tests.support.upstream import given

SINCE_5_24 = INSTALLED >= (5, 24)


def states(rows=1, tokens=3, dtype=torch.float32):
    return torch.ones(rows, 2, tokens, 4, dtype=dtype)


def test_layers_have_a_device_and_before_5_24_a_dtype():
    """kvtier's own layers set both; upstream may no longer need ``dtype``."""
    layer = cache_utils.DynamicLayer()
    layer.update(states(), states())
    assert layer.device == torch.device("cpu")
    assert hasattr(layer, "dtype") == (not SINCE_5_24)


def test_k_and_v_keep_their_own_dtypes_since_5_24():
    layer = cache_utils.DynamicLayer()
    layer.update(states(), states(dtype=torch.bfloat16))
    k, v = layer.update(states(), states(dtype=torch.bfloat16))
    assert k.dtype == torch.float32
    assert v.dtype == (torch.bfloat16 if SINCE_5_24 else torch.float32)  # before 5.24 the empty V had the dtype of K


def test_linear_layers_that_record_the_past_are_not_compileable_since_5_24():
    layer = cache_utils.LinearAttentionLayer()
    assert layer.is_compileable
    layer.activate_past_recording()
    assert layer.is_compileable == (not SINCE_5_24)


def test_is_linear_counts_pure_state_layers_and_before_5_24_sliding_hybrids():
    """Since 5.24, generate() uses ``all(cache.is_linear)`` to decide whether to feed the whole prompt."""
    cache = DynamicCache()
    cache.layers = [
        cache_utils.LinearAttentionLayer(),
        cache_utils.LinearAttentionAndFullAttentionLayer(),
        cache_utils.LinearAttentionAndSlidingWindowAttentionLayer(sliding_window=4),
        cache_utils.DynamicLayer(),
    ]
    assert list(cache.is_linear) == [True, False, not SINCE_5_24, False]
    assert DynamicCache().is_linear == []


@pytest.mark.parametrize("kind", ["DynamicLayer", "StaticLayer"])
def test_croppable_layers_have_a_crop_method(kind):
    layer = getattr(cache_utils, kind)(*([8] if kind == "StaticLayer" else []))
    assert layer.is_croppable == (kind == "DynamicLayer" or SINCE_5_24)
    assert hasattr(layer, "crop") == layer.is_croppable


def test_generate_feeds_linear_attention_models_the_whole_prompt_again(tokens):
    """kvtier slices the prompt: see hf/generate/prefill.py."""
    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0)
    model, fed = MambaForCausalLM(config).eval(), []
    cache = DynamicCache(config=config)
    model(tokens(6) % 49 + 1, use_cache=True, **given(model, cache))
    forward = model.forward

    def watching(input_ids, **kwargs):
        fed.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **kwargs)

    watching.__signature__ = inspect.signature(forward)
    model.forward = watching
    model.generate(tokens(10) % 49 + 1, max_new_tokens=2, do_sample=False, **given(model, cache))
    assert fed[0] == 10


def test_generate_looks_up_the_wrapped_methods_on_self():
    """So methods that kvtier wraps on the class take effect, even if ``generate`` was read from the model earlier."""
    source = inspect.getsource(inspect.unwrap(GenerationMixin.generate))
    assert "self._prepare_cache_for_generation(" in source
    assert "self.prepare_inputs_for_generation(" in inspect.getsource(GenerationMixin._prefill)
