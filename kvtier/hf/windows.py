"""The windows of a cache: its layers, their rows, and the budget they live under. Nothing here knows of turns."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from kvtier.hf.layers import WindowLayer
from kvtier.hf.layout import MakeLayerMemory, build_layer, build_layers, windows_of
from kvtier.hf.state_layers import HybridLayer, StateLayer
from kvtier.hf.states import copy_states, has_states, move_rows, rows_of
from kvtier.pages import Page
from kvtier.stream.streams import Streams
from kvtier.stream.traffic import Traffic
from kvtier.window import LayerMemory, Window

_log = logging.getLogger("kvtier.hf")

OpenStreams = Callable[[Callable[[], int]], Streams | None]
"""``how many layers there are`` → the streams of a cache; None when nothing is ever cold."""


class WindowCache(DynamicCache):
    """A transformers cache of windows.

    Args:
        open_streams: opens what its layers live on.
    """

    def __init__(self, open_streams: OpenStreams) -> None:
        Cache.__init__(self, layers=[])
        self._streams = open_streams(lambda: len(self._windows))
        self._config: PreTrainedConfig | None = None
        self._no_reuse: str | None = None
        self._warned_of: PreTrainedConfig | None = None
        self._fed_columns = 0

    @property
    def _make(self) -> MakeLayerMemory | None:
        return self._streams.layer if self._streams is not None else None

    def _lay_out(self, config: PreTrainedConfig | None) -> None:
        """Let go of what is held, and have empty layers for a model."""
        self._config = config
        self._let_go()
        self.layers, self._no_reuse = build_layers(config, self._make) if config is not None else ([], None)
        why = self._no_reuse or (None if self._windows else "none of its layers keeps K and V alone")
        if config is not None and why and self._streams is not None and config is not self._warned_of:
            self._warned_of = config
            _log.warning("device_budget has no effect on this model: %s", why)

    def _let_go(self) -> None:
        for layer in self.layers:
            layer.reset()
        self.layers = []

    @property
    def _windows(self) -> list[WindowLayer]:
        return windows_of(self.layers)

    @property
    def _states(self) -> dict[int, Any]:
        """Layers that keep what is only valid after one token, by their indices."""
        return {index: layer for index, layer in enumerate(self.layers) if has_states(layer)}

    @property
    def is_linear(self) -> list[bool]:
        """Return which layers have linear attention and no full attention beside it."""
        return [
            isinstance(layer, LinearAttentionCacheLayerMixin)
            and (not isinstance(layer, HybridLayer) or layer.is_sliding)
            and not isinstance(layer, LinearAttentionAndFullAttentionLayer)
            for layer in self.layers
        ]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[batch, heads, new tokens, dim]`` to a layer; return the K and V that attention must see.

        Raises:
            BudgetError: ``device_budget`` is too small for so many tokens.
            StreamError: a page of a cold layer is lost, or cannot be written.
        """
        while len(self.layers) <= layer_idx:
            self.layers.append(build_layer(len(self._windows), self._make))
        states: tuple[torch.Tensor, torch.Tensor] = self.layers[layer_idx].update(
            key_states, value_states, *args, **kwargs
        )
        return states

    # Layers of linear attention tell nobody how many tokens they have seen: one forward pass asks the first of them for
    # its state once, and gives it all new tokens, unless there is only one.
    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return a layer's convolution state; None before the first token."""
        if state_idx == 0 and layer_idx == next(iter(self._states)):
            self._fed_columns += 1
        state: torch.Tensor | None = super().get_conv_state(layer_idx, state_idx)
        return state

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Give a layer ``[batch, channels, new tokens]``; return what the convolution must see."""
        if state_idx == 0 and layer_idx == next(iter(self._states)):
            self._fed_columns += conv_states.shape[-1] - 1
        seen: torch.Tensor = super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)
        return seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns that ``layer_idx`` holds; where no layer can tell, those that were fed."""
        if self.layers and not any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            return self._fed_columns
        return int(super().get_seq_length(layer_idx))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes the former row ``beam_idx[i]``."""
        self._move_rows(beam_idx, lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        self._move_rows(indices, lambda layer: layer.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies next to each other."""
        rows = torch.arange(self._row_count).repeat_interleave(repeats)
        self._move_rows(rows, lambda layer: layer.batch_repeat_interleave(repeats))

    @property
    def _row_count(self) -> int:
        windows = (layer.rows for layer in self._windows)
        return max((*windows, *map(rows_of, self._states.values())), default=0)

    def _move_rows(self, rows: torch.Tensor, move: Callable[[Any], None]) -> None:
        """Let row ``i`` of every layer be its former row ``rows[i]``."""
        for layer in self.layers:
            if has_states(layer) and not isinstance(layer, StateLayer):
                move_rows(layer, lambda states: states[rows.to(states.device)])
            else:
                move(layer)

    def _copy_layers_to(self, twin: WindowCache, memo: dict[int, Any]) -> None:
        """Let ``twin`` hold the same. Windows are shared until one of the two writes what the other reads.

        Under a budget hot windows are copied, pages below are shared; the budget is the twin's own.
        """
        if twin._streams is None or self._streams is None:
            for layer in self._windows:
                if isinstance(layer.window, Window):
                    # A layer that waits for a prefix may yet move what is behind it.
                    live = layer.length if layer.complete else layer.window.capacity
                    memo[id(layer.window)] = layer.window.share(live)
            twin.layers = copy.deepcopy(self.layers, memo)
            return
        twin._streams.keep_files_of(self._streams)
        while len(twin.layers) < len(self.layers):
            twin.layers.append(build_layer(len(twin._windows), twin._make))
        for ours, theirs in zip(self._windows, twin._windows, strict=True):
            ours.copy_to(theirs, twin._streams)
        for index, layer in self._states.items():
            copy_states(layer, twin.layers[index])

    @property
    def traffic(self) -> Traffic | None:
        """What streaming has moved since the cache was made; None without a ``device_budget``."""
        return self._streams.traffic.copy() if self._streams is not None else None


def host_pages(windows: Iterable[LayerMemory | None], row: int, pad: int, start: int, stop: int) -> tuple[Page, ...]:
    """Copy the tokens ``[start, stop)`` of a row, whose first token stands in column ``pad``, to the host.

    Of a window that no forward pass has filled there is nothing.
    """
    nothing = torch.empty(0, stop - start, 0)
    return tuple(
        Page(nothing, nothing) if window is None else window.page(row, pad + start, pad + stop) for window in windows
    )
