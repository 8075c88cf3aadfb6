"""Prompts that continue the rows in a cache, without passing again the media that the cache holds.

This is how transformers continues a cache: it takes the whole conversation as ids, without the cached media.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from kvtier.errors import PromptError
from kvtier.hf.inputs.content_ids import ContentId, marked
from kvtier.hf.inputs.multimodal import KINDS, placeholder_id
from kvtier.hf.inputs.prompt import Positions, ResidentPrefix
from kvtier.store.chain import TokenIds, common_run

# Arguments that carry media, KINDS included: a model that takes one of them takes media.
_CARRIES_MEDIA = frozenset(name for names in KINDS.values() for name in names) | {
    "image_patches",
    "input_values",
    "pixel_values_images",
}


@dataclass(frozen=True, slots=True, eq=False)
class KnownRow:
    """The part of a prompt's row that a cache holds: its first ``run`` ids, and the ``marks`` in them.

    ``positions`` are those of all tokens of the row, ``[axes, tokens]``; None if the order of tokens gives them.
    """

    run: int
    marks: tuple[ContentId, ...]
    positions: Positions | None

    @property
    def needed(self) -> int:
        """Number of first tokens that must come from the cache: all inputs but text and positions enter there."""
        return max((mark.stop for mark in self.marks if not mark.is_position), default=0)


def missing_media(
    model: PreTrainedModel, arguments: Mapping[str, Any], ids: npt.NDArray[np.int64], real: npt.NDArray[np.bool_]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Return the kinds of media that have placeholders in ``ids [rows, columns]``, but no tensors in ``arguments``.

    ``real [rows, columns]`` is false for padding. The result is kind → ``[rows, columns]``, true for its placeholders.
    """
    config = getattr(model, "config", None)
    takes_media = not _CARRIES_MEDIA.isdisjoint(inspect.signature(model.forward).parameters)
    if not takes_media or getattr(config, "is_encoder_decoder", False):
        return {}
    # Tensors that belong to the main one, such as its grid, may be passed without it.
    passed = {kind for kind, names in KINDS.items() if arguments.get(names[0]) is not None}
    answered = {placeholder_id(config, kind) for kind in passed} | {None}
    tokens = {kind: placeholder_id(config, kind) for kind in KINDS}
    places = {kind: (ids == token) & real for kind, token in tokens.items() if token not in answered}
    return {kind: where for kind, where in places.items() if where.any()}


def known_rows(
    rows: Sequence[TokenIds], places: Sequence[npt.NDArray[np.bool_]], resident: ResidentPrefix | None, *, counts: bool
) -> tuple[KnownRow | None, ...] | str:
    """Return the cached part of each row with placeholders; None for other rows.

    Args:
        rows: the ids of each row, without padding.
        places: for each row, ``[tokens]``: placeholders whose media were not passed.
        resident: the rows in the cache.
        counts: whether the model counts positions in its own way.

    Returns:
        The reason as text, if the cache does not hold the media of all placeholders.
    """
    if resident is None or not resident.rows:
        return "the cache holds nothing"
    found = []
    for row, (ids, where) in enumerate(zip(rows, places, strict=True)):
        known = _known_row(ids, where, resident, counts) if where.any() else None
        if known is None and where.any():
            return f"the cache holds no row that begins like row {row} up to its last placeholder"
        found.append(known)
    return tuple(found)


def _known_row(ids: TokenIds, where: npt.NDArray[np.bool_], resident: ResidentPrefix, counts: bool) -> KnownRow | None:
    """Return the longest part of ``ids`` that a cached row holds; None if no row holds all of its media."""
    best: KnownRow | None = None
    for at, row in enumerate(resident.rows):
        marks = resident.marks[at] if resident.marks else ()
        run = common_run(marked(ids, marks), row)
        used = tuple(mark for mark in marks if mark.start < run)
        if where[run:].any() or any(mark.stop > run for mark in used) or (best is not None and run <= best.run):
            continue
        if counts != bool(resident.positions):
            continue  # positions were passed for a model that counts none, or are missing for a model that counts them
        positions = _positions(resident.positions[at], run, len(ids), where) if counts else None
        if counts and positions is None:
            continue
        best = KnownRow(run, used, positions)
    return best


def _positions(known: Positions, run: int, length: int, where: npt.NDArray[np.bool_]) -> Positions | None:
    """Return the positions of a row of ``length`` tokens whose first ``run`` are as in ``known [axes, tokens]``.

    ``known`` has no positions of generated tokens: each is one after that of the token before. None if ``known`` ends
    with a media placeholder, since the positions after it cannot be derived.
    """
    size = known.shape[1]
    if run < size and where[run - 1]:
        follows = known[:, run]
    elif run <= size:
        follows = known[:, run - 1] + 1
    else:
        follows = known[:, -1] + 1 + run - size
    if run >= size and where[size - 1]:
        return None
    between = known[:, -1:] + 1 + np.arange(max(0, run - size))
    return np.concatenate([known[:, :run], between, follows[:, None] + np.arange(length - run)], 1)


def media_error(missing: Collection[str], reason: str) -> PromptError:
    """Return the error for placeholders of these kinds whose media were neither passed nor found in the cache."""
    kinds = " and ".join(missing)
    tensors = " and ".join(KINDS[kind][0] for kind in missing)
    return PromptError(
        f"input_ids have placeholders of kind {kinds}, but no {tensors} were passed, and what entered there cannot be "
        f"taken from this cache: {reason}. Pass {tensors}, and what belongs to it, in each turn: what is known of it "
        "is not computed again. If the ids are meant as words, call generate() without a TieredCache"
    )
