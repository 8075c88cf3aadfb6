"""PrefillCost: seconds of a forward pass, by the tokens it is fed and the tokens before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.costs.fit import fitted

_FEW_TOKENS = 32  # so few tokens in a pass do not fill the matrix units: one more costs more than in a long pass


@dataclass(frozen=True, slots=True)
class PrefillSample:
    """A forward pass that was timed: ``rows`` sequences, ``tokens`` of each, after ``depth_tokens`` of each."""

    tokens: int
    depth_tokens: int
    seconds: float
    rows: int = 1


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Seconds of a forward pass: a part for the pass, and others for each token, for each pair and for each one before.

    Weights, and K and V of the tokens before, are read once a pass. Matrix products grow with the tokens, attention
    with the pairs of a token and a token that it sees (Kaplan et al., 2020, count the operations so). Attention after
    other tokens computes whole rectangles of pairs: transformers passes a mask for it, and kernels that are told of no
    mask, but that they are causal, skip half of the pairs of a prompt's first pass.

    Attributes:
        pass_seconds: for the pass itself, however few tokens it is fed.
        token_seconds: for each token.
        pair_seconds: for each pair of a token and a token at or before it.
        depth_seconds: for each token before.
        few_seconds: for each of the first tokens of a sequence's part of a pass, of which a matrix product makes less
            use.
    """

    pass_seconds: float
    token_seconds: float
    pair_seconds: float
    depth_seconds: float = 0.0
    few_seconds: float = 0.0

    def seconds(self, tokens: int, depth_tokens: int = 0, rows: int = 1) -> float:
        """Return the seconds of one pass; 0 for no tokens."""
        if tokens <= 0:
            return 0.0
        return sum(a * b for a, b in zip(_features(tokens, depth_tokens, rows), self._coefficients, strict=True))

    @property
    def _coefficients(self) -> tuple[float, ...]:
        return self.pass_seconds, self.token_seconds, self.pair_seconds, self.depth_seconds, self.few_seconds

    def refined(self, samples: Sequence[PrefillSample]) -> PrefillCost:
        """Return the cost that fits ``samples``, and this one where they say nothing."""
        rows = [_features(each.tokens, each.depth_tokens, each.rows) for each in samples]
        return PrefillCost(*fitted(rows, [each.seconds for each in samples], self._coefficients, main=1))


def _features(tokens: int, depth_tokens: int, rows: int) -> tuple[float, ...]:
    pairs = tokens * (depth_tokens + tokens) if depth_tokens else tokens * (tokens + 1) / 2
    return 1.0, float(rows * tokens), rows * pairs, float(rows * depth_tokens), float(min(rows * tokens, _FEW_TOKENS))


def first_guess(
    weight_bytes: int,
    token_bytes: float,
    token_operations: float,
    pair_operations: float,
    *,
    operations_per_second: float,
    bytes_per_second: float,
) -> PrefillCost:
    """Return the cost of a model that nothing was measured of.

    Args:
        weight_bytes: bytes of the weights that each pass reads.
        token_bytes: bytes of K and V of a token, which each later pass reads.
        token_operations: additions and multiplications for a token: about two for each weight.
        pair_operations: those for a token and a token that it sees: four for each channel of each layer's queries.
        operations_per_second: what the device reaches.
        bytes_per_second: how fast it reads weights.
    """
    return PrefillCost(
        weight_bytes / bytes_per_second,
        token_operations / operations_per_second,
        pair_operations / operations_per_second,
        token_bytes / bytes_per_second,
        token_operations / operations_per_second,
    )
