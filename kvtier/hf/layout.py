"""The layout of a cache: which kind of layer stands where, as a model's config says."""

from __future__ import annotations

from collections.abc import Iterable
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
    LinearAttentionLayer,
)

from kvtier.hf.carriers import carried_states
from kvtier.hf.compat.names import DummyLayer
from kvtier.hf.layers import IndexedLayer, SlidingWindowLayer, WindowLayer, new_window
from kvtier.hf.prefix import MakeMemory
from kvtier.hf.state_layers import HybridLayer, HybridSlidingLayer, StateLayer
from kvtier.hf.states import has_states
from kvtier.window import LayerMemory


class MakeLayerMemory(Protocol):
    """Makes places for K and V that know which layer they are of."""

    def __call__(
        self, index: int, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, sliding_window: int | None, may_be_cold: bool
    ) -> LayerMemory:
        """Return an empty place; ``may_be_cold``: nobody reads views of it after the next layer's update."""


# transformers' kinds of layers → ours.
_KINDS: dict[type, type[WindowLayer] | type[StateLayer]] = {
    DynamicLayer: WindowLayer,
    DynamicSlidingWindowLayer: SlidingWindowLayer,
    DynamicIndexedLayer: IndexedLayer,
    LinearAttentionLayer: StateLayer,
    LinearAttentionAndFullAttentionLayer: HybridLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: HybridSlidingLayer,
}
# Those that come with a model's own code, by the name under which it registers them.
_NAMED_KINDS: dict[str | None, type[WindowLayer]] = {"minimax_m3_sparse": IndexedLayer}


def build_layers(config: PreTrainedConfig, make: MakeLayerMemory | None = None) -> tuple[list[Any], str | None]:
    """Return the layers of a model, and why its K and V cannot be reused if they cannot.

    ``DynamicCache`` reads the config, so that a model has the layers here that it has there. Layers that keep nothing
    and those that are states as a whole stay transformers' own; so do all layers where one is of an unknown kind.

    Args:
        config: of the model.
        make: makes places for K and V; by default, windows.
    """
    carried = carried_states(config)
    if carried is not None:
        return [carried], None
    upstream = DynamicCache(config=config).layers
    kinds = [_KINDS.get(type(layer)) or _NAMED_KINDS.get(getattr(layer, "_layer_type", None)) for layer in upstream]
    own = [layer for layer, kind in zip(upstream, kinds, strict=True) if kind is None and not has_states(layer)]
    places = [layer for layer in own if type(layer) is DummyLayer]
    others = sorted({type(layer).__name__ for layer in own} - {type(layer).__name__ for layer in places})
    if others:
        return upstream, f"layers of kind {', '.join(others)} are not kept"
    shared = getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", 0)
    read_by_others = _last_of_each_kind(upstream) if places or shared else set()
    windows = count()
    layers: list[Any] = []
    for index, (layer, kind) in enumerate(zip(upstream, kinds, strict=True)):
        if kind is None:
            layers.append(layer)
            continue
        arguments = {k: v for k, v in vars(layer).items() if k in ("sliding_window", "number_of_states")}
        if issubclass(kind, WindowLayer):
            sliding_window = arguments.get("sliding_window")
            arguments["make"] = _memory(make, next(windows), sliding_window, index not in read_by_others)
        if issubclass(kind, IndexedLayer):
            for window in ("make_indexer", "make_positions"):
                arguments[window] = _memory(make, next(windows), None, may_be_cold=False)
        layers.append(kind(**arguments))
    return layers, None


def build_layer(index: int, make: MakeLayerMemory | None = None) -> WindowLayer:
    """Return a layer of full attention, whose window is number ``index`` of its cache."""
    return WindowLayer(_memory(make, index))


def windows_of(layers: Iterable[Any]) -> list[WindowLayer]:
    """Return the windows of ``layers``, in the order in which the store keeps them."""
    return [window for layer in layers if isinstance(layer, WindowLayer) for window in layer.windows]


def _memory(
    make: MakeLayerMemory | None, index: int, sliding_window: int | None = None, may_be_cold: bool = True
) -> MakeMemory:
    if make is None:
        return new_window

    def memory(k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> LayerMemory:
        return make(index, k_bhtd, v_bhtd, sliding_window, may_be_cold)

    return memory


def _last_of_each_kind(layers: Iterable[Any]) -> set[int]:
    """Return the layers whose K and V later ones read again, where any do: the last sliding one, the last full one."""
    last = {layer.is_sliding: index for index, layer in enumerate(layers) if hasattr(layer, "is_sliding")}
    return set(last.values())
