"""Turns of one conversation with a tiny model, and how two answers to the same prompt compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kvtier.hf.compat.names import CACHE_ARGUMENTS, generate_argument
from sweep.shrink import PAD, VOCABULARY

PROMPT = 40
ANSWER = 12
QUESTION = 5
LONGER = 21  # than the first: another prompt, so that the second turn of the first is behind padding beside it
EDITED = 30  # the column that is edited: within reach of two sliding layers from the end of the second prompt
NAMES = ("past_key_values", "cache")  # of a cache in generate(): before transformers 5.24, and since
USUAL_NAME = NAMES[0]  # for models that know no cache: kvtier takes one under any name
ROUNDING = 1e-3  # of the logits' standard deviation: what computing in other pieces may change


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said.

    Attributes:
        sequence: ``[1, columns]``, the prompt and the answer.
        logits: ``[new tokens, vocabulary]``.
        cache: what it ended with.
    """

    sequence: torch.Tensor
    logits: torch.Tensor
    cache: Any = None


def prompt(columns: int, seed: int) -> torch.Tensor:
    """Return ``[1, columns]`` random ids without special ones."""
    return torch.randint(2, VOCABULARY, (1, columns), generator=torch.Generator().manual_seed(seed))


def ask(model: PreTrainedModel, ids_1t: torch.Tensor, cache: Any = None, name: str | None = None) -> Answer:
    """Let ``model`` answer greedily, in fp32, on ``cache`` or on the cache it makes by default.

    Args:
        model: the model.
        ids_1t: ``[1, columns]``, the prompt.
        cache: passed to ``generate``.
        name: under which it is passed; by default the one that transformers has for this model.
    """
    said = _generate(model, ids_1t, torch.ones_like(ids_1t), cache, name)
    kept = next((said[name] for name in CACHE_ARGUMENTS if name in said), None)
    # Models of audio return [1, codebooks, columns]; tiny ones have one codebook.
    return Answer(said.sequences.reshape(1, -1), torch.cat(said.logits, 0), kept)


def ask_rows(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: Any = None) -> list[Answer]:
    """Let ``model`` answer each of ``ids [rows, columns]``."""
    said = _generate(model, ids, mask, cache, None)
    logits = torch.stack(said.logits, 1)
    return [Answer(said.sequences[row : row + 1], logits[row]) for row in range(len(ids))]


def _generate(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: Any, name: str | None) -> Any:
    arguments = {} if cache is None else {name or generate_argument(model) or USUAL_NAME: cache}
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=ANSWER,
        do_sample=False,
        use_cache=True,
        suppress_tokens=[PAD],
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )


def next_prompt(answer: Answer) -> torch.Tensor:
    """Return the conversation so far and a new question."""
    return torch.cat([answer.sequence, prompt(QUESTION, seed=2)], 1)


def padded(*rows_1t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of different lengths as one batch, padded on the left, and its mask."""
    columns = max(row.shape[1] for row in rows_1t)
    ids = torch.cat([torch.nn.functional.pad(row, (columns - row.shape[1], 0), value=PAD) for row in rows_1t])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), (columns - r.shape[1], 0)) for r in rows_1t])
    return ids, mask


def edited(ids_1t: torch.Tensor, column: int = EDITED) -> torch.Tensor:
    """Return a copy with another token at ``column``."""
    copy = ids_1t.clone()
    copy[0, column] = 2 + (copy[0, column] - 1) % (VOCABULARY - 2)
    return copy


def reference_cache(model: PreTrainedModel) -> DynamicCache:
    """Return transformers' own cache for ``model``."""
    return DynamicCache(config=model.config)


@dataclass(frozen=True, slots=True)
class Comparison:
    """How an answer compares with a reference to the same prompt.

    Attributes:
        differs_at: the first new token that is another one; None if none is.
        deviation: see ``Outcome``.
        draw: whether the first other token follows logits that agree up to rounding.
        bitwise: whether all logits are the same bits.
    """

    differs_at: int | None
    deviation: float
    draw: bool
    bitwise: bool


def compare(answer: Answer, reference: Answer, rounding: float = ROUNDING) -> Comparison:
    """Compare two answers to the same prompt; ``rounding``: see ``ROUNDING``."""
    new = reference.logits.shape[0]
    ours, theirs = answer.sequence[0, -new:], reference.sequence[0, -new:]
    others = (ours != theirs).nonzero()
    spread = reference.logits.std().item() or 1.0
    steps = (answer.logits - reference.logits).abs().amax(-1) / spread
    first = int(others[0]) if len(others) else None
    # Beyond the first other token the two do not answer the same.
    deviation = steps[: None if first is None else first + 1].max().item()
    draw = first is not None and deviation <= rounding
    return Comparison(first, deviation, draw, bool(torch.equal(answer.logits, reference.logits)))
