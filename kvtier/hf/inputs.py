"""All that a call feeds besides ids → the chain of each row, and what is left to feed after a known prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationMixin, PreTrainedModel

from kvtier.hf.compat.model_profiles import profile_of
from kvtier.hf.compat.names import MEDIA_CONTINUE
from kvtier.hf.continued import HeldRows, KnownRow, known_rows
from kvtier.hf.marks import WHOLE, Mark, digest_of, marked, vector_ids
from kvtier.hf.media import KINDS, Columns, Media, placeholder_id, read_media
from kvtier.hf.prompt import Positions, Prompt, Unreadable, read_prompt

_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_MEDIA = frozenset(name for names in KINDS.values() for name in names)
CHAINED = _MEDIA | {*_TYPES, "inputs_embeds", "position_ids"}
"""Arguments of ``generate`` that can be told in chains."""

_ENDS_EARLY = "padding on the right beside inputs other than ids cannot be told apart"
# What marks a model that puts features in the place of placeholders, and changes nothing else.
_MERGERS = ("get_placeholder_mask", "inputs_merger")

Missing = Mapping[str, Columns]
"""Kind of media → ``[rows, columns]``, where placeholders stand whose media were not passed."""


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What a call feeds: its prompt, and ``arguments`` that it must be called with besides its own.

    ``both_ways``: some tokens may attend to later ones of their run, so that their K and V depend on where it is cut.
    """

    prompt: Prompt
    media: Media | None
    arguments: Mapping[str, Any]
    both_ways: bool = False

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
    missing: Missing | None = None,
    held: HeldRows | None = None,
) -> Inputs | Unreadable:
    """Return what a call of ``generate`` feeds, or why it cannot be told apart from other calls.

    Args:
        model: the model that will be called.
        arguments: of the call; those in ``CHAINED`` are read.
        input_ids: ``[batch, columns]``; None or without columns where there are embeddings.
        attention_mask: ``[batch, columns]``.
        copies: beams or samples of each row.
        missing: placeholders whose media were not passed.
        held: what the cache holds: media that were not passed must have entered there.

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
    ids = _table(prompt)
    behind = input_ids.detach().to("cpu", torch.int64).numpy() if embeds is None and input_ids is not None else ids
    media = read_media(given, model.config, behind)
    if isinstance(media, str):
        return Unreadable(media)
    if media is not None and copies > 1:
        media.join()
        if not media.expands(model):
            return Unreadable("one cannot tell which inputs each beam or sample is given")
    tensors = _types(given, prompt, model, behind)
    if isinstance(tensors, Unreadable):
        return tensors
    types = {name: tensor.detach().to("cpu", torch.int64).numpy() for name, tensor in tensors.items()}
    longer = {name: tensor for name, tensor in tensors.items() if tensor is not given[name]}
    known: Sequence[KnownRow | None] = [None] * len(prompt.rows)
    if missing:
        found = _known(model, prompt, given, missing, held)
        if isinstance(found, str):
            return Unreadable(found)
        known = found
        positions, own = _going_on(prompt, known, behind), _own_positions(model) is not None
    else:
        try:
            positions, own = _positions(model, {**given, **longer}, input_ids, attention_mask)
        except Exception as error:  # generate() will raise it, or knows better
            return Unreadable(f"the model cannot count positions: {type(error).__name__}: {error}")
    if ends_early and positions is not None:
        return Unreadable(_ENDS_EARLY)
    by_column = None if positions is None else _per_column(positions, prompt)
    if by_column is None and positions is not None:
        return Unreadable("positions have another shape than the prompt, or are no integers")
    return Inputs(
        _chained(prompt, ids, media, types, by_column, known),
        media,
        {**longer, **({"position_ids": positions} if own else {})},
        _both_ways(model, prompt, types, known),
    )


def why_not_begin(model: PreTrainedModel) -> str | None:
    """Return why a loop that calls ``model`` itself cannot reuse; None when it may.

    Positions that the model remembers from another prompt are forgotten.
    """
    if profile_of(model).carried_argument is not None:
        return "begin() cannot give this model the states that it carries past a cache"
    if _counts_on(model) and _own_positions(model) is None:
        return "the model derives positions from an earlier call"
    _remember(model, None)
    return None


def remember_positions(model: torch.nn.Module, prompt: Prompt) -> None:
    """Let a loop go on from ``prompt``: a model that derives positions from an earlier call takes this one for it."""
    if prompt.needed:
        ahead = [int(at[-1, -1]) + 1 - at.shape[1] for at in prompt.positions]
        _remember(model, torch.tensor(ahead)[:, None])


def _remember(model: torch.nn.Module, ahead: torch.Tensor | None) -> None:
    for part in _heads(model):
        if hasattr(part, "rope_deltas"):
            setattr(part, "rope_deltas", ahead)  # noqa: B010 - not an attribute that types know


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


def _table(prompt: Prompt) -> npt.NDArray[np.int64]:
    """Return the ids ``[rows, columns]``, 0 where padding is."""
    ids = np.zeros((len(prompt.rows), prompt.columns), np.int64)
    for row, (own, pad) in enumerate(zip(prompt.rows, prompt.pads, strict=True)):
        ids[row, pad : pad + len(own)] = own
    return ids


# --- media that were not passed again ---------------------------------------------------------------------------------


def _known(
    model: PreTrainedModel, prompt: Prompt, given: Mapping[str, Any], missing: Missing, held: HeldRows | None
) -> Sequence[KnownRow | None] | str:
    """Return what the cache holds of each row in which media enter that were not passed; why not, as text."""
    also = sorted(given.keys() & (_MEDIA | {"position_ids"}))
    if also:
        return f"{', '.join(also)} were passed, so that nothing can be taken from the cache for the others"
    where = np.logical_or.reduce(list(missing.values()))
    places = [
        where[row, pad : pad + len(own)] for row, (own, pad) in enumerate(zip(prompt.rows, prompt.pads, strict=True))
    ]
    return known_rows(prompt.rows, places, held, counts=_own_positions(model) is not None)


def _going_on(prompt: Prompt, known: Sequence[KnownRow | None], ids: npt.NDArray[np.int64]) -> torch.Tensor | None:
    """Return positions ``[axes, rows, columns]`` that go on from those of ``known``; None where order gives them."""
    axes = next((len(row.positions) for row in known if row is not None and row.positions is not None), 0)
    if not axes:
        return None
    positions = np.zeros((axes, *ids.shape), np.int64)
    for row, (own, pad, of) in enumerate(zip(prompt.rows, prompt.pads, known, strict=True)):
        plain = np.broadcast_to(np.arange(len(own)), (axes, len(own)))
        positions[:, row, pad : pad + len(own)] = plain if of is None or of.positions is None else of.positions
    return torch.from_numpy(positions)


# --- what stands beside each id ---------------------------------------------------------------------------------------


def _types(
    given: Mapping[str, Any], prompt: Prompt, model: PreTrainedModel, ids: npt.NDArray[np.int64]
) -> dict[str, torch.Tensor] | Unreadable:
    """Return the types of all columns, ``[rows, columns]`` each.

    Types of a shorter prompt go on with 0, as transformers makes those of generated tokens: words came since.
    """
    found = {}
    tokens = [token for kind in KINDS if (token := placeholder_id(model.config, kind)) is not None]
    for name in (name for name in _TYPES if name in given):
        values = given[name]
        if not isinstance(values, torch.Tensor) or values.ndim != 2 or len(values) != len(prompt.rows):
            return Unreadable(f"{name} are not [rows, columns]")
        if values.is_complex() or (values.is_floating_point() and not bool((values == values.round()).all())):
            return Unreadable(f"{name} are no integers")
        told, columns = values.shape[1], prompt.columns
        if told < columns and told and not bool(values[:, -1].any()) and not np.isin(ids[:, told:], tokens).any():
            values = torch.cat([values, values.new_zeros(len(values), columns - told)], 1)
        if values.shape[1] != columns:
            return Unreadable(f"{name} have another shape than the prompt")
        found[name] = values
    return found


def _both_ways(
    model: PreTrainedModel, prompt: Prompt, types: Mapping[str, Any], known: Sequence[KnownRow | None]
) -> bool:
    """Whether tokens of one type follow each other that may attend both ways, behind what is ``known`` of media.

    A model that counts positions in its own way takes types for that.
    """
    for name, values in types.items():
        if name != "token_type_ids" and _own_positions(model) is not None:
            continue
        for row, (pad, of) in enumerate(zip(prompt.pads, known, strict=True)):
            solid = values[row, pad + (of.run if of is not None else 0) :] != 0
            if (solid[1:] & solid[:-1]).any():
                return True
    return False


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
    known: Sequence[KnownRow | None],
) -> Prompt:
    """Return ``prompt`` with rows that tell all of it.

    Neighbours at which something enters, or whose type is not 0, are one run, marked as a whole: they may attend to
    each other. A position that is not the one after its neighbour's is marked where it stands. Where the cache knows
    a row, the marks are those that it knows.
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
            marks.append(Mark(start, stop, digest_of(*parts)))
        if at is not None:
            jumps = np.flatnonzero(_jumps(at) & ~solid)
            marks += [
                Mark(int(j), int(j) + 1, digest_of(b"jump", at[:, j].tobytes()), is_position=True)
                for j in jumps
                if j >= begin
            ]
        rows.append(marked(own, marks))
        marks_of.append(tuple(marks))
        wholes += [(pad + mark.start, pad + mark.end) for mark in marks]
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
