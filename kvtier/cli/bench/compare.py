"""Comparison of two answers: equal bits, or how far logits are apart and which tokens differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kvtier.cli.bench.turns import Answer


@dataclass(frozen=True, slots=True)
class Difference:
    """How two answers to one prompt differ.

    Attributes:
        equal_bits: whether all tokens and all logits are the same.
        largest_logit_delta: largest difference of a logit, up to the first token that differs: beyond it, the two
            answers continue different texts.
        flipped_tokens: tokens that differ.
        tokens: tokens that were compared.
    """

    equal_bits: bool
    largest_logit_delta: float
    flipped_tokens: int
    tokens: int

    @property
    def text(self) -> str:
        """The difference as people read it."""
        if self.equal_bits:
            return "equal bits"
        return f"Δ {self.largest_logit_delta:.2g}, {self.flipped_tokens} of {self.tokens} tokens"


def difference(one: Answer, other: Answer) -> Difference:
    """Return how ``one`` differs from ``other``, an answer of the same length."""
    differing = [at for at, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b]
    same_history = (differing[0] if differing else len(one.tokens) - 1) + 1
    a, b = one.logits[:same_history].double(), other.logits[:same_history].double()
    # Some models exclude tokens with infinite logits.
    delta = torch.where(a == b, 0.0, (a - b).abs())
    equal = not differing and torch.equal(one.logits, other.logits)
    return Difference(equal, float(delta.nan_to_num(nan=torch.inf).max()), len(differing), len(one.tokens))


def largest(differences: Iterable[Difference]) -> Difference:
    """Return one difference that stands for those of all rounds: the largest delta, and all tokens."""
    found = list(differences)
    return Difference(
        all(each.equal_bits for each in found),
        max(each.largest_logit_delta for each in found),
        sum(each.flipped_tokens for each in found),
        sum(each.tokens for each in found),
    )
