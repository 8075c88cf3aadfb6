"""Promise 1b: logits are bitwise equal to those of ``DynamicCache`` for the same forward calls."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvtier import PrefixStore, TieredCache
from tests.support.upstream import CACHE

pytestmark = pytest.mark.sample(2)

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def assert_same(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.logits) == len(theirs.logits)
    for step, (mine, reference) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        assert torch.equal(mine, reference), f"step {step}: {(mine - reference).abs().max()}"


@pytest.mark.sample(4)  # of 32
@dtypes
def test_every_turn_of_a_conversation_has_bitwise_equal_logits(
    make_model, generate, tokens, tmp_path, family, attention, dtype
):
    """First turn, continued turn, restore from RAM, restore from disk: prompts of 40 or more tokens, windows of 16."""
    model = make_model(family, dtype, attention)
    reference = DynamicCache(config=model.config)
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store) as cache:
        ids = tokens(40)
        first = generate(model, ids, cache)
        assert cache.last_turn.cached_tokens == 0
        assert_same(first, generate(model, ids, reference))

        ids = torch.cat([first.sequences, tokens(5, seed=1)], 1)
        continued = generate(model, ids, cache)
        assert dict(cache.last_turn.cached_by_tier) == {"device": 47, "host": 0, "disk": 0}
        assert_same(continued, generate(model, ids, reference))

        ids = torch.cat([continued.sequences, tokens(5, seed=2)], 1)
        with TieredCache(store) as second:
            from_ram = generate(model, ids, second)
            assert dict(second.last_turn.cached_by_tier) == {"device": 0, "host": 60, "disk": 0}
            assert_same(from_ram, generate(model, ids, reference))

    ids = torch.cat([from_ram.sequences, tokens(5, seed=3)], 1)
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store) as cache:
        from_disk = generate(model, ids, cache)
        assert dict(cache.last_turn.cached_by_tier) == {"device": 0, "host": 0, "disk": 73}
        assert_same(from_disk, generate(model, ids, reference))


@dtypes
@pytest.mark.parametrize("compression", ["raw", "zstd"])
def test_disk_restore_has_bitwise_equal_logits_with_raw_and_zstd(
    make_model, generate, tokens, tmp_path, dtype, compression
):
    model = make_model("gemma3", dtype)
    reference, ids = DynamicCache(config=model.config), tokens(45)
    with PrefixStore(tmp_path, block_size=16, compression=compression) as store, TieredCache(store) as cache:
        sequences = generate(model, ids, cache).sequences
    generate(model, ids, reference)
    ids = torch.cat([sequences, tokens(7, seed=1)], 1)
    with PrefixStore(tmp_path, block_size=16, compression=compression) as store, TieredCache(store) as cache:
        ours = generate(model, ids, cache)
        assert cache.last_turn.cached_by_tier["disk"] == 52
    assert_same(ours, generate(model, ids, reference))


def test_sliding_window_filled_by_generation_has_bitwise_equal_logits(
    make_model, generate, tokens, store, sliding_family
):
    """The prompt fits the window, generation crosses its edge, and the continuation is longer than the window."""
    model = make_model(sliding_family)
    reference = DynamicCache(config=model.config)
    with TieredCache(store) as cache:
        ids = tokens(10)
        for turn in range(3):
            ours = generate(model, ids, cache, max_new_tokens=12)
            assert_same(ours, generate(model, ids, reference, max_new_tokens=12))
            ids = torch.cat([ours.sequences, tokens(20, seed=turn + 1)], 1)
    with TieredCache(store) as restored:
        ours = generate(model, ids, restored)
        assert restored.last_turn.cached_tokens == ids.shape[1] - 21
        assert_same(ours, generate(model, ids, reference))


@pytest.mark.sample(9)  # of 18
@dtypes
def test_padded_batch_has_bitwise_equal_logits(make_model, generate, tokens, store, family, dtype):
    """Three rows of different lengths; the second turn continues all of them from RAM."""
    model = make_model(family, dtype)
    reference, ids = DynamicCache(config=model.config), tokens(40, rows=3)
    ids[1, :7] = 0
    ids[2, :23] = 0
    with TieredCache(store) as cache:
        ours = generate(model, ids, cache)
    assert_same(ours, generate(model, ids, reference))
    more = torch.cat([ours.sequences, tokens(5, rows=3, seed=1)], 1)
    with TieredCache(store) as restored:
        again = generate(model, more, restored)
        assert [row.cached_tokens for row in restored.last_turn.rows] == [47, 40, 24]
    # Padded columns are masked: they hold zeros here, and K and V of padding in the reference.
    assert_same(again, generate(model, more, reference))


def test_restored_buffers_hold_the_bytes_of_dynamic_cache(make_model, generate, tokens, store):
    model = make_model("qwen3", torch.bfloat16)
    reference, ids = DynamicCache(config=model.config), tokens(40)
    with TieredCache(store) as cache:
        generate(model, ids, cache)
    generate(model, ids, reference)
    with TieredCache(store) as cache:
        cache.begin(model, torch.cat([ids, tokens(9, seed=5)], 1))
        with torch.no_grad():
            model(tokens(9, seed=5), **{CACHE: cache})
        for ours, theirs in zip(cache.layers, reference.layers, strict=True):
            assert torch.equal(ours.keys[:, :, :40], theirs.keys[:, :, :40])
            assert torch.equal(ours.values[:, :, :40], theirs.values[:, :, :40])
