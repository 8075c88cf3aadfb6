"""Turns on an accelerator give the bits of ``DynamicCache``: loads and commits run beside the computation."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvtier import PrefixStore, TieredCache


def assert_same(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, reference in zip(ours.logits, theirs.logits, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.sample(1)  # of 4
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_every_turn_is_exact_from_device_host_and_disk(place, make_model, generate, tokens, tmp_path, kind, dtype):
    model = make_model(kind, dtype).to(place.device)
    reference = DynamicCache(config=model.config)
    ids = tokens(40).to(place.device)
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store, engine=place.engine) as cache:
        first = generate(model, ids, cache)
        assert_same(first, generate(model, ids, reference))
        assert all(layer.keys.device.type == place.device.type for layer in cache.layers)
        ids = torch.cat([first.sequences, tokens(5, seed=1).to(place.device)], 1)
        continued = generate(model, ids, cache)
        assert cache.last_turn.cached_by_tier["device"] == 47
        assert_same(continued, generate(model, ids, reference))
        ids = torch.cat([continued.sequences, tokens(5, seed=2).to(place.device)], 1)
        with TieredCache(store, engine=place.engine) as other:
            from_ram = generate(model, ids, other)
            assert other.last_turn.cached_by_tier["host"] == 60
            assert_same(from_ram, generate(model, ids, reference))
    ids = torch.cat([from_ram.sequences, tokens(5, seed=3).to(place.device)], 1)
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store, engine=place.engine) as cache:
        from_disk = generate(model, ids, cache)
        assert cache.last_turn.cached_by_tier["disk"] == 73
        assert_same(from_disk, generate(model, ids, reference))


def test_cropped_buffers_are_completed_from_the_store(place, make_model, generate, tokens):
    """A crop between turns makes the buffers shorter than the stored prefix."""
    model, ids = make_model("llama").to(place.device), tokens(40).to(place.device)
    with PrefixStore(block_size=8) as store, TieredCache(store, engine=place.engine) as cache:
        generate(model, ids, cache)
        cache.crop(-30)
        ours = generate(model, ids, cache)
        assert dict(cache.last_turn.cached_by_tier) == {"device": 17, "host": 22, "disk": 0}
        assert torch.equal(ours.sequences, generate(model, ids).sequences)
