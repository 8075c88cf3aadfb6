"""Hybrid layers: K and V and recurrent states side by side."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from kvtier.hf.layers.attention import AttentionLayer, SlidingWindowLayer, new_layer_buffer
from kvtier.hf.layers.prefix_load import MakeMemory
from kvtier.hf.layers.states import move_rows


class _Hybrid(AttentionLayer):
    """A buffer, and a state as transformers keeps it. Each half is called by name: both have all of these methods."""

    is_compileable = False
    is_croppable: Any = LinearAttentionCacheLayerMixin.is_croppable  # a property; the buffer itself always is

    def reset(self) -> None:
        """Hold nothing."""
        LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)
        AttentionLayer.reset(self)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Begin a buffer for ``(K, V)``, or a state for what is given by name."""
        kind = AttentionLayer if args else LinearAttentionLayer
        kind.lazy_initialization(self, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Let the state keep what ``crop`` needs; the buffer does anyway."""
        LinearAttentionLayer.activate_past_recording(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns; of a state that can only be done where it records its past."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        AttentionLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes the former row ``beam_idx[i]``."""
        _Hybrid.batch_select_indices(self, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        move_rows(self, lambda states: states[indices.to(states.device)])
        AttentionLayer.batch_select_indices(self, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies next to each other."""
        move_rows(self, lambda states: states.repeat_interleave(repeats, 0))
        AttentionLayer.batch_repeat_interleave(self, repeats)


class HybridLayer(_Hybrid, LinearAttentionAndFullAttentionLayer):
    """Full attention and linear attention side by side: a buffer and a state."""

    def __init__(self, make: MakeMemory = new_layer_buffer, number_of_states: int = 1, **kwargs: Any) -> None:
        self.number_of_states = number_of_states
        AttentionLayer.__init__(self, make)


class HybridSlidingLayer(_Hybrid, SlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer):
    """Sliding and linear attention side by side."""

    def __init__(
        self, sliding_window: int, make: MakeMemory = new_layer_buffer, number_of_states: int = 1, **kwargs: Any
    ) -> None:
        self.number_of_states = number_of_states
        SlidingWindowLayer.__init__(self, sliding_window, make)
