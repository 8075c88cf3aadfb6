"""One class per kind of layer: what attention sees of its window, and how the window begins a turn."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from kvtier.hf.prefix import MakeMemory, TurnPrefix
from kvtier.hf.streamed import StreamedPrefix
from kvtier.stream.layer import StreamedLayer
from kvtier.stream.streams import Streams
from kvtier.window import LayerMemory, Window, first_visible

# Stands for layers that keep nothing; older versions of transformers leave them out.
_Place: Any = getattr(cache_utils, "DummyLayer", None)


def _new_window(k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> Window:
    return Window.like(k_bhtd, v_bhtd, 0)


class WindowLayer(CacheLayerMixin):
    """Full attention. The window holds every token; appending writes in place.

    K and V are detached: the window is for inference. Tensors returned by ``update`` are views of the window and
    stay valid until the next call that changes the layer.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, make: MakeMemory = _new_window, **kwargs: Any) -> None:
        self.make = make
        self.window: LayerMemory | None = None
        self.reset()

    def reset(self) -> None:
        """Hold nothing."""
        if self.window is not None:
            self.window.close()
        self.window = None
        self._prefix: tuple[TurnPrefix, int] | None = None
        self.length = 0
        self.is_initialized = False

    # The public K and V of a transformers layer are what is held, without spare capacity.
    @property
    def keys(self) -> torch.Tensor | None:
        """``[batch, k_heads, length, k_dim]``, or None before the first token."""
        return None if self.window is None else self.window.contents(self.length)[0]

    @property
    def values(self) -> torch.Tensor | None:
        """``[batch, v_heads, length, v_dim]``, or None before the first token."""
        return None if self.window is None else self.window.contents(self.length)[1]

    @property
    def rows(self) -> int:
        """Sequences in the window."""
        return 0 if self.window is None else self.window.rows

    @property
    def complete(self) -> bool:
        """Whether the first ``length`` columns are really there, not still to come from a prefix."""
        return self._prefix is None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make an empty window for K and V of these shapes."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.window = self.make(key_states, value_states)
        self.is_initialized = True

    def expect(self, prefix: TurnPrefix, layer: int) -> None:
        """Hold ``prefix`` from now on; the next ``update`` waits for it."""
        self.length = prefix.columns
        self._prefix = (prefix, layer)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[batch, heads, new tokens, dim]``; return K and V as attention must see them.

        Raises:
            RestoreError: a page of the expected prefix could not be read.
            BudgetError: the budget of the device is too small.
            StreamError: a page of a cold layer is lost, or cannot be written.
        """
        key_states, value_states = key_states.detach(), value_states.detach()
        if self._prefix is not None:
            prefix, layer = self._prefix
            self.window = prefix.take(layer, self.window, key_states, value_states, self.make)
            self._prefix, self.is_initialized = None, True
            self.dtype, self.device = key_states.dtype, key_states.device
        elif self.window is None:
            self.lazy_initialization(key_states, value_states)
        assert self.window is not None
        begin = self.length
        states = self.window.append(begin, key_states, value_states, self._first_visible(begin))
        self.length = begin + key_states.shape[-2]
        return states

    def _first_visible(self, begin: int) -> int:
        """Return the first column that new tokens at column ``begin`` attend to."""
        return 0

    def copy_to(self, twin: WindowLayer, streams: Streams) -> None:
        """Let ``twin`` hold the same on other streams."""
        if self._prefix is not None:  # the twin has no turn in which it could come
            prefix, layer = self._prefix
            assert isinstance(prefix, StreamedPrefix)
            self.window = prefix.complete(layer, self.window, self.make)
            self._prefix = None
        if isinstance(self.window, StreamedLayer):
            twin.window = self.window.twin(streams.deck(self.window.device))
            twin.length, twin.is_initialized = self.length, self.is_initialized
            twin.dtype, twin.device = self.dtype, self.device

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next ``query_length`` tokens see, and the column of the first."""
        first = self._first_visible(self.length)
        return self.length - first + query_length, first

    def get_seq_length(self) -> int:
        """Return the columns held."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: the window grows."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns (transformers passes a negative number)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove.")
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes the former row ``beam_idx[i]``."""
        if self.window is not None:
            self.window.select(beam_idx, self.length)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        if self.window is not None:
            self.window.select(indices, self.length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies next to each other."""
        if self.window is not None:
            self.window.select(torch.arange(self.rows).repeat_interleave(repeats), self.length)


class SlidingWindowLayer(WindowLayer):
    """Sliding or chunked attention: attention sees the last ``sliding_window - 1`` columns and the new ones.

    The window keeps all columns of the sequence, so that any prefix of it can be kept, cropped and stored.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, make: MakeMemory = _new_window, **kwargs: Any) -> None:
        super().__init__(make)
        self.sliding_window = sliding_window
        self._sliding_window_tensor = torch.tensor(sliding_window, dtype=torch.long)

    def _first_visible(self, begin: int) -> int:
        return first_visible(begin, self.sliding_window)

    def get_max_length(self) -> int:
        """Return the columns that attention sees at most."""
        return self.sliding_window


class MakeLayerMemory(Protocol):
    """Makes places for K and V that know which layer they are of."""

    def __call__(
        self, index: int, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, sliding_window: int | None, may_be_cold: bool
    ) -> LayerMemory:
        """Return an empty place; ``may_be_cold``: nobody reads views of it after the next layer's update."""


def build_layers(config: PreTrainedConfig, make: MakeLayerMemory | None = None) -> tuple[list[Any], str | None]:
    """Return the layers of a model, and why its K and V cannot be reused if they cannot.

    ``DynamicCache`` reads the config, so that a model has the layers here that it has there. Kinds that kvtier does
    not keep yet stay transformers' own layers.

    Args:
        config: of the model.
        make: makes places for K and V; by default, windows.
    """
    upstream = DynamicCache(config=config).layers
    places = [layer for layer in upstream if type(layer) is _Place]  # of layers that read the K and V of others
    upstream = [layer for layer in upstream if type(layer) is not _Place]
    kept = (DynamicLayer, DynamicSlidingWindowLayer)
    others = sorted({type(layer).__name__ for layer in upstream if type(layer) not in kept})
    if others:
        return DynamicCache(config=config).layers, f"layers of kind {', '.join(others)} are not kept yet"
    windows = [layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None for layer in upstream]
    shared = getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", 0)
    read_by_others = _last_of_each_kind(windows) if places or shared else set()
    layers = [build_layer(index, window, make, index not in read_by_others) for index, window in enumerate(windows)]
    return [*layers, *places], None


def build_layer(
    index: int, sliding_window: int | None = None, make: MakeLayerMemory | None = None, may_be_cold: bool = True
) -> WindowLayer:
    """Return layer ``index``, sliding if it has a ``sliding_window``."""
    memory: MakeMemory = _new_window
    if make is not None:

        def memory(k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> LayerMemory:
            return make(index, k_bhtd, v_bhtd, sliding_window, may_be_cold)

    return WindowLayer(memory) if sliding_window is None else SlidingWindowLayer(sliding_window, memory)


def _last_of_each_kind(windows: list[int | None]) -> set[int]:
    """Return the layers whose K and V later ones read again, where any do: the last sliding one, the last full one."""
    return {max(i for i, w in enumerate(windows) if (w is None) == full) for full in {w is None for w in windows}}
