"""States are read row by row and put back bit for bit; data that does not fit the layers is refused before use."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from safetensors.torch import load
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from kvtier.hf.layers.build import build_layers
from kvtier.hf.layers.hybrid import HybridLayer
from kvtier.hf.layers.states import UnreadableError, has_states, move_rows, put_states, read_states, rows_of
from tests.support.families import build

DEVICE = torch.get_default_device()


def filled(rows: int = 2, channels: int = 3, seed: int = 0) -> LinearAttentionLayer:
    """A layer that has seen seven tokens."""
    layer, generator = LinearAttentionLayer(), torch.Generator().manual_seed(seed)
    layer.update_conv_state(torch.randn(rows, channels, 7, generator=generator), conv_kernel_size=4)
    layer.update_recurrent_state(torch.randn(rows, 2, channels, 5, generator=generator))
    return layer


def same(a: LinearAttentionLayer, b: LinearAttentionLayer, a_row: int, b_row: int) -> bool:
    pairs = ((a.conv_states, b.conv_states), (a.recurrent_states, b.recurrent_states))
    return all(torch.equal(ours[i][a_row], theirs[i][b_row]) for ours, theirs in pairs for i in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_of_states_is_restored_bit_for_bit(dtype):
    layer, fresh = filled(), LinearAttentionLayer()
    move_rows(layer, lambda states: states.to(dtype))
    put_states({5: fresh}, [read_states({5: layer}, 1)], DEVICE)
    assert rows_of(fresh) == 1
    assert same(fresh, layer, 0, 1)
    for name in ("has_previous_state", "conv_kernel_size", "is_conv_states_initialized", "dtype"):
        assert getattr(fresh, name) == getattr(layer, name), name


def test_read_states_do_not_change_with_the_layer():
    layer, fresh = filled(), LinearAttentionLayer()
    before, kept = read_states({0: layer}, 0), layer.conv_states[0][0].clone()
    layer.conv_states[0].zero_()  # in place, like the kernels of a decoding step
    put_states({0: fresh}, [before], DEVICE)
    assert torch.equal(fresh.conv_states[0][0], kept)


def test_put_states_repeats_each_row_next_to_itself():
    layer, fresh = filled(), LinearAttentionLayer()
    put_states({0: fresh}, [read_states({0: layer}, row) for row in (1, 0)], DEVICE, repeats=3)
    assert rows_of(fresh) == 6
    assert all(same(fresh, layer, row, source) for row, source in enumerate([1, 1, 1, 0, 0, 0]))


def test_put_states_replaces_earlier_states_of_a_layer():
    layer, used = filled(rows=1), filled(rows=4, seed=9)
    put_states({0: used}, [read_states({0: layer}, 0)], DEVICE)
    assert rows_of(used) == 1
    assert same(used, layer, 0, 0)


def test_rows_of_different_positions_are_refused():
    early = LinearAttentionLayer()
    early.update_conv_state(torch.zeros(1, 3, 2), conv_kernel_size=2)
    with pytest.raises(UnreadableError, match="not of one position"):
        put_states({0: LinearAttentionLayer()}, [read_states({0: filled()}, 0), read_states({0: early}, 0)], DEVICE)


def test_states_of_other_layers_are_refused():
    states = read_states({0: filled(), 2: filled()}, 0)
    with pytest.raises(UnreadableError, match="other layers"):
        put_states({0: LinearAttentionLayer()}, [states], DEVICE)
    with pytest.raises(UnreadableError, match="has no"):
        put_states({0: LinearAttentionLayer(), 2: build_layers(build("deepseek_v4").config)[0][0]}, [states], DEVICE)


def test_rows_of_different_shapes_are_refused():
    rows = [read_states({0: filled(channels=3)}, 0), read_states({0: filled(channels=4)}, 0)]
    with pytest.raises(UnreadableError, match="another shape"):
        put_states({0: LinearAttentionLayer()}, rows, DEVICE)


def _with_numbers(states: torch.Tensor, **numbers: object) -> torch.Tensor:
    metadata = {"numbers": json.dumps(numbers)}
    data = safetensors.torch.save(load(states.numpy().tobytes()), metadata)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@pytest.mark.parametrize("number", ["0.update", "0.__class__", "0.conv_states.0.data", "0.has_previous_state.7"])
def test_put_states_refuses_numbers_for_unknown_attributes(number):
    with pytest.raises(UnreadableError, match="has no"):
        put_states({0: LinearAttentionLayer()}, [_with_numbers(read_states({0: filled()}, 0), **{number: 1})], DEVICE)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:7],
        lambda data: data[: len(data) // 2],
        lambda data: b"\xff" * len(data),
        lambda data: b"",
        lambda data: safetensors.torch.save({"0.conv_states.0": torch.zeros(1, 3, 4)}),
        lambda data: safetensors.torch.save({}, {"numbers": "[]"}),
        lambda data: safetensors.torch.save({}, {"numbers": "{" * 100_000}),
    ],
)
def test_put_states_refuses_damaged_bytes(damage):
    data = damage(read_states({0: filled()}, 0).numpy().tobytes())
    states = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(0, dtype=torch.uint8, device="cpu")
    )
    with pytest.raises(UnreadableError):
        put_states({0: LinearAttentionLayer()}, [states], DEVICE)


def test_read_states_refuses_tensors_with_different_numbers_of_rows():
    layer = filled(rows=2)
    layer.recurrent_states[0] = layer.recurrent_states[0][:1]
    with pytest.raises(UnreadableError, match="rows"):
        read_states({0: layer}, 0)


def test_read_states_refuses_a_layer_with_an_unknown_attribute():
    layer = build_layers(build("deepseek_v4").config)[0][0]
    assert has_states(layer)
    layer.something = object()
    with pytest.raises(UnreadableError, match="something"):
        read_states({0: layer}, 0)


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1", "deepseek_v4", "lfm2"])
def test_new_layers_of_a_model_have_states_without_rows(name):
    model = build(name)
    layers = build_layers(model.config)[0]
    reference = DynamicCache(config=model.config)
    assert len(layers) == len(reference.layers)
    states = {i: layer for i, layer in enumerate(layers) if has_states(layer)}
    assert states
    for layer in states.values():
        assert rows_of(layer) == 0


def test_hybrid_layer_moves_rows_of_states_and_keys_together():
    layer = HybridLayer()
    layer.update_conv_state(torch.arange(3.0).view(3, 1, 1).expand(3, 2, 5), conv_kernel_size=4)
    layer.update(torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 5, 2), torch.zeros(3, 1, 5, 2))
    layer.batch_select_indices(torch.tensor([2, 0]))
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 0, 1, 2]))
    expected = torch.tensor([0.0, 2.0, 2.0, 0.0])
    assert torch.equal(layer.conv_states[0][:, 0, -1], expected)
    assert torch.equal(layer.keys[:, 0, 0, 0], expected)
    layer.reset()
    assert rows_of(layer) == 0
    assert layer.keys is None
