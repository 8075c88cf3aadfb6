"""LayerMarks: whether the layers of a cache are unchanged since the end of a turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtier.hf.layers.build import attention_layers_of
from kvtier.hf.layers.states import has_states, same_marks, state_marks


class LayerMarks:
    """The current content of layers, in a form that costs nothing while they are used.

    Every change counts: through the cache, through a layer, or in place in a state tensor. Only a crop of buffers does
    not count, because their length shows it. Replaced state tensors live as long as their marks.

    Args:
        layers: layers of a cache.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._attention_layers = [(memory, memory.changes) for memory in attention_layers_of(layers)]
        self._states = [(layer, state_marks(layer)) for layer in layers if has_states(layer)]

    def still_hold(self, layers: Sequence[Any]) -> bool:
        """Whether ``layers`` are the same, and unchanged."""
        attention, states = attention_layers_of(layers), [layer for layer in layers if has_states(layer)]
        return (
            len(attention) == len(self._attention_layers)
            and len(states) == len(self._states)
            and all(a is b and a.changes == n for a, (b, n) in zip(attention, self._attention_layers, strict=True))
            and all(a is b and same_marks(state_marks(a), m) for a, (b, m) in zip(states, self._states, strict=True))
        )
