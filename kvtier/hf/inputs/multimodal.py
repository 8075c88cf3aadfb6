"""Images, videos and sounds of a call: their rows, and the columns at which they enter."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvtier.hf.compat.model_profiles import profile_of
from kvtier.hf.inputs.content_ids import digest_of, digest_tensors

# kind: the tensor that is encoded, then the tensors that belong to it.
KINDS: Mapping[str, tuple[str, ...]] = {
    "image": (
        "pixel_values",
        "image_grid_thw",
        "image_sizes",
        "pixel_attention_mask",
        "pixel_mask",
        "spatial_shapes",
        "batch_num_images",
        "image_position_ids",
    ),
    "video": (
        "pixel_values_videos",
        "video_grid_thw",
        "second_per_grid_ts",
        "image_sizes_videos",
        "video_position_ids",
    ),
    "audio": ("input_features", "input_features_mask", "feature_attention_mask"),
}

Columns = npt.NDArray[np.bool_]
_Parts = Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Item:
    """One image, video or sound: ``digest`` covers all of it, its placeholders are in the columns ``[first, stop)``."""

    row: int
    first: int
    stop: int
    digest: bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Kind:
    """All inputs of one kind, whose ``name`` is in ``KINDS``.

    ``items`` are in the order of the tensors, and empty when they cannot be told apart. ``parts`` are the tensors,
    split along ``dims`` into one part per item.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    items: tuple[Item, ...]
    parts: Mapping[str, _Parts]
    dims: Mapping[str, int]

    def of(self, kept: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the tensors of the items ``kept``."""
        if len(kept) == len(self.items):
            return dict(self.tensors)
        return {name: torch.cat([self.parts[name][i] for i in kept], dim) for name, dim in self.dims.items() if kept}


class Media:
    """All inputs of a call that enter at placeholders.

    If placeholders cannot be assigned to inputs, all of them count as one input, which spans all columns from the
    first placeholder to the last.

    Attributes:
        places: ``[rows, columns]``: placeholders, also under padding.
        wholes: ``(first, end)``: columns that one input spans in any row.
    """

    def __init__(self, kinds: Sequence[_Kind], places: Columns) -> None:
        self.places = places
        self._kinds = tuple(kinds)
        self._all: bytes | None = None
        columns = np.flatnonzero(places.any(axis=0))
        self._first, self._end = int(columns[0]), int(columns[-1]) + 1
        if any(not kind.items for kind in kinds):
            self._all = digest_of(*(digest_tensors(tuple(kind.tensors.items())) for kind in kinds))
            self.wholes = [(self._first, self._end)]
        else:
            self.wholes = [(item.first, item.stop) for kind in kinds for item in kind.items]

    @property
    def names(self) -> set[str]:
        """The names of the arguments that carry these inputs."""
        return {name for kind in self._kinds for name in kind.tensors}

    def digest(self, row: int, first: int, stop: int) -> bytes:
        """Return SHA-256 of the inputs that enter ``row`` at the columns ``[first, stop)``."""
        if self._all is not None:
            return self._all
        items = [i for kind in self._kinds for i in kind.items if i.row == row and i.first < stop and first < i.stop]
        return digest_of(*(item.digest for item in items))

    def join(self) -> None:
        """Make all inputs one whole: a prefix ends before or after all of them, so that they are fed together."""
        self.wholes = [(self._first, self._end)]

    def after(self, columns: int) -> dict[str, torch.Tensor]:
        """Return the tensors of the inputs that enter after the first ``columns`` columns."""
        left: dict[str, torch.Tensor] = {}
        for kind in self._kinds:
            if kind.items:
                left |= kind.of([i for i, item in enumerate(kind.items) if item.first >= columns])
            elif columns <= self._first:
                left |= kind.tensors
        return left

    def expands(self, model: torch.nn.Module) -> bool:
        """Whether ``generate`` passes each beam and sample of a row the inputs of that row, in order."""
        ahead = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
        rows = list(range(len(self.places)))
        for kind in self._kinds:
            one_each = [item.row for item in kind.items] == rows
            by_row = one_each and all(len(tensor) == len(rows) for tensor in kind.tensors.values())
            if not by_row and not (ahead and kind.name != "audio"):
                return False
        return True


def placeholder_id(config: Any, kind: str) -> int | None:
    """Return the placeholder id of this kind of input; None if the config has none."""
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def read_media(arguments: Mapping[str, Any], config: Any, ids: npt.NDArray[np.int64]) -> Media | str | None:
    """Return the media that enter at placeholders of ``ids [rows, columns]``; None when there are none.

    Models ignore the mask when they count placeholders: masked placeholders are filled like all others. Returned text
    is the reason why it is not known where an input enters.
    """
    kinds, places = [], np.zeros(ids.shape, np.bool_)
    for kind, names in KINDS.items():
        tensors = {name: arguments[name] for name in names if arguments.get(name) is not None}
        if not tensors:
            continue
        if not all(isinstance(tensor, torch.Tensor) and tensor.ndim for tensor in tensors.values()):
            return f"one cannot tell what is in {', '.join(sorted(tensors))}"
        token = placeholder_id(config, kind)
        own = ids == token
        if token is None or not own.any():
            return f"no placeholder tells where {', '.join(sorted(tensors))} enter"
        kinds.append(_kind(kind, tensors, config, own))
        places |= own
    return Media(kinds, places) if kinds else None


def _kind(kind: str, tensors: Mapping[str, torch.Tensor], config: Any, own: Columns) -> _Kind:
    """Split the tensors of one kind into items; without items if the split is not certain."""
    where = np.argwhere(own)
    split = _by_grid(kind, tensors, config) or _by_row(kind, tensors, config, own)
    if split is None:
        split = _equal(kind, {name: torch.split(tensor, 1) for name, tensor in tensors.items()}, 0, len(where))
    whole = _Kind(kind, tensors, (), {}, {})
    if split is None or getattr(config, f"{kind}_pruning_rate", None):  # pruning depends on the content
        return whole
    parts, dims, counts = split
    if sum(counts) != len(where) or not all(counts):
        return whole
    items = []
    for index, end in enumerate(np.cumsum(counts)):
        mine = where[end - counts[index] : end]
        if mine[0][0] != mine[-1][0]:
            return whole
        digest = digest_tensors([(name, parts[name][index]) for name in tensors])
        items.append(Item(int(mine[0][0]), int(mine[0][1]), int(mine[-1][1]) + 1, digest))
    return _Kind(kind, tensors, tuple(items), parts, dims)


_Split = tuple[dict[str, _Parts], dict[str, int], list[int]]
"""Parts of each tensor, the dimension of the split, and the number of placeholders of each part."""


def _by_grid(kind: str, tensors: Mapping[str, torch.Tensor], config: Any) -> _Split | None:
    """Split consecutive patches by the sizes in a grid."""
    grid = tensors.get(f"{kind}_grid_thw")
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
    if grid is None or grid.ndim != 2 or not isinstance(merge, int):
        return None
    patches = [int(n) for n in grid.prod(-1)]
    parts: dict[str, _Parts] = {}
    for name, tensor in tensors.items():
        if name == KINDS[kind][0] and len(tensor) == sum(patches):
            parts[name] = torch.split(tensor, patches)
        elif len(tensor) == len(patches):
            parts[name] = torch.split(tensor, 1)
        else:
            return None
    return parts, dict.fromkeys(tensors, 0), [n // merge**2 for n in patches]


def _by_row(kind: str, tensors: Mapping[str, torch.Tensor], config: Any, own: Columns) -> _Split | None:
    """Split the images of a single row, which lie along the second dimension."""
    if not profile_of(config).media_by_row or len(own) != 1:
        return None
    if not all(tensor.ndim > 1 and len(tensor) == 1 for tensor in tensors.values()):
        return None
    return _equal(kind, {name: torch.split(tensor, 1, 1) for name, tensor in tensors.items()}, 1, int(own.sum()))


def _equal(kind: str, parts: dict[str, _Parts], dim: int, places: int) -> _Split | None:
    """Give each part the same number of placeholders: all parts have one shape, and equal size tensors."""
    main = KINDS[kind][0]
    counts = {len(part) for part in parts.values()}
    if main not in parts or len(counts) != 1 or f"{kind}_grid_thw" in parts:
        return None
    n = counts.pop()
    if not n or places % n:
        return None
    if not all(torch.equal(one, part[0]) for name, part in parts.items() if name != main for one in part):
        return None
    if dim == 1 and not all(bool(one.any()) for one in parts[main]):
        return None  # these models treat all-zero images as padding
    return parts, dict.fromkeys(parts, dim), [places // n] * n
