"""GenerateRequest: the request of one call to a turn, read once from its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from kvtier.hf.inputs.chain_inputs import Inputs
from kvtier.hf.inputs.prompt import Prompt


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """A call of ``generate``, or of ``begin``, as a turn sees it.

    Attributes:
        off: why the turn must neither reuse nor be kept.
        cold: why the turn must not start from a stored prefix, though its tokens may be kept.
        bypass: why the call runs without a turn that feeds the cache; implies ``off``.
        past: the cache argument: a ``TieredCache``, or an ``EncoderDecoderCache`` of one.
        arguments: arguments of the call besides the cache, by name, as passed to transformers.
        ids: ``[batch, columns]``, as passed.
        mask: ``[batch, columns]``.
        inputs: all inputs, ids included; None where ``off``, and in custom loops.
        prompt: the inputs as rows of ids.
        eos_ids: ids that end a sequence.
        longest_answer: the most new tokens; 0 if not known.
        repeats: how many rows of the cache continue each row of the prompt.
        feeds: whether the prompt can be fed in pieces.
        watched: whether to record fed tokens, because returned sequences do not tell which row holds which tokens.
        custom: whether code other than transformers' own decides which tokens are fed.
        missing: kinds of media with placeholders, but without tensors.
    """

    off: str | None = None
    cold: str | None = None
    bypass: str | None = None
    past: Any = None
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    inputs: Inputs | None = None
    prompt: Prompt | None = None
    eos_ids: tuple[int, ...] = ()
    longest_answer: int = 0
    repeats: int = 1
    feeds: bool = True
    watched: bool = False
    custom: bool = False
    missing: tuple[str, ...] = ()
