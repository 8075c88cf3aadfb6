"""Inputs besides ids as ids of the chain, and the arguments left to feed after a stored prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from kvtier.hf.compat.model_profiles import profile_of
from kvtier.hf.compat.names import MEDIA_CONTINUE
from kvtier.hf.inputs.content_ids import WHOLE, ContentId, digest_of, marked, vector_ids
from kvtier.hf.inputs.continued import KnownRow, known_rows
from kvtier.hf.inputs.multimodal import KINDS, Columns, Media, read_media
from kvtier.hf.inputs.positions import (
    TYPES,
    counts_on_earlier_calls,
    forget_positions,
    may_attend_both_ways,
    merging_parts,
    own_positions,
    per_column,
    position_jumps,
    positions_going_on,
    positions_of,
    read_types,
)
from kvtier.hf.inputs.prompt import Positions, Prompt, ResidentPrefix, read_prompt
from kvtier.hf.not_reusable import NotReusable

_MEDIA = frozenset(name for names in KINDS.values() for name in names)
CHAINED = _MEDIA | {*TYPES, "inputs_embeds", "position_ids"}
"""Arguments of ``generate`` that a chain can represent."""

_ENDS_EARLY = "padding on the right beside inputs other than ids cannot be told apart"
# Methods of a model that replaces placeholders by features, and changes nothing else.
_MERGERS = ("get_placeholder_mask", "inputs_merger")

Missing = Mapping[str, Columns]
"""Kind of media → ``[rows, columns]``: placeholders whose media were not passed."""


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Inputs of a call: its prompt, its media, and ``arguments`` to pass besides the caller's.

    ``both_ways``: some tokens may attend to later tokens of their run, so that their K and V depend on where it is cut.
    """

    prompt: Prompt
    media: Media | None
    arguments: Mapping[str, Any]
    both_ways: bool = False

    def after(self, arguments: Mapping[str, Any], columns: int) -> dict[str, Any]:
        """Return the ``arguments`` of the call when the cache holds the first ``columns`` columns."""
        changed = {**arguments, **self.arguments}
        if self.media is None or not columns:
            return changed
        kept = {name: value for name, value in changed.items() if name not in self.media.names}
        return kept | self.media.after(columns)


