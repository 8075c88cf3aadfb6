"""GenerateRequest: what one call asks of a turn, read once from its arguments."""

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
        cold: why it must not start from a known prefix, though what is fed may be kept.
        bypass: why the call runs without a turn that feeds the cache; implies ``off``.
        past: what was passed as the cache: a ``TieredCache``, or an ``EncoderDecoderCache`` of one.
        arguments: of the call besides the cache, by name, as transformers is to be given them.
        ids: ``[batch, columns]``, as they were given.
        mask: ``[batch, columns]``.
        inputs: what is fed, besides ids too; None where ``off``, and in loops of one's own.
        prompt: what is fed, as rows of ids.
        eos_ids: ids that end a sequence.
        longest_answer: new tokens at most; 0 where it is not known.
        repeats: how many rows of the cache continue each row of the prompt.
        feeds: whether the prompt can be fed in pieces.
        watched: whether to note what is fed: returned sequences do not tell which row holds what.
        custom: whether other code than transformers' own decides what is fed.
        missing: kinds of media of which placeholders came, but no tensors.
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
