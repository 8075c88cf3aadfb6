"""Layers with states of linear attention or convolutions, alone or beside a window."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    LinearAttentionLayer,
)

from kvtier.hf.layers import SlidingWindowLayer, WindowLayer, new_window
from kvtier.hf.prefix import MakeMemory
from kvtier.hf.states import move_rows


class StateLayer(LinearAttentionLayer):
    """Linear attention or a convolution: a state, as transformers keeps it."""

    def reset(self) -> None:
        """Hold nothing."""
        LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes the former row ``beam_idx[i]``."""
        StateLayer.batch_select_indices(self, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        move_rows(self, lambda states: states[indices.to(states.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies next to each other."""
        move_rows(self, lambda states: states.repeat_interleave(repeats, 0))


class HybridLayer(StateLayer, WindowLayer):
    """Full attention and linear attention side by side: a window and a state."""

    is_compileable = False

    def __init__(self, make: MakeMemory = new_window, number_of_states: int = 1, **kwargs: Any) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        WindowLayer.__init__(self, make)

    def reset(self) -> None:
        """Hold nothing."""
        StateLayer.reset(self)
        WindowLayer.reset(self)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Begin a window for ``(K, V)``, or a state for what is given by name."""
        kind = WindowLayer if args else LinearAttentionLayer
        kind.lazy_initialization(self, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns; of a state that can only be done where it records its past."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        WindowLayer.crop(self, tokens_to_remove)

    def get_max_length(self) -> int:
        """Return what the window says."""
        return WindowLayer.get_max_length(self)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes the former row ``beam_idx[i]``."""
        StateLayer.reorder_cache(self, beam_idx)
        WindowLayer.reorder_cache(self, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        StateLayer.batch_select_indices(self, indices)
        WindowLayer.batch_select_indices(self, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies next to each other."""
        StateLayer.batch_repeat_interleave(self, repeats)
        WindowLayer.batch_repeat_interleave(self, repeats)


class HybridSlidingLayer(HybridLayer, SlidingWindowLayer):
    """Sliding and linear attention side by side."""

    is_sliding = True

    def __init__(
        self, sliding_window: int, make: MakeMemory = new_window, number_of_states: int = 1, **kwargs: Any
    ) -> None:
        HybridLayer.__init__(self, make, number_of_states)
        self.sliding_window = sliding_window
        self._sliding_window_tensor = torch.tensor(sliding_window, dtype=torch.long)

    def get_max_length(self) -> int:
        """Return what the window says."""
        return SlidingWindowLayer.get_max_length(self)
