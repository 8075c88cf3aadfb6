"""Layers of a cache, of the kinds that the config of a model asks for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from kvtier.hf.compat.external_state import external_states
from kvtier.hf.compat.names import DummyLayer
from kvtier.hf.layers.attention import AttentionLayer, IndexedLayer, SlidingWindowLayer, new_layer_buffer
from kvtier.hf.layers.hybrid import HybridLayer, HybridSlidingLayer
from kvtier.hf.layers.loads.prefix_load import MakeMemory
from kvtier.hf.layers.states import has_states
from kvtier.kv.base import LayerMemory
from kvtier.kv.window import Window


class MakeLayerMemory(Protocol):
    """Makes memories for K and V of a given layer."""

    def __call__(
        self, index: int, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, window: Window | None, may_be_cold: bool
    ) -> LayerMemory:
        """Return an empty memory; ``may_be_cold``: views of it are not read after the next layer's update."""


# transformers' kinds of layers → kvtier's. Layers with only states stay transformers' own.
_KINDS: dict[type, type[AttentionLayer]] = {
    DynamicLayer: AttentionLayer,
    DynamicSlidingWindowLayer: SlidingWindowLayer,
    DynamicIndexedLayer: IndexedLayer,
    LinearAttentionAndFullAttentionLayer: HybridLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: HybridSlidingLayer,
}
# Kinds of layers in a model's own code, by their registered name.
_NAMED_KINDS: dict[str | None, type[AttentionLayer]] = {"minimax_m3_sparse": IndexedLayer}


def _dory_loops(config: Any) -> tuple[int, int, int]:
    loops = config.n_recurrent_loops if config.recurrent_kv_cache_mode == "per_loop" else 1
    return config.n_input_layers, config.n_input_layers + config.n_recurrent_layers, loops


def _inkling_loops(config: Any) -> tuple[int, int, int]:
    return config.loop_layer_index_start, config.loop_layer_index_end, config.loop_num_passes


# Models that run some of their layers several times, and append copies of them to a cache with as many layers as the
# model: the first layer, the layer after the last, and the number of passes.
_LOOPS: dict[str, Callable[[Any], tuple[int, int, int]]] = {"dory": _dory_loops, "inkling2_loop_text": _inkling_loops}


def upstream_layers(config: PreTrainedConfig) -> list[Any]:
    """Return empty transformers layers for a cache of a model, including layers that the model appends."""
    carried = external_states(config)
    if carried is not None:
        return [carried]
    layers: list[Any] = DynamicCache(config=config).layers
    text = config.get_text_config(decoder=True)
    loops = _LOOPS.get(text.model_type)
    if loops is not None:
        first, end, passes = loops(text)
        layers += [copy.deepcopy(layer) for layer in layers[first:end] * (passes - 1)]
    return layers


def build_layers(
    config: PreTrainedConfig,
    make: MakeLayerMemory | None = None,
    upstream: list[Any] | None = None,
    block_tokens: int = 1,
) -> tuple[list[Any], str | None]:
    """Return the layers of a model, and why its K and V cannot be reused; None when they can.

    ``DynamicCache`` reads the config, so that both caches have the same layers. Layers that keep nothing and layers
    with only states stay transformers' own; so do all layers if one is of an unknown kind.

    Args:
        config: config of the model.
        make: makes memories for K and V; by default, buffers.
        upstream: its ``upstream_layers``, some of which are used; by default, new ones.
        block_tokens: tokens of a block of the store.
    """
    upstream = upstream_layers(config) if upstream is None else upstream
    kinds = [_KINDS.get(type(layer)) or _NAMED_KINDS.get(getattr(layer, "_layer_type", None)) for layer in upstream]
    own = [layer for layer, kind in zip(upstream, kinds, strict=True) if kind is None and not has_states(layer)]
    places = [layer for layer in own if type(layer) is DummyLayer]
    others = sorted({type(layer).__name__ for layer in own} - {type(layer).__name__ for layer in places})
    if others:
        return upstream, f"layers of kind {', '.join(others)} are not kept"
    text = config.get_text_config(decoder=True)
    shared = getattr(text, "num_kv_shared_layers", 0)
    read_by_others = _last_of_each_kind(upstream) if places or shared else set()
    widths = [layer.sliding_window for layer, kind in zip(upstream, kinds, strict=True) if kind and layer.is_sliding]
    # All sliding layers keep the same columns, so that a prompt can go on in all of them or in none.
    window = Window(max(widths), block_tokens) if widths else None
    numbers = count()
    layers: list[Any] = []
    for index, (layer, kind) in enumerate(zip(upstream, kinds, strict=True)):
        if kind is None:
            layers.append(layer)
            continue
        arguments = {k: v for k, v in vars(layer).items() if k in ("sliding_window", "number_of_states")}
        if "sliding_window" in arguments:
            arguments["window"] = window
        arguments["make"] = _memory(make, next(numbers), arguments.get("window"), index not in read_by_others)
        if issubclass(kind, IndexedLayer):
            for name in ("make_indexer", "make_positions"):
                arguments[name] = _memory(make, next(numbers), None, may_be_cold=False)
        layers.append(kind(**arguments))
    if text.model_type == "dory" and text.recurrent_kv_cache_mode == "last_loop":
        return layers, (
            'with recurrent_kv_cache_mode="last_loop", early loops of this model see other K and V of a cached prefix '
            "than of one that is computed at once"
        )
    return layers, None


def describe_layers(upstream: Iterable[Any]) -> list[tuple[type, dict[str, Any]]]:
    """Return the class and the plain values of each empty layer: equal for configs with equal layers."""
    kept = (bool, int, float, str, dict, type(None))
    return [
        (type(layer), {k: list(v) if isinstance(v, dict) else v for k, v in vars(layer).items() if isinstance(v, kept)})
        for layer in upstream
    ]


def config_values(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the current values of a config that can affect its layers, for comparison with later values.

    Takes about a twentieth of the time of making the layers. The text config is compared by identity, other nested
    configs are not compared.
    """
    text = config.get_text_config(decoder=True)
    values: dict[str, Any] = {"config": id(config), "text_config": id(text)}
    for name, value in vars(text).items():
        if isinstance(value, PreTrainedConfig):
            continue
        if isinstance(value, (dict, list)):
            value = copy.deepcopy(value) if isinstance(value, dict) else list(value)
        values[name] = value
    return values


def build_layer(index: int, make: MakeLayerMemory | None = None) -> AttentionLayer:
    """Return a layer of full attention, with buffer number ``index`` of its cache."""
    return AttentionLayer(_memory(make, index))


def attention_layers_of(layers: Iterable[Any]) -> list[AttentionLayer]:
    """Return the buffers of ``layers``, in the order in which the store keeps them."""
    return [part for layer in layers if isinstance(layer, AttentionLayer) for part in layer.parts]


def _memory(
    make: MakeLayerMemory | None, index: int, window: Window | None = None, may_be_cold: bool = True
) -> MakeMemory:
    if make is None:
        return new_layer_buffer

    def memory(k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> LayerMemory:
        return make(index, k_bhtd, v_bhtd, window, may_be_cold)

    return memory


def _last_of_each_kind(layers: Iterable[Any]) -> set[int]:
    """Return the layers whose K and V later layers may read again: the last sliding layer and the last full one."""
    last = {layer.is_sliding: index for index, layer in enumerate(layers) if hasattr(layer, "is_sliding")}
    return set(last.values())
