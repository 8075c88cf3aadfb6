"""Attention layers hold the same bytes as transformers' own layers, and move none of them to append."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from kvtier.hf.layers.attention import AttentionLayer, SlidingWindowLayer

appends = st.tuples(st.just("append"), st.integers(1, 400))
crops = st.tuples(st.just("crop"), st.integers(1, 300))
orders = st.tuples(st.just("reorder"), st.integers(0, 99))
selections = st.tuples(st.just("select"), st.integers(0, 99))
masks = st.tuples(st.just("mask"), st.integers(0, 99))
repeats = st.tuples(st.just("repeat"), st.integers(1, 3))


@given(
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.lists(st.one_of(appends, appends, crops, orders, selections, masks, repeats), max_size=12),
)
def test_attention_layer_matches_dynamic_layer_after_every_step(rows, dtype, steps):
    ours, theirs = AttentionLayer(), DynamicLayer()
    random = torch.Generator().manual_seed(0)
    for step, n in [("append", 3), *steps]:
        seeded = torch.Generator().manual_seed(n)
        if step == "append":
            k = torch.randn(rows, 2, n, 4, generator=random).to(dtype)
            v = torch.randn(rows, 3, n, 5, generator=random).to(dtype)
            seen, expected = ours.update(k, v), theirs.update(k, v)
            assert torch.equal(seen[0], expected[0])
            assert torch.equal(seen[1], expected[1])
        elif step == "crop":
            n = min(n, ours.length - 1)  # cropped to 0 tokens, transformers' layer keeps its number of rows
            ours.crop(-n)
            theirs.crop(-n)
        elif step == "reorder":
            order = torch.randint(rows, (rows,), generator=seeded)
            ours.reorder_cache(order)
            theirs.reorder_cache(order)
        elif step in ("select", "mask"):
            chosen = torch.randint(rows, (1 + n % rows,), generator=seeded)
            if step == "mask":
                chosen = torch.arange(rows) <= n % rows
            ours.batch_select_indices(chosen)
            theirs.batch_select_indices(chosen)
            rows = ours.rows
        elif rows * n <= 12:
            ours.batch_repeat_interleave(n)
            theirs.batch_repeat_interleave(n)
            rows = ours.rows
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.rows == theirs.keys.shape[0]
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@given(st.integers(1, 20), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_sliding_layer_returns_the_columns_that_its_mask_sizes_announce(window, appended):
    layer = SlidingWindowLayer(window)
    everything = torch.zeros(1, 2, 0, 4)
    for n in appended:
        new = torch.randn(1, 2, n, 4)
        everything = torch.cat([everything, new], 2)
        size, first = layer.get_mask_sizes(n)
        k, v = layer.update(new, -new)
        assert torch.equal(k, everything[:, :, first:])
        assert torch.equal(v, -k)
        assert k.shape[2] == size == min(everything.shape[2], window - 1 + n)
        assert torch.equal(layer.keys, everything[:, :, max(0, everything.shape[2] - window + 1) :])


@pytest.mark.cpu_only("on accelerators, buffers grow by a thirty-second")
def test_append_moves_the_buffer_only_when_it_grows():
    layer = AttentionLayer()
    layer.update(torch.zeros(1, 1, 1000, 4), torch.zeros(1, 1, 1000, 4))
    moves, at = 0, layer.memory.k.data_ptr()
    for _ in range(2000):
        layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
        moves += layer.memory.k.data_ptr() != at
        at = layer.memory.k.data_ptr()
    assert layer.length == 3000
    assert moves == 2  # 1000 → 1500 → 2250 → 3375


def test_keys_returned_by_update_are_detached():
    k = torch.zeros(1, 1, 4, 4, requires_grad=True)
    seen, _ = AttentionLayer().update(k * 2, k * 3)
    assert not seen.requires_grad
