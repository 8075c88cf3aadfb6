"""Images, videos and sounds of a call: whose they are, and at which columns they enter."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvtier.hf.compat.model_profiles import profile_of
from kvtier.hf.inputs.content_ids import digest_of, digest_tensors

# kind: the tensor that is encoded, then what belongs to it.
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
    """One picture, film or sound: ``digest`` is all that it is, its placeholders stand in ``[first, stop)``."""

    row: int
    first: int
    stop: int
    digest: bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Kind:
    """All inputs of one kind.

    ``items`` are in the order of the tensors; there are none when they cannot be told apart. ``parts`` are the
    tensors, split into those of each item along ``dims``.
    """

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

    Where one cannot tell which placeholders are whose, all of them count as one input, which enters at the first
    placeholder of each row and ends with the last.

    Attributes:
        places: ``[rows, columns]``, where something enters, behind padding too.
        wholes: ``(first, end)``: columns inside which one input lies in any row.
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
        """The arguments that carry them."""
        return {name for kind in self._kinds for name in kind.tensors}

    def digest(self, row: int, first: int, stop: int) -> bytes:
        """Return SHA-256 of whatever enters in ``row`` at the columns ``[first, stop)``."""
        if self._all is not None:
            return self._all
        items = [i for kind in self._kinds for i in kind.items if i.row == row and i.first < stop and first < i.stop]
        return digest_of(*(item.digest for item in items))

    def join(self) -> None:
        """See to it that a prefix ends before all or after all of them: they can then be fed together or not at all."""
        self.wholes = [(self._first, self._end)]

    def after(self, columns: int) -> dict[str, torch.Tensor]:
        """Return the arguments for a model that knows the first ``columns`` columns: what enters after them."""
        left: dict[str, torch.Tensor] = {}
        for kind in self._kinds:
            if kind.items:
                left |= kind.of([i for i, item in enumerate(kind.items) if item.first >= columns])
            elif columns <= self._first:
                left |= kind.tensors
        return left

    def expands(self, model: torch.nn.Module) -> bool:
        """Whether ``generate`` gives each beam and sample of a row the inputs of that row, in their order."""
        ahead = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
        rows = list(range(len(self.places)))
        for name, kind in ((self._name(kind), kind) for kind in self._kinds):
            one_each = [item.row for item in kind.items] == rows
            if not (ahead and name != "audio") and not (
                one_each and all(len(tensor) == len(rows) for tensor in kind.tensors.values())
            ):
                return False
        return True

    @staticmethod
    def _name(kind: _Kind) -> str:
        return next(name for name, tensors in KINDS.items() if not kind.tensors.keys().isdisjoint(tensors))


def placeholder_id(config: Any, kind: str) -> int | None:
    """Return the id that stands where an input of this kind enters."""
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def read_media(arguments: Mapping[str, Any], config: Any, ids: npt.NDArray[np.int64]) -> Media | str | None:
    """Return what enters at placeholders of ``ids [rows, columns]``; None when nothing does.

    Models count placeholders without a look at the mask: those that it hides are filled like all others.

    Args:
        arguments: of the call.
        config: of the model.
        ids: the prompt, with all ids that the mask hides.

    Returns:
        Why it cannot be told where something enters, as text, when it cannot.
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
    """Tell the inputs of one kind apart, if that can be done without doubt."""
    where = np.argwhere(own)
    split = _by_grid(kind, tensors, config) or _by_row(kind, tensors, config, own) or _alike(kind, tensors, len(where))
    whole = _Kind(tensors, (), {}, {})
    if split is None or getattr(config, f"{kind}_pruning_rate", None):  # what is pruned depends on what is seen
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
    return _Kind(tensors, tuple(items), parts, dims)


_Split = tuple[dict[str, _Parts], dict[str, int], list[int]]
"""Tensors in parts, along which dimensions, and how many placeholders each part has."""


def _by_grid(kind: str, tensors: Mapping[str, torch.Tensor], config: Any) -> _Split | None:
    """Split patches that lie one after another, as many as a grid says."""
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
    """Split the pictures of a single row, which lie in the second dimension."""
    if not profile_of(config).media_by_row or len(own) != 1:
        return None
    if not all(tensor.ndim > 1 and len(tensor) == 1 for tensor in tensors.values()):
        return None
    return _equal(kind, {name: torch.split(tensor, 1, 1) for name, tensor in tensors.items()}, 1, int(own.sum()))


def _alike(kind: str, tensors: Mapping[str, torch.Tensor], places: int) -> _Split | None:
    """Split along the first dimension."""
    return _equal(kind, {name: torch.split(tensor, 1) for name, tensor in tensors.items()}, 0, places)


def _equal(kind: str, parts: dict[str, _Parts], dim: int, places: int) -> _Split | None:
    """Give each part as many placeholders: they have one shape, and all that is said of their sizes is equal."""
    main = KINDS[kind][0]
    counts = {len(part) for part in parts.values()}
    if main not in parts or len(counts) != 1 or f"{kind}_grid_thw" in parts:
        return None
    n = counts.pop()
    if not n or places % n or not all(_same(part) for name, part in parts.items() if name != main):
        return None
    if dim == 1 and not all(bool(one.any()) for one in parts[main]):
        return None  # models of this kind take pictures that are all zero for padding
    return parts, dict.fromkeys(parts, dim), [places // n] * n


def _same(parts: Iterable[torch.Tensor]) -> bool:
    first, *others = parts
    return all(torch.equal(first, other) for other in others)
