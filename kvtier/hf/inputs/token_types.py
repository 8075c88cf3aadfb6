"""Token types of a prompt: which tokens may attend to each other both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from kvtier.hf.inputs.continued import KnownRow
from kvtier.hf.inputs.multimodal import KINDS, placeholder_id
from kvtier.hf.inputs.positions import own_positions
from kvtier.hf.inputs.prompt import Prompt
from kvtier.hf.not_reusable import NotReusable

TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Arguments of ``generate`` that carry token types."""


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
