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
from kvtier.hf.layers.loads.prefix_load import MakeMemory
from kvtier.hf.layers.states import move_rows
from kvtier.kv.window import Window


class _Hybrid(AttentionLayer):
    """A buffer, and a state as in transformers. Both base classes are called by name: both define all methods here."""

    is_compileable = False
    is_croppable: Any = LinearAttentionCacheLayerMixin.is_croppable  # a property; the buffer is always croppable

    def reset(self) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)
        AttentionLayer.reset(self)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make an empty buffer for positional ``(K, V)``, or a state for keyword arguments."""
        kind = AttentionLayer if args else LinearAttentionLayer
        kind.lazy_initialization(self, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Record past states for ``crop``, and keep columns that are no longer seen."""
        LinearAttentionLayer.activate_past_recording(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns. The state must have recorded its past."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        AttentionLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        _Hybrid.batch_select_indices(self, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        move_rows(self, lambda states: states[indices.to(states.device)])
        AttentionLayer.batch_select_indices(self, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
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
        self,
        sliding_window: int,
        make: MakeMemory = new_layer_buffer,
        number_of_states: int = 1,
        window: Window | None = None,
        **kwargs: Any,
    ) -> None:
        self.number_of_states = number_of_states
        SlidingWindowLayer.__init__(self, sliding_window, make, window)

    def reset(self) -> None:
        """Drop all content."""
        _Hybrid.reset(self)
        self.dropped, self.number = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns. The state must have recorded its past."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        SlidingWindowLayer.crop(self, tokens_to_remove)