def read_inputs(
    model: PreTrainedModel,
    arguments: Mapping[str, Any],
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    copies: int,
    missing: Missing | None = None,
    resident: ResidentPrefix | None = None,
) -> Inputs | NotReusable:
    """Return the inputs of a ``generate`` call, or why they cannot be told apart from other inputs.

    Args:
        model: the model that will be called.
        arguments: arguments of the call; the names in ``CHAINED`` are read.
        input_ids: ``[batch, columns]``; None or without columns where there are embeddings.
        attention_mask: ``[batch, columns]``.
        copies: beams or samples of each row.
        missing: placeholders whose media were not passed.
        resident: rows in the cache, which must hold the media that were not passed.

    Raises:
        PromptError: the mask has another shape than the prompt.
    """
    left_out = {name for kind in missing or () for name in KINDS[kind]}
    given = {name: arguments[name] for name in CHAINED - left_out if arguments.get(name) is not None}
    reason = _why_not(model, given)
    if reason is not None:
        return NotReusable(reason)
    embeds = given.get("inputs_embeds")
    if embeds is not None:
        prompt = _vectors(embeds, input_ids, attention_mask)
    elif input_ids is None:
        return NotReusable("no input_ids were given")
    else:
        prompt = read_prompt(input_ids, attention_mask)
    if isinstance(prompt, NotReusable):
        return prompt
    if prompt.columns == 0 or not prompt.rows:
        return Inputs(prompt, None, {})
    ends_early = any(prompt.ends_early(row) for row in range(len(prompt.rows)))
    if ends_early and given:
        return NotReusable(_ENDS_EARLY)
    ids, _ = prompt.table()
    behind = input_ids.detach().to("cpu", torch.int64).numpy() if embeds is None and input_ids is not None else ids
    media = read_media(given, model.config, behind)
    if isinstance(media, str):
        return NotReusable(media)
    if media is not None and copies > 1:
        media.join()
        if not media.expands(model):
            return NotReusable("one cannot tell which inputs each beam or sample is given")
    tensors = read_types(given, prompt, model, behind)
    if isinstance(tensors, NotReusable):
        return tensors
    types = {name: tensor.detach().to("cpu", torch.int64).numpy() for name, tensor in tensors.items()}
    longer = {name: tensor for name, tensor in tensors.items() if tensor is not given[name]}
    known: Sequence[KnownRow | None] = [None] * len(prompt.rows)
    if missing:
        found = _known(model, prompt, given, missing, resident)
        if isinstance(found, str):
            return NotReusable(found)
        known = found
        positions, own = positions_going_on(prompt, known), own_positions(model) is not None
        if positions is not None and input_ids is not None:
            positions = positions.to(input_ids.device)
    else:
        try:
            positions, own = positions_of(model, {**given, **longer}, input_ids, attention_mask)
        except Exception as error:  # generate() will raise it, or knows better
            return NotReusable(f"the model cannot count positions: {type(error).__name__}: {error}")
    if ends_early and positions is not None:
        return NotReusable(_ENDS_EARLY)
    by_column = None if positions is None else per_column(positions, prompt)
    if by_column is None and positions is not None:
        return NotReusable("positions have another shape than the prompt, or are no integers")
    return Inputs(
        _chained(prompt, ids, media, types, by_column, known),
        media,
        {**longer, **({"position_ids": positions} if own else {})},
        may_attend_both_ways(model, prompt, types, known),
    )


def why_not_begin(model: PreTrainedModel) -> str | None:
    """Return why a loop that calls ``model`` itself cannot reuse; None when it may.

    Deletes the positions that the model remembers from another prompt.
    """
    if profile_of(model).carried_argument is not None:
        return "begin() cannot give this model the states that it carries past a cache"
    if counts_on_earlier_calls(model) and own_positions(model) is None:
        return "the model derives positions from an earlier call"
    forget_positions(model)
    return None


def _why_not(model: PreTrainedModel, given: Mapping[str, Any]) -> str | None:
    if counts_on_earlier_calls(model) and own_positions(model) is None:
        return "the model derives positions from an earlier call"
    if "inputs_embeds" in given and not given.keys() <= {"inputs_embeds", "position_ids"}:
        return f"embeddings and other inputs at once: {', '.join(sorted(given))}"
    others = sorted(given.keys() & (_MEDIA | set(TYPES)))
    if others:
        merges = any(hasattr(part, name) for part in merging_parts(model) for name in _MERGERS)
        if not merges or profile_of(model).sees_ahead:
            return f"inputs besides tokens may decide K and V: {', '.join(others)}"
        if not MEDIA_CONTINUE:
            return f"this version of transformers cannot continue with {', '.join(others)}"
    return None


# --- rows -------------------------------------------------------------------------------------------------------------


