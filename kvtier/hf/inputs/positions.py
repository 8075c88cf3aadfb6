"""Positions of prompt tokens in models that count them in their own way, and token types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationMixin, PreTrainedModel

from kvtier.hf.inputs.continued import KnownRow
from kvtier.hf.inputs.multimodal import KINDS, placeholder_id
from kvtier.hf.inputs.prompt import Positions, Prompt
from kvtier.hf.not_reusable import NotReusable

TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Arguments of ``generate`` that carry token types."""


def merging_parts(model: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    """Return the modules of ``model`` that may merge inputs and count positions."""
    return model, *model.children()


def per_column(positions: Any, prompt: Prompt) -> Positions | None:
    """Return positions as ``[axes, rows, columns]``; None when they have another shape."""
    if not isinstance(positions, torch.Tensor) or positions.ndim not in (2, 3) or positions.is_floating_point():
        return None
    positions = positions if positions.ndim == 3 else positions[None]
    if positions.shape[1] not in (1, len(prompt.rows)) or positions.shape[2] != prompt.columns:
        return None
    table: Positions = positions.expand(-1, len(prompt.rows), -1).detach().to("cpu", torch.int64).numpy()
    return table


def counts_on_earlier_calls(model: torch.nn.Module) -> bool:
    """Whether the model remembers between calls the offset of positions from columns."""
    return any(hasattr(part, "rope_deltas") for part in merging_parts(model))


def own_positions(model: torch.nn.Module) -> Any:
    """Return the model's own function to count positions; None if it has transformers' default."""
    own = getattr(type(model), "_prepare_position_ids_for_generation", None)
    return None if own is getattr(GenerationMixin, "_prepare_position_ids_for_generation", None) else own


def positions_of(
    model: PreTrainedModel,
    given: Mapping[str, Any],
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> tuple[torch.Tensor | None, bool]:
    """Return the positions of the whole prompt if they are not just columns, and whether they were counted here.

    With a filled cache, ``generate`` would add the offset that the model remembers from its last prompt, possibly a
    different one. So the model counts as for an empty cache.
    """
    if "position_ids" in given:
        return given["position_ids"], False
    count = own_positions(model)
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


def positions_going_on(prompt: Prompt, known: Sequence[KnownRow | None]) -> torch.Tensor | None:
    """Return positions ``[axes, rows, columns]`` that continue those of ``known``; None if token order gives them."""
    axes = next((len(row.positions) for row in known if row is not None and row.positions is not None), 0)
    if not axes:
        return None
    positions = np.zeros((axes, len(prompt.rows), prompt.columns), np.int64)
    for row, (own, pad, of) in enumerate(zip(prompt.rows, prompt.pads, known, strict=True)):
        plain = np.broadcast_to(np.arange(len(own)), (axes, len(own)))
        positions[:, row, pad : pad + len(own)] = plain if of is None or of.positions is None else of.positions
    return torch.from_numpy(positions)


def position_jumps(at: Positions) -> npt.NDArray[np.bool_]:
    """Return which of ``at [axes, columns]`` do not follow the position before; the first follows if it is 0."""
    before = np.concatenate([np.full((len(at), 1), -1, np.int64), at[:, :-1]], 1)
    jumps: npt.NDArray[np.bool_] = (at != before + 1).any(axis=0)
    return jumps


def remember_positions(model: torch.nn.Module, prompt: Prompt) -> None:
    """Set the position offset of ``prompt``, for a model that derives positions from an earlier call."""
    if prompt.needed and prompt.positions:
        ahead = [int(at[-1, -1]) + 1 - at.shape[1] for at in prompt.positions]
        _set_ahead(model, torch.tensor(ahead, device=getattr(model, "device", None))[:, None])


def forget_positions(model: torch.nn.Module) -> None:
    """Delete the position offset that the model remembers from an earlier call."""
    _set_ahead(model, None)


def _set_ahead(model: torch.nn.Module, ahead: torch.Tensor | None) -> None:
    for part in merging_parts(model):
        if hasattr(part, "rope_deltas"):
            setattr(part, "rope_deltas", ahead)  # noqa: B010 - not an attribute that types know


def read_types(
    given: Mapping[str, Any], prompt: Prompt, model: PreTrainedModel, ids: npt.NDArray[np.int64]
) -> dict[str, torch.Tensor] | NotReusable:
    """Return the types of all columns, ``[rows, columns]`` each.

    Types of a shorter prompt are extended with 0, as transformers does for generated tokens: the new tokens are text.
    """
    found = {}
    tokens = [token for kind in KINDS if (token := placeholder_id(model.config, kind)) is not None]
    for name in (name for name in TYPES if name in given):
        values = given[name]
        if not isinstance(values, torch.Tensor) or values.ndim != 2 or len(values) != len(prompt.rows):
            return NotReusable(f"{name} are not [rows, columns]")
        if values.is_complex() or (values.is_floating_point() and not bool((values == values.round()).all())):
            return NotReusable(f"{name} are no integers")
        told, columns = values.shape[1], prompt.columns
        if told < columns and told and not bool(values[:, -1].any()) and not np.isin(ids[:, told:], tokens).any():
            values = torch.cat([values, values.new_zeros(len(values), columns - told)], 1)
        if values.shape[1] != columns:
            return NotReusable(f"{name} have another shape than the prompt")
        found[name] = values
    return found


def may_attend_both_ways(
    model: PreTrainedModel, prompt: Prompt, types: Mapping[str, Any], known: Sequence[KnownRow | None]
) -> bool:
    """Whether two neighbours after the ``known`` runs have a type, so that they may attend to each other both ways.

    A model that counts positions in its own way uses types other than ``token_type_ids`` for positions only.
    """
    for name, values in types.items():
        if name != "token_type_ids" and own_positions(model) is not None:
            continue
        for row, (pad, of) in enumerate(zip(prompt.pads, known, strict=True)):
            solid = values[row, pad + (of.run if of is not None else 0) :] != 0
            if (solid[1:] & solid[:-1]).any():
                return True
    return False
