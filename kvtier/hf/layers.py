"""One class per kind of layer: what attention sees of its windows, and how a window begins a turn."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
)

from kvtier.hf.prefix import MakeMemory, TurnPrefix
from kvtier.hf.streamed import StreamedPrefix
from kvtier.stream.layer import StreamedLayer
from kvtier.stream.streams import Streams
from kvtier.window import LayerMemory, Window, first_visible


def new_window(k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> Window:
    """Return an empty window for K and V like these, ``[batch, heads, tokens, dim]`` each."""
    return Window.like(k_bhtd, v_bhtd, 0)


class WindowLayer(CacheLayerMixin):
    """Full attention. The window holds every token; appending writes in place.

    K and V are detached: the window is for inference. Tensors returned by ``update`` are views of the window and
    stay valid until the next call that changes the layer.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, make: MakeMemory = new_window, *, is_optional: bool = False, **kwargs: Any) -> None:
        self.make = make
        self.is_optional = is_optional
        self.window: LayerMemory | None = None
        self.reset()

    def reset(self) -> None:
        """Hold nothing."""
        if self.window is not None:
            self.window.close()
        self.window = None
        self._prefix: tuple[TurnPrefix, int] | None = None
        self._empty_prefix: TurnPrefix | None = None
        self.length = 0
        self.is_initialized = False

    @property
    def windows(self) -> tuple[WindowLayer, ...]:
        """All windows that belong to this layer, in the order in which the store keeps them."""
        return (self,)

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
    def is_used(self) -> bool:
        """Whether anything is in the window, or will be: not every model fills every window that ``is_optional``."""
        return self.window is not None or self._prefix is not None

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
        """Hold ``prefix`` from now on; the next ``update`` waits for it. It has nothing for windows that stay empty."""
        self.length = prefix.columns
        if self.window is not None or prefix.brings(layer):
            self._prefix = (prefix, layer)
        else:
            self._empty_prefix = prefix

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
            if self._empty_prefix is not None:
                raise self._empty_prefix.reject("a layer that had nothing when the prefix was kept has something now")
            self.lazy_initialization(key_states, value_states)
        assert self.window is not None
        begin = self.length
        states = self.window.append(begin, key_states, value_states, self._first_visible(begin))
        self.length = begin + key_states.shape[-2]
        return states

    def _first_visible(self, begin: int) -> int:
        """Return the first column that new tokens at column ``begin`` attend to."""
        return 0

    def all_keys(self) -> torch.Tensor | None:
        """Return ``keys``, those of an expected prefix too: the first tokens of a turn are still to come.

        Raises:
            RestoreError: a page could not be read, or does not fit; its block was discarded.
        """
        if self._prefix is not None:
            prefix, layer = self._prefix
            like = self.window.contents(0) if self.window is not None else None
            self.update(*prefix.nothing(layer, like))
        return self.keys

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

    def __init__(self, sliding_window: int, make: MakeMemory = new_window, **kwargs: Any) -> None:
        super().__init__(make)
        self.sliding_window = sliding_window
        self._sliding_window_tensor = torch.tensor(sliding_window, dtype=torch.long)

    def _first_visible(self, begin: int) -> int:
        return first_visible(begin, self.sliding_window)

    def get_max_length(self) -> int:
        """Return the columns that attention sees at most."""
        return self.sliding_window


class IndexedLayer(WindowLayer):
    """Full attention to the keys that an indexer chooses. The indexer's own keys are in a second window.

    Some models have the first such layer keep the positions of all tokens, too, for their indexers: in a third one.
    """

    def __init__(
        self,
        make: MakeMemory = new_window,
        make_indexer: MakeMemory = new_window,
        make_positions: MakeMemory = new_window,
        **kwargs: Any,
    ) -> None:
        # Layers may share what one of them has chosen.
        self.indexer = WindowLayer(make_indexer, is_optional=True)
        self.positions = WindowLayer(make_positions, is_optional=True)
        super().__init__(make)

    def reset(self) -> None:
        """Hold nothing."""
        super().reset()
        self.indexer.reset()
        self.positions.reset()

    @property
    def windows(self) -> tuple[WindowLayer, ...]:
        """The window of K and V, that of the indexer's keys, and that of positions."""
        return (self, self.indexer, self.positions)

    @property
    def indexer_position_ids(self) -> torch.Tensor | None:
        """``[dimensions, batch, length]``, as the model has set it; None where it has not."""
        held = self.positions.all_keys()
        return None if held is None else held[:, 0].permute(2, 0, 1)

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: torch.Tensor) -> None:
        new = positions[..., self.positions.length :].permute(1, 2, 0)[:, None]
        self.positions.update(new, new[..., :0])

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Append ``[batch, new tokens, dim]``; return the indexer's keys of all tokens."""
        return self.update_index(indexer_key_states[:, None])[:, 0]

    def update_index(self, idx_k: torch.Tensor) -> torch.Tensor:
        """Append ``[batch, heads, new tokens, dim]``; return the indexer's keys of all tokens."""
        return self.indexer.update(idx_k, idx_k[..., :0])[0]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns."""
        super().crop(tokens_to_remove)
        self.indexer.crop(tokens_to_remove)
        self.positions.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes the former row ``beam_idx[i]``."""
        super().reorder_cache(beam_idx)
        self.indexer.reorder_cache(beam_idx)
        self.positions.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        super().batch_select_indices(indices)
        self.indexer.batch_select_indices(indices)
        self.positions.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies next to each other."""
        super().batch_repeat_interleave(repeats)
        self.indexer.batch_repeat_interleave(repeats)
        self.positions.batch_repeat_interleave(repeats)
