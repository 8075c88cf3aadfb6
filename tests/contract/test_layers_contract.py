"""How transformers' layers behave, as far as kvtier's stand in for them; and what changed with 5.24."""

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


def test_layers_say_where_they_are_and_before_5_24_of_which_dtype():
    """kvtier's own layers set both; nothing upstream may need ``dtype`` any more."""
    layer = cache_utils.DynamicLayer()
    layer.update(states(), states())
    assert layer.device == torch.device("cpu")
    assert hasattr(layer, "dtype") == (not SINCE_5_24)


def test_k_and_v_keep_their_own_dtypes():
    layer = cache_utils.DynamicLayer()
    layer.update(states(), states(dtype=torch.bfloat16))
    k, v = layer.update(states(), states(dtype=torch.bfloat16))
    assert k.dtype == torch.float32
    assert v.dtype == (torch.bfloat16 if SINCE_5_24 else torch.float32)  # before, the empty V had the dtype of K


def test_linear_layers_compile_while_they_record_nothing():
    layer = cache_utils.LinearAttentionLayer()
    assert layer.is_compileable
    layer.activate_past_recording()
    assert layer.is_compileable == (not SINCE_5_24)


def test_what_a_cache_takes_for_linear():
    """``all(cache.is_linear)`` decides since 5.24 whether generate() leaves the prompt whole."""
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
def test_layers_that_crop_say_so(kind):
    layer = getattr(cache_utils, kind)(*([8] if kind == "StaticLayer" else []))
    assert layer.is_croppable == (kind == "DynamicLayer" or SINCE_5_24)
    assert hasattr(layer, "crop") == layer.is_croppable


def test_models_of_linear_attention_are_fed_the_whole_prompt_again(tokens):
    """kvtier slices it: see hf/generate/prefill.py."""
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


def test_every_forward_pass_looks_its_methods_up():
    """What kvtier wraps on the class is found, whenever ``generate`` itself was taken from the model."""
    source = inspect.getsource(inspect.unwrap(GenerationMixin.generate))
    assert "self._prepare_cache_for_generation(" in source
    assert "self.prepare_inputs_for_generation(" in inspect.getsource(GenerationMixin._prefill)
