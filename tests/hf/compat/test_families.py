"""The tiny models match their registry, and earlier tokens decide their answers."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.support import families

KINDS = {
    "DynamicLayer": {"full"},
    "DynamicSlidingWindowLayer": {"sliding", "chunked"},
    "DynamicIndexedLayer": {"indexed"},
    "LinearAttentionLayer": {"linear", "conv"},
    "LinearAttentionAndFullAttentionLayer": {"hybrid"},
    "DeepseekV4HCACache": {"pooled"},
    "DeepseekV4CSACache": {"pooled"},
    "DummyLayer": {"shared", "mixed"},  # layers that keep nothing
}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_layer_kinds_match_the_registry(name):
    said = families.FAMILIES[name].kinds
    layers = DynamicCache(config=families.build(name).config).layers
    for kind in {type(layer).__name__ for layer in layers}:
        assert KINDS[kind] & said, kind
    for kind in said - {"latent", "mixed", "shared"}:
        assert any(kind in KINDS[type(layer).__name__] for layer in layers), kind
    windows = [layer.sliding_window for layer in layers if type(layer).__name__ == "DynamicSlidingWindowLayer"]
    assert all(6 <= window <= 16 for window in windows)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_early_token_changes_the_last_logits(name, tokens):
    """Otherwise a cache with wrong contents would look like a correct one."""
    model, ids = families.build(name), tokens(30) % 60
    other = ids.clone()
    other[0, 5] = 1 + other[0, 5] % 58
    with torch.no_grad():
        assert (model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max() > 0.02


@pytest.mark.parametrize("name", families.FAMILIES)
def test_prefill_and_single_step_logits_agree(name, tokens):
    """Otherwise no reused cache could give the logits of a fresh cache."""
    model, ids = families.build(name), tokens(24) % 59 + 1
    found = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        whole = model(found.sequences).logits[:, 23:-1]
    assert torch.allclose(torch.stack(found.logits, 1), whole, rtol=0, atol=2e-4)
