"""Attention layers (full, sliding and indexed): their visible columns, and the loading of a prefix."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from kvtier.errors import PromptError
from kvtier.hf.layers.dropped import DroppedColumns
from kvtier.hf.layers.loads.offloaded_load import OffloadedPrefixLoad
from kvtier.hf.layers.loads.prefix_load import MakeMemory, PrefixLoad
from kvtier.kv.base import LayerMemory, first_visible
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.window import Window
from kvtier.offload.layer import OffloadedLayer
from kvtier.offload.manager import OffloadManager


def new_layer_buffer(k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> KVBuffer:
    """Return an empty buffer for K and V like these, ``[batch, heads, tokens, dim]`` each."""
    return KVBuffer.like(k_bhtd, v_bhtd)


class AttentionLayer(DynamicLayer):
    """Full attention. The buffer holds every token; appending writes in place.

    K and V are detached: the buffer is for inference. Tensors returned by ``update`` are views of the buffer and
    stay valid until the next call that changes the layer. A ``DynamicLayer`` by type only: no code of it is used.

    Attributes:
        memory: memory of K and V; None before the first token, and while a whole prefix is still expected.
        length: columns held, including an expected prefix.
        changes: number of appends, row moves and resets.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, make: MakeMemory = new_layer_buffer, *, is_optional: bool = False, **kwargs: Any) -> None:
        self.make = make
        self.is_optional = is_optional
        self.memory: LayerMemory | None = None
        self.changes = 0
        self.reset()

    def reset(self) -> None:
        """Drop all content."""
        if self.memory is not None:
            self.memory.close()
        self.memory = None
        self._prefix: tuple[PrefixLoad, int] | None = None
        self._empty_prefix: PrefixLoad | None = None
        self._came_early = False
        self.length = 0
        self.changes += 1

    @property
    def parts(self) -> tuple[AttentionLayer, ...]:
        """All buffers that belong to this layer, in the order in which the store keeps them."""
        return (self,)

    # The public K and V of a transformers layer are the columns held, without spare capacity. Some models read them
    # before the first update of a pass: reading then waits for the expected prefix.
    @property
    def keys(self) -> torch.Tensor | None:
        """``[batch, k_heads, visible columns, k_dim]``, or None before the first token.

        Raises:
            RestoreError: a page of an expected prefix could not be read, or does not fit.
        """
        self.bring_prefix()
        return None if self.memory is None else self.memory.contents(self.length, self._first_visible(self.length))[0]

    @property
    def values(self) -> torch.Tensor | None:
        """``[batch, v_heads, visible columns, v_dim]``, or None before the first token.

        Raises:
            RestoreError: a page of an expected prefix could not be read, or does not fit.
        """
        self.bring_prefix()
        return None if self.memory is None else self.memory.contents(self.length, self._first_visible(self.length))[1]

    @property
    def is_initialized(self) -> bool:
        """Whether ``keys`` and ``values`` are tensors."""
        return self.is_used

    @property
    def rows(self) -> int:
        """Number of sequences in the buffer."""
        return 0 if self.memory is None else self.memory.rows

    @property
    def is_used(self) -> bool:
        """Whether the buffer has content or expects a prefix. Models may leave ``is_optional`` buffers empty."""
        return self.memory is not None or self._prefix is not None

    @property
    def complete(self) -> bool:
        """Whether the first ``length`` columns are in the buffer, not expected from a prefix."""
        return self._prefix is None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make an empty buffer for K and V of these shapes."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.memory = self.make(key_states, value_states)

    def expect(self, prefix: PrefixLoad, layer: int) -> None:
        """Expect ``prefix``; the next ``update`` waits for it. It has no pages for buffers that stay empty."""
        self.length = prefix.columns
        if self.memory is not None or prefix.brings(layer):
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
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        if self._prefix is not None or self.memory is None or self._came_early:
            self._prepare(key_states, value_states)
        assert self.memory is not None
        begin = self.length
        self.changes += 1  # first: an interrupt may come at any time
        if self.is_sliding:
            self._drop_unseen(begin, key_states.shape[2])
        states = self.memory.append(begin, key_states, value_states, self._first_visible(begin))
        self.length = begin + key_states.shape[2]
        return states

    def _prepare(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Prepare the buffer for the first K and V of a turn, with the expected prefix in it.

        Raises:
            RestoreError: a page of the expected prefix could not be read, or does not fit.
        """
        if self._prefix is not None:
            prefix, layer = self._prefix
            self.memory = prefix.take(layer, self.memory, key_states, value_states, self.make)
            self._prefix = None
            self.dtype, self.device = key_states.dtype, key_states.device
        elif self.memory is None:
            if self._empty_prefix is not None:
                raise self._empty_prefix.reject("a layer that had nothing when the prefix was kept has something now")
            self.lazy_initialization(key_states, value_states)
        elif self._came_early:  # to the model's device; this layer may be on another
            self._came_early = False
            if self.memory.device != key_states.device:
                base = self.memory.base
                k, v = (part.to(key_states.device) for part in self.memory.contents(self.length, base))
                moved = self.make(key_states, value_states)
                moved.begin_at(base)
                moved.append(base, k, v, base)
                self.memory.close()
                self.memory, self.device = moved, key_states.device

    def _first_visible(self, begin: int) -> int:
        """Return the first column that new tokens at column ``begin`` attend to."""
        return 0

    def _drop_unseen(self, begin: int, columns: int) -> None:
        """Drop columns that no token from column ``begin`` on sees, before ``columns`` are appended."""

    def bring_prefix(self) -> None:
        """Load the expected prefix now, before any new token.

        Raises:
            RestoreError: a page could not be read, or does not fit.
        """
        if self._prefix is not None:
            prefix, layer = self._prefix
            self._prepare(*prefix.nothing(layer, self.memory.contents(0) if self.memory is not None else None))
            self._came_early = True

    def copy_to(self, twin: AttentionLayer, offload: OffloadManager) -> None:
        """Copy the content to ``twin``, whose cache has the manager ``offload``."""
        if self._prefix is not None:  # the twin has no turn that could load it
            prefix, layer = self._prefix
            assert isinstance(prefix, OffloadedPrefixLoad)
            self.memory = prefix.complete(layer, self.memory, self.make)
            self._prefix = None
        if isinstance(self.memory, OffloadedLayer):
            twin.memory = self.memory.twin(offload.device_memory(self.memory.device))
            twin.length = self.length
            twin.dtype, twin.device = self.dtype, self.device

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that the next ``query_length`` tokens see, and the column of the first key."""
        first = self._first_visible(self.length)
        return self.length - first + query_length, first

    def get_seq_length(self) -> int:
        """Return the columns held."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: the buffer grows."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns (transformers passes a negative number)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove.")
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes the former row ``beam_idx[i]``."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies next to each other."""
        self._select(torch.arange(self.rows, device="cpu").repeat_interleave(repeats))

    def _select(self, rows: torch.Tensor) -> None:
        if self.memory is not None:
            self.changes += 1
            self.memory.select(rows, self.length)


class SlidingWindowLayer(AttentionLayer, DynamicSlidingWindowLayer):
    """Sliding or chunked attention: attention sees the last ``sliding_window - 1`` columns and the new ones.

    The buffer drops the columns before them, a few at a time. After ``activate_past_recording``, it drops columns only
    in ``crop``.

    Attributes:
        window: the columns to keep.
        dropped: takes copies of columns that are about to be dropped; None where nothing of them is needed.
        number: the number of this layer for ``dropped``.
        record_past: whether columns are dropped in ``crop`` only.
    """

    is_sliding = True

    def __init__(
        self, sliding_window: int, make: MakeMemory = new_layer_buffer, window: Window | None = None, **kwargs: Any
    ) -> None:
        self.window = window or Window(sliding_window)
        self.sliding_window = sliding_window
        AttentionLayer.__init__(self, make)
        self._sliding_window_tensor = torch.tensor(sliding_window, dtype=torch.long, device="cpu")

    def _first_visible(self, begin: int) -> int:
        return first_visible(begin, self.sliding_window)

    def get_max_length(self) -> int:
        """Return the largest number of columns that attention sees."""
        return self.sliding_window

    def reset(self) -> None:
        """Drop all content."""
        AttentionLayer.reset(self)
        self.record_past = False
        self.dropped: DroppedColumns | None = None
        self.number = 0

    def activate_past_recording(self) -> None:
        """Keep columns that are no longer seen until ``crop``, which may go back to them."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns (transformers passes a negative number).

        The buffer may have dropped columns that are visible from there. Only a new turn can go on then.
        """
        AttentionLayer.crop(self, tokens_to_remove)
        if self.record_past:
            self._drop(self.length, 0)

    def drop_at_rest(self) -> None:
        """Drop all but the last columns, with a few more to go back to by ``crop``."""
        first = self.length - self.window.most_columns
        if self.memory is not None and self.complete and first > self.memory.base:
            self._trim(self.memory, first, self.length)

    def _drop_unseen(self, begin: int, columns: int) -> None:
        memory = self.memory
        if memory is not None and memory.base > self._first_visible(begin):
            raise PromptError(
                f"this cache was cropped to {begin} tokens, but a sliding layer has dropped the columns before "
                f"{memory.base}, some of which the next token would see. Call begin(model, input_ids) or generate(): "
                "they load what is missing. Or call activate_past_recording() before feeding tokens to be cropped"
            )
        if not self.record_past:
            self._drop(begin, columns)

    def _drop(self, begin: int, columns: int) -> None:
        """Drop what no token from ``begin`` on sees, if ``columns`` more are more than the buffer has room for."""
        memory, first = self.memory, self.window.first_kept(begin)
        if memory is None or first <= memory.base or begin + columns - memory.base <= self.window.most_columns:
            return
        if self.dropped is not None:
            self.dropped.add(self.number, memory, memory.base, first)
        self._trim(memory, first, begin)

    def _trim(self, memory: LayerMemory, first: int, end: int) -> None:
        self.memory = memory.trim(first, end)
        if self.memory is not memory:
            memory.close()


class IndexedLayer(AttentionLayer, DynamicIndexedLayer):
    """Full attention to the keys that an indexer chooses. The indexer's own keys are in a second buffer.

    In some models the first such layer also keeps the positions of all tokens for the indexers, in a third buffer.
    """

    def __init__(
        self,
        make: MakeMemory = new_layer_buffer,
        make_indexer: MakeMemory = new_layer_buffer,
        make_positions: MakeMemory = new_layer_buffer,
        **kwargs: Any,
    ) -> None:
        # Optional: layers may share the choice of one indexer.
        self.indexer = AttentionLayer(make_indexer, is_optional=True)
        self.positions = AttentionLayer(make_positions, is_optional=True)
        AttentionLayer.__init__(self, make)

    def reset(self) -> None:
        """Drop all content."""
        AttentionLayer.reset(self)
        self.indexer.reset()
        self.positions.reset()

    @property
    def parts(self) -> tuple[AttentionLayer, ...]:
        """The buffers of K and V, of the indexer's keys, and of positions."""
        return (self, self.indexer, self.positions)

    @property
    def is_indexer_initialized(self) -> bool:
        """Whether ``indexer_keys`` is a tensor."""
        return self.indexer.is_used

    @property
    def indexer_keys(self) -> torch.Tensor | None:
        """``[batch, length, dim]``, or None before the first token."""
        keys = self.indexer.keys
        return None if keys is None else keys[:, 0]

    @property
    def indexer_position_ids(self) -> torch.Tensor | None:
        """``[dimensions, batch, length]``, as set by the model; None if it has set none."""
        held = self.positions.keys
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
        AttentionLayer.crop(self, tokens_to_remove)
        self.indexer.crop(tokens_to_remove)
        self.positions.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes the former row ``beam_idx[i]``."""
        AttentionLayer.reorder_cache(self, beam_idx)
        self.indexer.reorder_cache(beam_idx)
        self.positions.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        AttentionLayer.batch_select_indices(self, indices)
        self.indexer.batch_select_indices(indices)
        self.positions.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies next to each other."""
        AttentionLayer.batch_repeat_interleave(self, repeats)
        self.indexer.batch_repeat_interleave(repeats)
        self.positions.batch_repeat_interleave(repeats)
