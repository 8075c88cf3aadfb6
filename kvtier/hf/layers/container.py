"""The buffers of a cache: its layers, their rows, and the budget they live under. Nothing here knows of turns."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from kvtier.errors import ConfigurationError
from kvtier.hf.layers.attention import AttentionLayer
from kvtier.hf.layers.build import (
    MakeLayerMemory,
    attention_layers_of,
    build_layer,
    build_layers,
    config_values,
    describe_layers,
    upstream_layers,
)
from kvtier.hf.layers.hybrid import HybridLayer, HybridSlidingLayer
from kvtier.hf.layers.states import clone_states, copy_states, has_states, move_rows, rows_of, state_marks
from kvtier.kv.allocation import writable_results
from kvtier.kv.base import LayerMemory
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.page import Page
from kvtier.offload.accounting import TransferStats
from kvtier.offload.manager import OffloadManager

_log = logging.getLogger("kvtier.hf")

OpenOffload = Callable[[Callable[[], int]], OffloadManager | None]
"""``how many layers there are`` → the streams of a cache; None when nothing is ever cold."""


class LayerCache(DynamicCache):
    """A transformers cache of buffers.

    Args:
        open_streams: opens what its layers live on.
    """

    def __init__(self, open_offload: OpenOffload) -> None:
        Cache.__init__(self, layers=[])
        self._offload = open_offload(lambda: len(self._attention_layers))
        self._config: PreTrainedConfig | None = None
        self._no_reuse: str | None = None
        self._config_values: dict[str, Any] = {}
        self._laid_out: list[tuple[type, dict[str, Any]]] = []
        self._warned_of: PreTrainedConfig | None = None
        self._fed_columns = 0
        self._calls: Counter[tuple[str, int, int]] = Counter()
        """``(what, layer, which of its states)`` → how often a model changed states of a layer in the current turn."""

    def __getattr__(self, name: str) -> Any:
        """Say what to do about layers that were deleted; called for attributes that are missing."""
        if name == "layers":
            raise ConfigurationError("the layers of this TieredCache were deleted; call reset(), or make a new one")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    @property
    def _make(self) -> MakeLayerMemory | None:
        return self._offload.layer if self._offload is not None else None

    def _lay_out(self, config: PreTrainedConfig | None) -> None:
        """Let go of what is held, and have empty layers for a model."""
        self._config = None  # until the layers are whole: an interrupt may come at any time
        self._let_go()
        self._no_reuse = None
        if config is not None:
            upstream = upstream_layers(config)
            self._config_values, self._laid_out = config_values(config), describe_layers(upstream)
            self.layers, self._no_reuse = build_layers(config, self._make, upstream)
        self._config = config
        why = self._no_reuse or (None if self._attention_layers else "none of its layers keeps K and V alone")
        if config is not None and why and self._offload is not None and config is not self._warned_of:
            self._warned_of = config
            _log.warning("device_budget has no effect on this model: %s", why)

    def _fits(self, config: PreTrainedConfig) -> bool:
        """Whether the layers are those that ``config`` lays out now: it may have been edited since."""
        if config is not self._config or self._has_grown:
            return False
        values = config_values(config)
        if values != self._config_values:
            if describe_layers(upstream_layers(config)) != self._laid_out:
                return False
            self._config_values = values
        return True

    @property
    def _has_grown(self) -> bool:
        """Whether there are more or fewer layers than the config lays out: a model may append its own."""
        return self._config is not None and len(self.layers) != len(self._laid_out)

    def _let_go(self) -> None:
        for layer in vars(self).get("layers", ()):  # they may have been deleted
            if isinstance(layer, AttentionLayer):
                layer.reset()
        self.layers = []
        self._fed_columns = 0

    @property
    def _attention_layers(self) -> list[AttentionLayer]:
        return attention_layers_of(self.layers)

    @property
    def _states(self) -> dict[int, Any]:
        """Layers that keep what is only valid after one token, by their indices."""
        return {index: layer for index, layer in enumerate(self.layers) if has_states(layer)}

    def _layer(self, layer_idx: int) -> Any:
        """Return a layer. Where no config is known, layers of full attention are made as they are asked for."""
        layers = self.layers
        while len(layers) <= layer_idx:
            layers.append(build_layer(len(self._attention_layers), self._make))
        return layers[layer_idx]

    def _feeding_states(self) -> None:
        """Note that a model is about to change states."""

    # Layers of linear attention tell nobody how many tokens they have seen: one forward pass asks the first of them for
    # its state once, and gives it all new tokens, unless there is only one.
    @torch.compiler.disable
    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return a layer's convolution state; None before the first token.

        Raises:
            ConfigurationError: the cache has no such layer with states.
        """
        self._feeding_states()
        self._check_has_states(layer_idx)
        self._calls["get_conv_state", layer_idx, state_idx] += 1
        if state_idx == 0 and layer_idx == self._first_linear:
            self._fed_columns += 1
        state: torch.Tensor | None = super().get_conv_state(layer_idx, state_idx)
        return state

    @torch.compiler.disable
    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Give a layer ``[batch, channels, new tokens]``; return what the convolution must see.

        Raises:
            ConfigurationError: the cache has no such layer with states.
        """
        self._feeding_states()
        self._check_has_states(layer_idx)
        self._calls["update_conv_state", layer_idx, state_idx] += 1
        if state_idx == 0 and layer_idx == self._first_linear:
            self._fed_columns += conv_states.shape[-1] - 1
        with writable_results():
            seen: torch.Tensor = super().update_conv_state(conv_states.detach(), layer_idx, state_idx, **kwargs)
        return seen

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return a layer's recurrent state; None before the first token.

        Raises:
            ConfigurationError: the cache has no such layer with states.
        """
        self._check_has_states(layer_idx)
        state: torch.Tensor | None = super().get_recurrent_state(layer_idx, state_idx)
        return state

    @torch.compiler.disable
    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Give a layer its new state; return it.

        Raises:
            ConfigurationError: the cache has no such layer with states.
        """
        self._feeding_states()
        self._check_has_states(layer_idx)
        self._calls["update_recurrent_state", layer_idx, state_idx] += 1
        with writable_results():
            state: torch.Tensor = super().update_recurrent_state(
                recurrent_states.detach(), layer_idx, state_idx, **kwargs
            )
        return state

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return whether a layer with states, by default the last one, has seen tokens.

        Raises:
            ConfigurationError: the cache has no such layer with states.
        """
        if layer_idx is None or layer_idx < len(self.layers):
            self._check_has_states(layer_idx)
        state = (layer_idx,) if state_idx is None else (layer_idx, state_idx)
        return bool(super().has_previous_state(*state))

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return whether a layer keeps what ``crop`` needs to take states back."""
        return layer_idx < len(self.layers) and bool(getattr(self.layers[layer_idx], "record_past", False))

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Append ``[batch, new tokens, dim]`` to a layer's indexer; return the indexer's keys of all tokens.

        Raises:
            ConfigurationError: the cache has no such layer with an indexer.
        """
        if layer_idx >= len(self.layers) or not hasattr(self.layers[layer_idx], "update_indexer"):
            raise self._no_layer(layer_idx, "an indexer")
        keys: torch.Tensor = self.layers[layer_idx].update_indexer(indexer_key_states)
        return keys

    def _in_step(self, passes: int, *, ended: bool) -> bool:
        """Whether all layers with states saw the same forward passes of the turn, ``passes`` where buffers count them.

        Layers of one kind are called, and written, equally often in a pass. One that ended early leaves a difference.
        Where the last pass has ``ended``, a layer that has nothing is one that the model does not use: before 5.23,
        Nemotron-H has layers of states in the places of its MLPs.
        """
        seen: dict[tuple[type, int], set[tuple[Any, ...]]] = {}
        lengths = set()
        for index, layer in self._states.items():
            if isinstance(layer, CacheLayerMixin):
                lengths.add(layer.get_seq_length())
            if not isinstance(layer, LinearAttentionCacheLayerMixin):
                continue
            calls = sorted((what, state, n) for (what, of, state), n in self._calls.items() if of == index)
            written = [version for _, version in state_marks(layer)]
            if ended and not calls and not written:
                continue
            seen.setdefault((type(layer), layer.number_of_states), set()).add((*calls, *written))
            asked = self._calls["get_conv_state", index, 0]  # once a pass; some then write the state in place
            if asked and passes and asked != passes:
                return False
        return len(lengths) <= 1 and all(len(each) == 1 for each in seen.values())

    @property
    def _first_linear(self) -> int | None:
        linear = (i for i, layer in enumerate(self.layers) if isinstance(layer, LinearAttentionCacheLayerMixin))
        return next(linear, None)

    def _check_has_states(self, layer_idx: int | None) -> None:
        if layer_idx is None:
            if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers):
                raise self._no_layer(None, "states")
        elif layer_idx >= len(self.layers) or not isinstance(self.layers[layer_idx], LinearAttentionCacheLayerMixin):
            raise self._no_layer(layer_idx, "states")

    def _no_layer(self, layer_idx: int | None, what: str) -> ConfigurationError:
        which = "any layer" if layer_idx is None else f"layer {layer_idx}"
        if self._config is None:
            return ConfigurationError(
                f"{which} of this TieredCache was asked for {what}, but it does not know the model's layers yet: pass "
                "config=model.config to TieredCache(), or call begin(model, input_ids) before the model"
            )
        there = layer_idx is not None and layer_idx < len(self.layers)
        found = f"a {type(self.layers[layer_idx]).__name__}" if there and layer_idx is not None else "no such layer"
        return ConfigurationError(
            f"{which} of this TieredCache was asked for {what}, but the config it was given lays out {found} "
            "there: pass the config of the model that is called, or call begin(model, input_ids) first"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns that ``layer_idx`` holds; where no layer can tell, those that were fed."""
        if self.layers and not any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            return self._fed_columns
        return int(super().get_seq_length(layer_idx))

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the columns that a layer shows at most, or the most of all; -1 where there is no limit."""
        layers = self.layers if layer_idx is None else self.layers[layer_idx : layer_idx + 1]
        return max((int(layer.get_max_length()) for layer in layers if hasattr(layer, "get_max_length")), default=-1)

    @property
    def is_compileable(self) -> bool:
        """Return False: the cache counts, in Python, what it is given."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Return whether ``crop`` can take tokens back from every layer."""
        return all(bool(getattr(layer, "is_croppable", False)) for layer in self.layers)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes the former row ``beam_idx[i]``."""
        self._move_rows(beam_idx, lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        self._move_rows(indices, lambda layer: layer.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies next to each other."""
        rows = torch.arange(self._row_count, device="cpu").repeat_interleave(repeats)
        self._move_rows(rows, lambda layer: layer.batch_repeat_interleave(repeats))

    @property
    def _row_count(self) -> int:
        rows = (layer.rows for layer in self._attention_layers)
        return max((*rows, *map(rows_of, self._states.values())), default=0)

    def _move_rows(self, rows: torch.Tensor, move: Callable[[Any], None]) -> None:
        """Let row ``i`` of every layer be its former row ``rows[i]``."""
        for layer in self.layers:
            if has_states(layer) and not isinstance(layer, (HybridLayer, HybridSlidingLayer)):
                move_rows(layer, lambda states: states[rows.to(states.device)])
            else:
                move(layer)

    def _copy_layers_to(self, twin: LayerCache, memo: dict[int, Any]) -> None:
        """Let ``twin`` hold the same. Buffers are shared until one of the two writes what the other reads.

        Under a budget hot buffers are copied, pages below are shared; the budget is the twin's own.
        """
        if twin._offload is None or self._offload is None:
            for layer in self._attention_layers:
                if isinstance(layer.memory, KVBuffer):
                    # A layer that waits for a prefix may yet move what is behind it.
                    live = layer.length if layer.complete else layer.memory.capacity
                    memo[id(layer.memory)] = layer.memory.share(live)
            for layer in self._states.values():
                clone_states(layer, memo)
            with writable_results():
                twin.layers = copy.deepcopy(self.layers, memo)
            return
        twin._offload.keep_files_of(self._offload)
        while len(twin.layers) < len(self.layers):
            twin.layers.append(build_layer(len(twin._attention_layers), twin._make))
        for ours, theirs in zip(self._attention_layers, twin._attention_layers, strict=True):
            ours.copy_to(theirs, twin._offload)
        for index, layer in self._states.items():
            copy_states(layer, twin.layers[index])

    @property
    def transfers(self) -> TransferStats | None:
        """What streaming has moved since the cache was made; None without a ``device_budget``."""
        return self._offload.transfers.copy() if self._offload is not None else None


def host_pages(memories: Iterable[LayerMemory | None], row: int, pad: int, start: int, stop: int) -> tuple[Page, ...]:
    """Copy the tokens ``[start, stop)`` of a row, whose first token stands in column ``pad``, to the host.

    Of a buffer that no forward pass has filled there is nothing.
    """
    nothing = torch.empty(0, stop - start, 0, device="cpu")
    return tuple(
        Page(nothing, nothing) if memory is None else memory.page(row, pad + start, pad + stop) for memory in memories
    )
