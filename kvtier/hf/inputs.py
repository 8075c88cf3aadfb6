"""All that a call feeds besides ids → the chain of each row, and what is left to feed after a known prefix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationMixin, PreTrainedModel

from kvtier.hf.compat.model_profiles import profile_of
from kvtier.hf.compat.names import MEDIA_CONTINUE
from kvtier.hf.marks import WHOLE, Mark, digest_of, marked, vector_ids
from kvtier.hf.media import KINDS, Media, placeholder_id, read_media
from kvtier.hf.prompt import Prompt, Unreadable, read_prompt

_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_MEDIA = frozenset(name for names in KINDS.values() for name in names)
CHAINED = _MEDIA | {*_TYPES, "inputs_embeds", "position_ids"}
"""Arguments of ``generate`` that can be told in chains."""

_ENDS_EARLY = "padding on the right beside inputs other than ids cannot be told apart"
# What marks a model that puts features in the place of placeholders, and changes nothing else.
_MERGERS = ("get_placeholder_mask", "inputs_merger")

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What a call feeds: its prompt, and ``arguments`` that it must be called with besides its own."""

    prompt: Prompt
    media: Media | None
    arguments: Mapping[str, Any]

    def after(self, arguments: Mapping[str, Any], columns: int) -> dict[str, Any]:
        """Return the ``arguments`` of the call for a model that knows the first ``columns`` columns."""
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
) -> Inputs | Unreadable:
    """Return what a call of ``generate`` feeds, or why it cannot be told apart from other calls.

    Args:
        model: the model that will be called.
        arguments: of the call; those in ``CHAINED`` are read.
        input_ids: ``[batch, columns]``; None or without columns where there are embeddings.
        attention_mask: ``[batch, columns]``.
        copies: beams or samples of each row.

    Raises:
        PromptError: the mask has another shape than the prompt.
    """
    given = {name: arguments[name] for name in CHAINED if arguments.get(name) is not None}
    reason = _why_not(model, given)
    if reason is not None:
        return Unreadable(reason)
    embeds = given.get("inputs_embeds")
    prompt = _ids(input_ids, attention_mask) if embeds is None else _vectors(embeds, input_ids, attention_mask)
    if isinstance(prompt, Unreadable):
        return prompt
    if prompt.columns == 0 or not prompt.rows:
        return Inputs(prompt, None, {})
    ends_early = any(prompt.ends_early(row) for row in range(len(prompt.rows)))
    if ends_early and given:
        return Unreadable(_ENDS_EARLY)
    ids, real = _table(prompt)
    media = read_media(given, model.config, ids, real)
    if isinstance(media, str):
        return Unreadable(media)
    if media is not None and copies > 1:
        media.join()
        if not media.expands(model):
            return Unreadable("one cannot tell which inputs each beam or sample is given")
    types = {name: _per_token(given[name], prompt) for name in _TYPES if name in given}
    positions, own = _positions(model, given, input_ids, attention_mask)
    if ends_early and positions is not None:
        return Unreadable(_ENDS_EARLY)
    by_column = None if positions is None else _per_column(positions, prompt)
    if any(of is None for of in types.values()) or (by_column is None and positions is not None):
        return Unreadable("token types or positions have another shape than the prompt")
    return Inputs(_chained(prompt, ids, media, types, by_column), media, {"position_ids": positions} if own else {})


def why_not_begin(model: PreTrainedModel, input_ids: torch.Tensor) -> str | None:
    """Return why a loop that calls ``model`` itself cannot reuse; None when it may.

    Positions that the model remembers from another prompt are forgotten.
    """
    if profile_of(model).carried_argument is not None:
        return "begin() cannot give this model the states that it carries past a cache"
    if _counts_on(model) and _own_positions(model) is None:
        return "the model derives positions from an earlier call"
    for kind in KINDS:
        token = placeholder_id(getattr(model, "config", None), kind)
        if token is not None and bool((input_ids == token).any()):
            return f"begin() is not told which {kind} enters at the placeholders"
    for part in _heads(model):
        if hasattr(part, "rope_deltas"):
            setattr(part, "rope_deltas", None)  # noqa: B010 - not an attribute that types know
    return None


