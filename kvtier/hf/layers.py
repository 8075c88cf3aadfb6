"""One class per kind of layer: what attention sees of its window, and how the window begins a turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from kvtier.hf.window import PageRun, Window, WindowRun


class Prefix(Protocol):
    """What a layer's window must hold before it takes the first tokens of a turn."""

    columns: int
    rows: int
    in_place: bool
    """The old window already holds every ``WindowRun`` where it belongs."""

    def runs(self, layer: int, row: int) -> Sequence[WindowRun | PageRun]:
        """Return where each known column of ``row`` comes from, in order; columns not named are padding."""

    def filled(self, layer: int) -> None:
        """Note that the layer has taken its runs."""


class WindowLayer(CacheLayerMixin):
    """Full attention. The window holds every token; appending writes in place.

    K and V are detached: the window is for inference. Tensors returned by ``update`` are views of the window and
    stay valid until the next call that changes the layer.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, **kwargs: Any) -> None:
        self.reset()

    def reset(self) -> None:
        """Hold nothing."""
        self._window: Window | None = None
        self._prefix: tuple[Prefix, int] | None = None
        self.length = 0
        self.is_initialized = False

    # The public K and V of a transformers layer are what is held, without spare capacity.
    @property
    def keys(self) -> torch.Tensor | None:
        """``[batch, k_heads, length, k_dim]``, or None before the first token."""
        return None if self._window is None else self._window.k[:, :, : self.length]

    @property
    def values(self) -> torch.Tensor | None:
        """``[batch, v_heads, length, v_dim]``, or None before the first token."""
        return None if self._window is None else self._window.v[:, :, : self.length]

    @property
    def rows(self) -> int:
        """Sequences in the window."""
        return 0 if self._window is None else self._window.rows

    @property
    def complete(self) -> bool:
        """Whether the first ``length`` columns are really there, not still to come from a prefix."""
        return self._prefix is None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make an empty window for K and V of these shapes."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._window = Window(key_states, value_states, 0)
        self.is_initialized = True

    def expect(self, prefix: Prefix, layer: int) -> None:
        """Hold ``prefix`` from now on; its bytes move in the next ``update``."""
        self.length = prefix.columns
        self._prefix = (prefix, layer)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[batch, heads, new tokens, dim]``; return K and V as attention must see them.

        Raises:
            RestoreError: a page of the expected prefix could not be read.
        """
        key_states, value_states = key_states.detach(), value_states.detach()
        new = key_states.shape[-2]
        if self._prefix is not None:
            self._take_prefix(*self._prefix, key_states, value_states)
        elif self._window is None:
            self.lazy_initialization(key_states, value_states)
        window = self._window
        assert window is not None
        begin, end = self.length, self.length + new
        window.reserve(end, live=begin)
        window.write(begin, key_states, value_states)
        self.length = end
        first = self._first_visible(begin)
        return window.k[:, :, first:end], window.v[:, :, first:end]

    def _first_visible(self, begin: int) -> int:
        """Return the first column that new tokens at column ``begin`` attend to."""
        return 0

    def _take_prefix(self, prefix: Prefix, layer: int, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> None:
        """Move the expected prefix into the window, for as many rows as ``k_bhtd`` has."""
        old, columns, batch = self._window, prefix.columns, k_bhtd.shape[0]
        repeats = batch // prefix.rows  # beams and return sequences follow each other
        in_place = prefix.in_place and repeats == 1 and old is not None and old.takes(k_bhtd, v_bhtd)
        capacity = Window.capacity_for(columns + k_bhtd.shape[2])
        window = old if in_place and old is not None else Window(k_bhtd, v_bhtd, capacity)
        if window is old:
            window.reserve(columns, live=min(columns, window.k.shape[2]))
        for row in range(batch):
            done = 0
            for run in prefix.runs(layer, row // repeats):
                if window is not old:
                    window.clear(row, done, run.start)
                if isinstance(run, PageRun):
                    window.write_page(row, run)
                elif window is not old:
                    assert old is not None
                    window.copy_run(row, run, old)
                done = run.stop
            if window is not old:
                window.clear(row, done, columns)
        self.dtype, self.device = k_bhtd.dtype, k_bhtd.device
        self._window, self._prefix, self.is_initialized = window, None, True
        prefix.filled(layer)

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
        if self._window is not None:
            self._window.select(beam_idx, self.length)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        if self._window is not None:
            self._window.select(indices, self.length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies next to each other."""
        if self._window is not None:
            self._window.select(torch.arange(self.rows).repeat_interleave(repeats), self.length)


class SlidingWindowLayer(WindowLayer):
    """Sliding or chunked attention: attention sees the last ``sliding_window - 1`` columns and the new ones.

    The window keeps all columns of the sequence, so that any prefix of it can be kept, cropped and stored.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self._sliding_window_tensor = torch.tensor(sliding_window, dtype=torch.long)

    def _first_visible(self, begin: int) -> int:
        return max(0, begin - self.sliding_window + 1)

    def get_max_length(self) -> int:
        """Return the columns that attention sees at most."""
        return self.sliding_window


def build_layers(config: PreTrainedConfig) -> tuple[list[Any], str | None]:
    """Return the layers of a model, and why its K and V cannot be reused if they cannot.

    ``DynamicCache`` reads the config, so that a model has the layers here that it has there. Kinds that kvtier does
    not keep yet stay transformers' own layers.
    """
    upstream = DynamicCache(config=config).layers
    kept = (DynamicLayer, DynamicSlidingWindowLayer)
    others = sorted({type(layer).__name__ for layer in upstream if type(layer) not in kept})
    if others:
        return upstream, f"layers of kind {', '.join(others)} are not kept yet"
    return [
        SlidingWindowLayer(layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else WindowLayer()
        for layer in upstream
    ], None
