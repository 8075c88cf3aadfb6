"""The two ends of a turn in a custom loop, which feeds the model itself."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from kvtier.errors import BlockError, PromptError
from kvtier.hf.compat.model_profiles import forget_notes
from kvtier.hf.generate.request import read_loop_request
from kvtier.hf.inputs.positions import remember_positions
from kvtier.hf.turn.manager import TurnManager
from kvtier.report import TurnReport


def begin_loop(
    cache: Any, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> TurnReport:
    """Begin a turn of ``cache`` with the prompt ``input_ids [batch, columns]``; its prefix has loaded on return.

    Raises:
        ClosedError: the cache was closed.
        PromptError: ``attention_mask [batch, columns]`` does not fit ``input_ids``.
    """
    turns: TurnManager = cache.turns
    forget_notes(model, cache)
    request = read_loop_request(model, input_ids, attention_mask, turns.resident())
    while True:
        report = turns.begin(model, request)
        try:
            if turns.turn is not None and turns.turn.prefix is not None:
                turns.turn.prefix.wait()
        except BlockError:
            turns.start_over()  # later lookups skip the failed block: begin with the other blocks
            continue
        if turns.turn is not None and turns.turn.prompt is not None:
            remember_positions(model, turns.turn.prompt)
        return report


def commit_loop(turns: TurnManager, sequences: torch.Tensor) -> TurnReport:
    """End a turn: keep the tokens of ``sequences [rows, columns]``, its prompt and all tokens after it.

    Raises:
        PromptError: no turn has begun, or ``sequences`` do not begin with its prompt.
    """
    if turns.turn is None:
        raise PromptError("commit() without begin(): call begin(model, input_ids, attention_mask) first")
    if sequences.ndim != 2:
        raise PromptError(f"sequences must be [rows, columns], not {sequences.ndim}-dimensional")
    prompt = turns.turn.prompt
    if prompt is not None and not prompt.begins(sequences):
        raise PromptError("sequences do not begin with the prompt that begin() was given")
    return turns.commit(sequences)