def _vectors(
    embeds: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> Prompt | NotReusable:
    """Read a prompt of ``embeds [batch, columns, width]``; ``generate`` returns ids beside it, and never feeds them."""
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3:
        return NotReusable("inputs_embeds are not [batch, columns, width]")
    batch, columns = embeds.shape[:2]
    returned = input_ids.shape[1] if input_ids is not None and input_ids.ndim == 2 else 0
    if returned not in (0, columns):
        return NotReusable("inputs_embeds and input_ids have different lengths")
    prompt = read_prompt(torch.zeros(batch, columns, dtype=torch.long, device="cpu"), attention_mask)
    if isinstance(prompt, NotReusable):
        return prompt
    rows = tuple(vector_ids(embeds[row, pad:]) for row, pad in enumerate(prompt.pads))
    return replace(prompt, rows=rows, returned=returned, unproven=WHOLE - 1, plain=False)


# --- media that were not passed again ---------------------------------------------------------------------------------


def _known(
    model: PreTrainedModel, prompt: Prompt, given: Mapping[str, Any], missing: Missing, resident: ResidentPrefix | None
) -> Sequence[KnownRow | None] | str:
    """Return the cached part of each row with media that were not passed; or, as text, why it cannot be taken."""
    also = sorted(given.keys() & (_MEDIA | {"position_ids"}))
    if also:
        return f"{', '.join(also)} were passed, so that nothing can be taken from the cache for the others"
    where = np.logical_or.reduce(list(missing.values()))
    places = [
        where[row, pad : pad + len(own)] for row, (own, pad) in enumerate(zip(prompt.rows, prompt.pads, strict=True))
    ]
    return known_rows(prompt.rows, places, resident, counts=own_positions(model) is not None)


# --- the chain --------------------------------------------------------------------------------------------------------


def _chained(
    prompt: Prompt,
    ids: npt.NDArray[np.int64],
    media: Media | None,
    types: Mapping[str, Any],
    positions: Positions | None,
    known: Sequence[KnownRow | None],
) -> Prompt:
    """Return ``prompt`` with rows that represent all of its inputs.

    Neighbouring columns with media, or with a type other than 0, form one run that is marked as a whole: its tokens
    may attend to each other. A position that does not follow its neighbour's is marked in its column. For a known row,
    the marks are those of the cache.
    """
    rows, marks_of, wholes, needed = [], [], list(media.wholes) if media is not None else [], 0
    for row, (own, pad, of) in enumerate(zip(prompt.rows, prompt.pads, known, strict=True)):
        solid = np.zeros(len(own), np.bool_) if media is None else media.places[row, pad:].copy()
        for values in types.values():
            solid |= values[row, pad:] != 0
        begin = of.run if of is not None else 0
        solid[:begin] = False
        at = None if positions is None else positions[:, row, pad:]
        marks = list(of.marks) if of is not None else []
        for start, stop in _runs(solid):
            parts = [ids[row, pad + start : pad + stop].tobytes()]
            for name, values in sorted(types.items()):
                run = values[row, pad + start : pad + stop]
                parts += [name.encode(), run.tobytes()] if run.any() else []
            parts += [b"at", at[:, start:stop].tobytes()] if at is not None else []
            if media is not None and media.places[row, pad + start : pad + stop].any():
                parts += [b"media", media.digest(row, pad + start, pad + stop)]
            marks.append(ContentId(start, stop, digest_of(*parts)))
        if at is not None:
            jumps = np.flatnonzero(position_jumps(at) & ~solid)
            marks += [
                ContentId(int(j), int(j) + 1, digest_of(b"jump", at[:, j].tobytes()), is_position=True)
                for j in jumps
                if j >= begin
            ]
        rows.append(marked(own, marks))
        marks_of.append(tuple(marks))
        told = len(of.marks) if of is not None else 0  # these digests are the cache's own, equal in all bits
        wholes += [(pad + mark.start, pad + (mark.stop if n < told else mark.end)) for n, mark in enumerate(marks)]
        needed = max(needed, pad + of.needed if of is not None else 0)
    last = types.get("token_type_ids")
    return replace(
        prompt,
        rows=tuple(rows),
        wholes=tuple(wholes),
        marks=tuple(marks_of) if any(marks_of) else (),
        plain=prompt.plain and not any(marks_of),
        positions=tuple(
            positions[:, row, pad : pad + len(own)].copy()
            for row, (own, pad) in enumerate(zip(prompt.rows, prompt.pads, strict=True))
        )
        if positions is not None
        else (),
        needed=needed,
        ids=prompt.rows if needed else (),
        answer_follows=last is None or not last[:, -1].any(),  # its last column is repeated for generated tokens
    )


def _runs(solid: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the begin and end of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], solid, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
