"""The layers of one cache: creation, row selection, offload budget. Independent of turns."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from kvtier.errors import ConfigurationError, UnavailableError
from kvtier.hf.layers.attention import AttentionLayer, SlidingWindowLayer
from kvtier.hf.layers.build import (
    MakeLayerMemory,
    attention_layers_of,
    build_layer,
    build_layers,
    config_values,
    describe_layers,
    upstream_layers,
)
from kvtier.hf.layers.dropped import DroppedColumns
from kvtier.hf.layers.gather import Gather
from kvtier.hf.layers.hybrid import HybridLayer, HybridSlidingLayer
from kvtier.hf.layers.states import clone_states, copy_states, has_states, move_rows, rows_of, state_marks
from kvtier.kv.allocation import writable_results
from kvtier.kv.base import LayerMemory
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.room import Room, WindowRoom
from kvtier.kv.window import Window
from kvtier.offload.manager import OffloadManager
from kvtier.transfer.base import CopyEngine
from kvtier.transfer.engines import Engines, MakeEngine

_log = logging.getLogger("kvtier.hf")

OpenOffload = Callable[[Callable[[], int]], OffloadManager | None]
"""``number of layers`` → the offload manager of a cache's cold layers; None when no layer is ever cold."""


class LayerContainer:
    """The layers of one cache.

    Attributes:
        layers: the layers as in transformers: attention, states, both, or placeholders that keep nothing.
        config: config of the model that the layers are made for; None before the first turn and during ``lay_out``.
        offload: moves the pages of cold layers; None without a budget.
        room: decides how many columns the buffers reserve, without a budget.
        engines: copy between the host and devices, without a budget.
        dropped: copies of columns that sliding layers have dropped in the turn; None when they are not needed.
        no_reuse: why the content of these layers cannot be reused; None when it can.
        fed_columns: columns that were fed, used when no layer counts them.
    """

    def __init__(self, open_offload: OpenOffload, make_engine: MakeEngine, block_tokens: int) -> None:
        self.layers: list[Any] = []
        self._block_tokens = block_tokens
        self.engines = Engines(make_engine)
        self._gathers: list[Gather] = []
        self.dropped: DroppedColumns | None = None
        self.room = Room(lambda: len(self.attention))
        self.offload = open_offload(lambda: len(self.attention))
        self.config: PreTrainedConfig | None = None
        self.no_reuse: str | None = None
        self.fed_columns = 0
        self._config_values: dict[str, Any] = {}
        self._laid_out: list[tuple[type, dict[str, Any]]] = []
        self._warned_of: PreTrainedConfig | None = None
        self._calls: Counter[tuple[str, int, int]] = Counter()
        """``(method, layer, index of the state)`` → number of calls in the current turn."""

    # --- layout -----------------------------------------------------------------------------------------------------

    @property
    def _make(self) -> MakeLayerMemory:
        return self.offload.layer if self.offload is not None else partial(_make_buffer, self.room)

    def lay_out(self, config: PreTrainedConfig | None) -> None:
        """Drop all layers and make empty ones for a model."""
        self.config = None  # until the layers are complete: an interrupt may come at any time
        self.let_go()
        self.no_reuse = None
        if config is not None:
            upstream = upstream_layers(config)
            self._config_values, self._laid_out = config_values(config), describe_layers(upstream)
            self.layers, self.no_reuse = build_layers(config, self._make, upstream, self._block_tokens)
        self.config = config
        why = self.no_reuse or (None if self.attention else "none of its layers keeps K and V alone")
        if config is not None and why and self.offload is not None and config is not self._warned_of:
            self._warned_of = config
            _log.warning("device_budget has no effect on this model: %s", why)

    def fits(self, config: PreTrainedConfig) -> bool:
        """Whether the layers match ``config`` as it is now: it may have been edited since."""
        if config is not self.config or self.has_grown:
            return False
        values = config_values(config)
        if values != self._config_values:
            if describe_layers(upstream_layers(config)) != self._laid_out:
                return False
            self._config_values = values
        return True

    @property
    def has_grown(self) -> bool:
        """Whether there are more or fewer layers than the config lays out: a model may append its own."""
        return self.config is not None and len(self.layers) != len(self._laid_out)

    def close(self) -> None:
        """Release threads, streams, host memory and page files. May be called more than once."""
        self.settle()
        self.engines.close()
        if self.offload is not None:
            self.offload.close()

    def let_go(self) -> None:
        """Drop all layers and release their buffers."""
        for layer in self.layers:
            if isinstance(layer, AttentionLayer):
                layer.reset()
        self.layers = []
        self.dropped = None
        self.fed_columns = 0

    def layer(self, index: int) -> Any:
        """Return a layer. Missing layers, as without a config, are made on demand with full attention."""
        layers = self.layers
        while len(layers) <= index:
            layers.append(build_layer(len(self.attention), self._make))
        return layers[index]

    # --- what is held -----------------------------------------------------------------------------------------------

    @property
    def attention(self) -> list[AttentionLayer]:
        """Layers that keep K and V, in the order in which the store keeps their pages."""
        return attention_layers_of(self.layers)

    @property
    def window(self) -> Window | None:
        """The columns that all sliding layers keep; None when no layer slides."""
        return next((layer.window for _, layer in self.sliding), None)

    @property
    def sliding(self) -> list[tuple[int, SlidingWindowLayer]]:
        """The sliding layers, with their places in ``attention``."""
        return [(n, layer) for n, layer in enumerate(self.attention) if isinstance(layer, SlidingWindowLayer)]

    @property
    def base(self) -> int:
        """The first column that all layers hold."""
        return max((layer.memory.base for _, layer in self.sliding if layer.memory is not None), default=0)

    def keep_dropped(self, dropped: DroppedColumns | None) -> None:
        """Let ``dropped`` take copies of the columns that sliding layers drop from now on; None for no copies."""
        self.dropped = dropped
        for number, layer in self.sliding:
            layer.dropped, layer.number = dropped, number

    @property
    def filled(self) -> list[AttentionLayer]:
        """Attention layers that the model fills in every pass, or has filled already."""
        return [layer for layer in self.attention if layer.is_used or not layer.is_optional]

    @property
    def states(self) -> dict[int, Any]:
        """Layers with states, by their indices."""
        return {index: layer for index, layer in enumerate(self.layers) if has_states(layer)}

    @property
    def row_count(self) -> int:
        """Number of sequences held."""
        rows = (layer.rows for layer in self.attention)
        return max((*rows, *map(rows_of, self.states.values())), default=0)

    @property
    def counts_columns(self) -> bool:
        """Whether any layer counts its columns; True when there is no layer yet."""
        return not self.layers or any(isinstance(layer, CacheLayerMixin) for layer in self.layers)

    @property
    def columns(self) -> int:
        """Columns of the first layer that counts them; if none does, the columns that were fed."""
        if not self.counts_columns:
            return self.fed_columns
        return next((int(layer.get_seq_length()) for layer in self.layers if isinstance(layer, CacheLayerMixin)), 0)

    @property
    def common_columns(self) -> int:
        """Columns that every layer has."""
        return min((layer.length for layer in self.filled), default=self.columns)

    def gather(self, memories: Sequence[LayerMemory | None]) -> Gather | None:
        """Return the copies of a commit beside the computation; None where pages are copied at once."""
        buffers = [memory for memory in memories if memory is not None]
        if not buffers or not all(isinstance(memory, KVBuffer) for memory in buffers):
            return None
        devices = {memory.device for memory in buffers}
        engine = self.side_engine(buffers[0].device) if len(devices) == 1 else None
        if engine is None:
            return None
        self._gathers = [gather for gather in self._gathers if not gather.is_done]
        self._gathers.append(Gather(engine, memories))
        return self._gathers[-1]

    def side_engine(self, device: torch.device) -> CopyEngine | None:
        """Return the engine that copies from ``device`` beside the computation; None for the host."""
        engine = self.engines.on(device)
        return None if engine.device_is_host else engine

    def before_writing(self) -> None:
        """Make kernels from now on wait for copies of committed columns, which they may overwrite."""
        for gather in self._gathers:
            gather.before_writing()

    def settle(self) -> None:
        """Block until committed pages are on the host."""
        while self._gathers:
            with contextlib.suppress(UnavailableError):  # the store says which blocks that costs
                self._gathers.pop().settle()

    def move_rows(self, rows: torch.Tensor, move: Callable[[Any], None]) -> None:
        """Replace row ``i`` of every layer by former row ``rows[i]``; ``move`` does so in one layer with K and V."""
        for layer in self.layers:
            if has_states(layer) and not isinstance(layer, (HybridLayer, HybridSlidingLayer)):
                move_rows(layer, lambda states: states[rows.to(states.device)])
            else:
                move(layer)

    # --- layers with states -----------------------------------------------------------------------------------------

    def calling(self, method: str, index: int, state: int, *, fed: int = 0) -> None:
        """Note a model's call of ``method`` for a state, and ``fed`` further columns.

        These layers do not count tokens. A forward pass asks the first of them for its state once, and gives it all new
        tokens, unless there is only one.

        Raises:
            ConfigurationError: there is no such layer with states.
        """
        self.check_has_states(index)
        self._calls[method, index, state] += 1
        if state == 0 and index == self._first_linear:
            self.fed_columns += fed

    def begin_counting(self, columns: int) -> None:
        """Note that a turn begins after ``columns`` columns."""
        for _, layer in self.sliding:
            if not has_states(layer):
                layer.record_past = False
        self._calls.clear()
        self.fed_columns = columns

    def expect_columns(self, prompt_columns: int, new_columns: int) -> None:
        """Note how many columns the prompt of a turn has, and the most that follow it; 0 where that is not known."""
        self.room.begin_turn(prompt_columns, new_columns)
        if self.offload is not None:
            self.offload.begin_turn(prompt_columns, new_columns)

    def in_step(self, passes: int, *, ended: bool) -> bool:
        """Whether all layers with states saw the same forward passes of the turn: ``passes``, or 0 if not counted.

        A pass calls and writes layers of one kind equally often. An interrupted pass leaves a difference. If the last
        pass has ``ended``, the model does not use a layer without calls and states: before 5.23, Nemotron-H has layers
        of states in the places of its MLPs.
        """
        seen: dict[tuple[type, int], set[tuple[Any, ...]]] = {}
        lengths = set()
        for index, layer in self.states.items():
            if isinstance(layer, CacheLayerMixin):
                lengths.add(layer.get_seq_length())
            if not isinstance(layer, LinearAttentionCacheLayerMixin):
                continue
            calls = sorted((what, state, n) for (what, of, state), n in self._calls.items() if of == index)
            written = [version for _, version in state_marks(layer)]
            if ended and not calls and not written:
                continue
            seen.setdefault((type(layer), layer.number_of_states), set()).add((*calls, *written))
            asked = self._calls["get_conv_state", index, 0]  # once a pass; some models then write the state in place
            if asked and passes and asked != passes:
                return False
        return len(lengths) <= 1 and all(len(each) == 1 for each in seen.values())

    @property
    def _first_linear(self) -> int | None:
        linear = (i for i, layer in enumerate(self.layers) if isinstance(layer, LinearAttentionCacheLayerMixin))
        return next(linear, None)

    def check_has_states(self, layer_idx: int | None) -> None:
        """Check that a layer keeps states; for None, that any layer does.

        Raises:
            ConfigurationError: no such layer keeps states.
        """
        if layer_idx is None:
            if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers):
                raise self.no_layer(None, "states")
        elif layer_idx >= len(self.layers) or not isinstance(self.layers[layer_idx], LinearAttentionCacheLayerMixin):
            raise self.no_layer(layer_idx, "states")

    def no_layer(self, layer_idx: int | None, what: str) -> ConfigurationError:
        """Return the error for a layer that was asked for ``what`` and does not have it."""
        which = "any layer" if layer_idx is None else f"layer {layer_idx}"
        if self.config is None:
            return ConfigurationError(
                f"{which} of this TieredCache was asked for {what}, but it does not know the model's layers yet: pass "
                "config=model.config to TieredCache(), or call begin(model, input_ids) before the model"
            )
        found = "no such layer"
        if layer_idx is not None and layer_idx < len(self.layers):
            found = f"a {type(self.layers[layer_idx]).__name__}"
        return ConfigurationError(
            f"{which} of this TieredCache was asked for {what}, but the config it was given lays out {found} "
            "there: pass the config of the model that is called, or call begin(model, input_ids) first"
        )

    # --- a second cache ---------------------------------------------------------------------------------------------

    def copy_to(self, twin: LayerContainer, memo: dict[int, Any]) -> None:
        """Copy the content to ``twin``. Buffers are shared until one of the two writes columns that the other reads.

        Under a budget hot buffers are copied and pages in lower tiers are shared. The twin has a budget of its own.
        """
        twin.fed_columns, twin._calls = self.fed_columns, self._calls.copy()
        dropped = copy.deepcopy(self.dropped)
        memo[id(self.dropped)] = dropped
        if twin.offload is None or self.offload is None:
            for layer in self.attention:
                if isinstance(layer.memory, KVBuffer):
                    # A layer that waits for a prefix may still move the columns behind it.
                    live = layer.length if layer.complete else layer.memory.capacity
                    memo[id(layer.memory)] = layer.memory.share(live, twin.room)
            for layer in self.states.values():
                clone_states(layer, memo)
            with writable_results():
                twin.layers = copy.deepcopy(self.layers, memo)
            twin.keep_dropped(dropped)
            return
        twin.offload.keep_files_of(self.offload)
        while len(twin.layers) < len(self.layers):
            twin.layers.append(build_layer(len(twin.attention), twin._make))
        for ours, theirs in zip(self.attention, twin.attention, strict=True):
            ours.copy_to(theirs, twin.offload)
        for index, layer in self.states.items():
            copy_states(layer, twin.layers[index])
        twin.keep_dropped(dropped)


def _make_buffer(
    room: Room, index: int, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, window: Window | None, may_be_cold: bool
) -> KVBuffer:
    return KVBuffer.like(k_bhtd, v_bhtd, room if window is None else WindowRoom(room, window.most_columns))
