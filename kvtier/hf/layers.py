"""One class per kind of layer: each owns a window, the contiguous K and V that attention reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from kvtier.errors import RestoreError
from kvtier.geometry import LayerGeometry

_GROWTH = 1.5  # geometric, so that appending n tokens one by one copies O(n)
_HEADROOM_TOKENS = 256


@dataclass(frozen=True, slots=True)
class WindowRun:
    """Columns ``[start, stop)`` of the new window, taken from ``source_start`` on of row ``source_row`` of the old."""

    start: int
    stop: int
    source_row: int
    source_start: int


@dataclass(frozen=True, slots=True, eq=False)
class PageRun:
    """Columns ``[start, stop)`` of the new window, taken from a page: ``[heads, tokens, dim]``."""

    start: int
    stop: int
    k_htd: torch.Tensor
    v_htd: torch.Tensor


class Prefix(Protocol):
    """What a layer's window must hold before it takes the first tokens of a turn."""

    columns: int
    rows: int
    in_place: bool
    """The old window already holds every ``WindowRun`` where it belongs."""

    def runs(self, layer: int, row: int) -> Sequence[WindowRun | PageRun]:
        """Return where each known column of ``row`` comes from; columns not named are padding."""

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
        self._k: torch.Tensor | None = None  # [batch, k_heads, capacity, k_dim]
        self._v: torch.Tensor | None = None  # [batch, v_heads, capacity, v_dim]
        self.length = 0
        self.is_initialized = False
        self._prefix: tuple[Prefix, int] | None = None

    # The public K and V of a transformers layer are what is held, without spare capacity.
    @property
    def keys(self) -> torch.Tensor | None:
        """``[batch, k_heads, length, k_dim]``, or None before the first token."""
        return None if self._k is None else self._k[:, :, : self.length]

    @property
    def values(self) -> torch.Tensor | None:
        """``[batch, v_heads, length, v_dim]``, or None before the first token."""
        return None if self._v is None else self._v[:, :, : self.length]

    @property
    def rows(self) -> int:
        """Sequences in the window."""
        return 0 if self._k is None else self._k.shape[0]

    @property
    def geometry(self) -> LayerGeometry | None:
        """Shapes of K and V of one token; None before the first."""
        return None if self._k is None or self._v is None else LayerGeometry.of(self._k, self._v)

    @property
    def complete(self) -> bool:
        """Whether the first ``length`` columns are really there, not still to come from a prefix."""
        return self._prefix is None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make an empty window for K and V of these shapes."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._k = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[3])
        self._v = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[3])
        self.is_initialized = True

    def expect(self, prefix: Prefix, layer: int) -> None:
        """Hold ``prefix`` from now on; its bytes move in the next ``update``."""
        self.length = prefix.columns
        self._prefix = (prefix, layer) if prefix.columns else None
        if not prefix.columns:
            self._k = self._v = None
            self.is_initialized = False

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
            self._take_prefix(key_states, value_states, new)
        elif not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, end = self.length, self.length + new
        self._reserve(end)
        assert self._k is not None
        assert self._v is not None
        self._k[:, :, begin:end] = key_states
        self._v[:, :, begin:end] = value_states
        self.length = end
        first = self._first_visible(begin)
        return self._k[:, :, first:end], self._v[:, :, first:end]

    def _first_visible(self, begin: int) -> int:
        """Return the first column that new tokens at column ``begin`` attend to."""
        return 0

    def _reserve(self, columns: int) -> None:
        assert self._k is not None
        assert self._v is not None
        if columns <= self._k.shape[2]:
            return
        capacity = max(int(columns * _GROWTH), columns + _HEADROOM_TOKENS)
        for name in ("_k", "_v"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def _take_prefix(self, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, new: int) -> None:
        """Move the expected prefix into the window, for as many rows as ``k_bhtd`` has."""
        assert self._prefix is not None
        prefix, layer = self._prefix
        batch = k_bhtd.shape[0]
        repeats = batch // prefix.rows  # beams and return sequences follow each other
        runs = [prefix.runs(layer, row) for row in range(prefix.rows)]
        in_place = prefix.in_place and self._k is not None and self.rows == batch and repeats == 1
        if in_place:
            held, self.length = self.length, min(self.length, self._k.shape[2])  # type: ignore[union-attr]
            self._reserve(held + new)
            self.length = held
        old_k, old_v = self._k, self._v
        if not in_place:
            capacity = max(int((prefix.columns + new) * _GROWTH), prefix.columns + new + _HEADROOM_TOKENS)
            self.dtype, self.device = k_bhtd.dtype, k_bhtd.device
            k = k_bhtd.new_empty(batch, k_bhtd.shape[1], capacity, k_bhtd.shape[3])
            v = v_bhtd.new_empty(batch, v_bhtd.shape[1], capacity, v_bhtd.shape[3])
        else:
            assert old_k is not None
            assert old_v is not None
            k, v = old_k, old_v
        for row in range(batch):
            filled = 0 if not in_place else prefix.columns
            for run in runs[row // repeats]:
                if not in_place and filled == 0 and run.start:
                    k[row, :, : run.start] = 0  # padding: masked, but it must be finite
                    v[row, :, : run.start] = 0
                filled = max(filled, run.stop)
                if isinstance(run, PageRun):
                    _check_page(run, k, v)
                    k[row, :, run.start : run.stop].copy_(run.k_htd)
                    v[row, :, run.start : run.stop].copy_(run.v_htd)
                elif not in_place:
                    assert old_k is not None
                    assert old_v is not None
                    source = slice(run.source_start, run.source_start + run.stop - run.start)
                    k[row, :, run.start : run.stop] = old_k[run.source_row, :, source]
                    v[row, :, run.start : run.stop] = old_v[run.source_row, :, source]
            if filled < prefix.columns:
                k[row, :, filled : prefix.columns] = 0
                v[row, :, filled : prefix.columns] = 0
        self._k, self._v = k, v
        self.is_initialized = True
        self._prefix = None
        prefix.filled(layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next ``query_length`` tokens see, and the column of the first."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the columns held."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: the window grows."""
        return -1

    def reset(self) -> None:
        """Hold nothing."""
        self.__init__(**self._arguments())  # type: ignore[misc]

    def _arguments(self) -> dict[str, Any]:
        return {}

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns (transformers passes a negative number)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove.")
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes the former row ``beam_idx[i]``."""
        if self.length:
            self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        if self.length:
            self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies next to each other."""
        if self.length:
            self._select(torch.arange(self.rows).repeat_interleave(repeats))

    def _select(self, rows: torch.Tensor) -> None:
        if self._k is None or self._v is None:
            return
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        for name in ("_k", "_v"):
            old = getattr(self, name)
            rows = rows.to(old.device)
            live = old[:, :, : self.length].index_select(0, rows)
            if len(rows) != old.shape[0]:
                old = old.new_empty(len(rows), *old.shape[1:])
            old[:, :, : self.length] = live
            setattr(self, name, old)


class SlidingWindowLayer(WindowLayer):
    """Sliding or chunked attention: attention sees the last ``sliding_window - 1`` columns and the new ones.

    The window keeps all columns of the sequence, so that any prefix of it can be kept, cropped and stored.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self._sliding_window_tensor = torch.tensor(sliding_window, dtype=torch.long)

    def _arguments(self) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window}

    def _first_visible(self, begin: int) -> int:
        return max(0, begin - self.sliding_window + 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next ``query_length`` tokens see, and the column of the first."""
        first = self._first_visible(self.length)
        return self.length - first + query_length, first

    def get_max_length(self) -> int:
        """Return the columns that attention sees at most."""
        return self.sliding_window


def _check_page(run: PageRun, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> None:
    for page, window in ((run.k_htd, k_bhtd), (run.v_htd, v_bhtd)):
        if (page.dtype, page.shape[0], page.shape[2]) != (window.dtype, window.shape[1], window.shape[3]):
            raise RestoreError(f"a stored page of {page.dtype} {tuple(page.shape)} does not fit the model's K and V")


_WINDOW_LAYERS = {
    "full_attention": WindowLayer,
    "sliding_attention": SlidingWindowLayer,
    "chunked_attention": SlidingWindowLayer,
}


def build_layers(config: PreTrainedConfig) -> tuple[list[Any], str | None]:
    """Return the layers of a model, and why its K and V cannot be reused if they cannot.

    Kinds that kvtier does not keep yet are transformers' own layers.
    """
    types, kwargs = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    other = sorted(set(types) - set(_WINDOW_LAYERS))
    if other:
        layers = [DYNAMIC_LAYER_TYPE_MAPPING[kind](**kw) for kind, kw in zip(types, kwargs, strict=True)]
        return layers, f"layers of kind {', '.join(other)} are not kept yet"
    return [_WINDOW_LAYERS[kind](**kw) for kind, kw in zip(types, kwargs, strict=True)], None