def _why_not(model: PreTrainedModel, given: Mapping[str, Any]) -> str | None:
    if _counts_on(model) and _own_positions(model) is None:
        return "the model derives positions from an earlier call"
    if "inputs_embeds" in given and len(given) > 1 and not given.keys() <= {"inputs_embeds", "position_ids"}:
        return f"embeddings and other inputs at once: {', '.join(sorted(given))}"
    others = sorted(given.keys() & (_MEDIA | set(_TYPES)))
    if others:
        merges = any(hasattr(part, name) for part in _heads(model) for name in _MERGERS)
        if not merges or profile_of(model).sees_ahead:
            return f"inputs besides tokens may decide K and V: {', '.join(others)}"
        if not MEDIA_CONTINUE:
            return f"this version of transformers cannot continue with {', '.join(others)}"
    return None


def _heads(model: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    """Return the modules that may merge inputs and count positions."""
    return model, *model.children()


# --- rows -------------------------------------------------------------------------------------------------------------


def _ids(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> Prompt | Unreadable:
    return Unreadable("no input_ids were given") if input_ids is None else read_prompt(input_ids, attention_mask)


def _vectors(
    embeds: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> Prompt | Unreadable:
    """Read a prompt of ``embeds [batch, columns, width]``; ids beside it are returned, never fed."""
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3:
        return Unreadable("inputs_embeds are not [batch, columns, width]")
    batch, columns = embeds.shape[:2]
    returned = input_ids.shape[1] if input_ids is not None and input_ids.ndim == 2 else 0
    if returned not in (0, columns):
        return Unreadable("inputs_embeds and input_ids have different lengths")
    prompt = read_prompt(torch.zeros(batch, columns, dtype=torch.long), attention_mask)
    if isinstance(prompt, Unreadable):
        return prompt
    rows = tuple(vector_ids(embeds[row, pad:]) for row, pad in enumerate(prompt.pads))
    return replace(prompt, rows=rows, returned=returned, unproven=WHOLE - 1, plain=False)


def _table(prompt: Prompt) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the ids ``[rows, columns]``, and where they are no padding."""
    ids = np.zeros((len(prompt.rows), prompt.columns), np.int64)
    real = np.zeros(ids.shape, np.bool_)
    for row, (own, pad) in enumerate(zip(prompt.rows, prompt.pads, strict=True)):
        ids[row, pad : pad + len(own)], real[row, pad : pad + len(own)] = own, True
    return ids, real


# --- what stands beside each id ---------------------------------------------------------------------------------------


def _per_token(values: Any, prompt: Prompt) -> npt.NDArray[np.int64] | None:
    """Return ``values [rows, columns]``; None when they have another shape."""
    if not isinstance(values, torch.Tensor) or tuple(values.shape) != (len(prompt.rows), prompt.columns):
        return None
    table: npt.NDArray[np.int64] = values.detach().to("cpu", torch.int64).numpy()
    return table


def _per_column(positions: Any, prompt: Prompt) -> Positions | None:
    """Return positions as ``[axes, rows, columns]``; None when they have another shape."""
    if not isinstance(positions, torch.Tensor) or positions.ndim not in (2, 3) or positions.is_floating_point():
        return None
    positions = positions if positions.ndim == 3 else positions[None]
    if positions.shape[1] not in (1, len(prompt.rows)) or positions.shape[2] != prompt.columns:
        return None
    table: Positions = positions.expand(-1, len(prompt.rows), -1).detach().to("cpu", torch.int64).numpy()
    return table


def _counts_on(model: torch.nn.Module) -> bool:
    """Whether the model remembers between calls how far positions are ahead of columns."""
    return any(hasattr(part, "rope_deltas") for part in _heads(model))


def _own_positions(model: torch.nn.Module) -> Any:
    """Return the model's own way to count positions; None when it counts as all do."""
    own = getattr(type(model), "_prepare_position_ids_for_generation", None)
    return None if own is getattr(GenerationMixin, "_prepare_position_ids_for_generation", None) else own


def _positions(
    model: PreTrainedModel,
    given: Mapping[str, Any],
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> tuple[torch.Tensor | None, bool]:
    """Return the positions of the whole prompt if they are not just columns, and whether they were counted here.

    On a cache that holds something, ``generate`` would add what the model remembers of its last prompt, which may be
    another one: the model is asked as for an empty cache.
    """
    if "position_ids" in given:
        return given["position_ids"], False
    count = _own_positions(model)
    if count is None:
        return None, False
    fed = given.get("inputs_embeds", input_ids)
    assert fed is not None
    known = dict(given)
    if "inputs_embeds" in given and input_ids is not None:
        known["input_ids"] = input_ids
    if attention_mask is None:
        attention_mask = torch.ones(fed.shape[:2], dtype=torch.long, device=fed.device)
    positions = count(model, fed, {**known, "attention_mask": attention_mask})
    return positions, True


# --- the chain --------------------------------------------------------------------------------------------------------


def _chained(
    prompt: Prompt,
    ids: npt.NDArray[np.int64],
    media: Media | None,
    types: Mapping[str, Any],
    positions: Positions | None,
) -> Prompt:
    """Return ``prompt`` with rows that tell all of it.

    Neighbours at which something enters, or whose type is not 0, are one run, marked as a whole: they may attend to
    each other. A position that is not the one after its neighbour's is marked where it stands.
    """
    rows, open_marks, plain, wholes = [], [], prompt.plain, list(media.wholes) if media is not None else []
    for row, (own, pad) in enumerate(zip(prompt.rows, prompt.pads, strict=True)):
        solid = np.zeros(len(own), np.bool_) if media is None else media.places[row, pad:].copy()
        for values in types.values():
            solid |= values[row, pad:] != 0
        at = None if positions is None else positions[:, row, pad:]
        marks = []
        for start, stop in _runs(solid):
            parts = [ids[row, pad + start : pad + stop].tobytes()]
            for name, values in sorted(types.items()):
                run = values[row, pad + start : pad + stop]
                parts += [name.encode(), run.tobytes()] if run.any() else []
            parts += [b"at", at[:, start:stop].tobytes()] if at is not None else []
            if media is not None and media.places[row, pad + start : pad + stop].any():
                parts += [b"media", media.digest(row, pad + start, pad + stop)]
            marks.append(Mark(start, stop, digest_of(*parts)))
        if at is not None:
            jumps = np.flatnonzero(_jumps(at) & ~solid)
            marks += [Mark(int(j), int(j) + 1, digest_of(b"jump", at[:, j].tobytes())) for j in jumps]
        rows.append(marked(own, marks))
        plain = plain and not marks
        open_marks.append(tuple(mark for mark in marks if mark.end > len(own)))
        wholes += [(pad + mark.start, pad + mark.end) for mark in marks]
    last = types.get("token_type_ids")
    return replace(
        prompt,
        rows=tuple(rows),
        wholes=tuple(wholes),
        marks=tuple(open_marks),
        plain=plain,
        answer_follows=last is None or not last[:, -1].any(),  # its last column is repeated for what is generated
    )


def _runs(solid: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return where runs of true begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], solid, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _jumps(at: Positions) -> npt.NDArray[np.bool_]:
    """Return which of ``at [axes, columns]`` do not follow the one before; the first ought to be 0."""
    before = np.concatenate([np.full((len(at), 1), -1, np.int64), at[:, :-1]], 1)
    jumps: npt.NDArray[np.bool_] = (at != before + 1).any(axis=0)
    return jumps
