"""Worth: what it is worth to keep the K and V of one model on one machine. Pure functions of measured costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LEAST_SHARE = 0.01
"""Of what computing takes: what a block saves at least that costs more to load. 0 means that nothing is known."""
TOO_SLOW_TIMES = 10.0
"""A load that takes so many times what computing takes is of no use, not even beside the computation of what is before:
both together reach ``1 + 1 / 10`` times the speed of computing alone, and so save less than a tenth of the time, which
is what a turn asks for (``both_share`` in ``kvtier/hf/turn/cost.py``)."""
ENOUGH_LOADS = 3
"""Timed loads from which on a tier counts as measured."""


@dataclass(frozen=True, slots=True)
class Worth:
    """What computing and loading take a token and a byte, of one model.

    Only what grows with the tokens counts. The pass itself is computed anyway, for the tokens that are new, and the
    wait for the first byte is shared by all blocks of a load.

    Attributes:
        token_seconds: to compute each token.
        pair_seconds: to compute each pair of a token and a token at or before it.
        token_bytes: bytes of K and V of a token, over all layers; more than 0.
        byte_seconds: to load a byte, by tier: of those that were measured.
    """

    token_seconds: float
    pair_seconds: float
    token_bytes: float
    byte_seconds: Mapping[str, float]

    def computing_byte_seconds(self, tokens: float, depth_tokens: float) -> float:
        """Return what computing ``tokens`` after ``depth_tokens`` takes for each byte of their K and V."""
        middle = max(0.0, depth_tokens + tokens / 2)
        return (self.token_seconds + self.pair_seconds * middle) / self.token_bytes

    def saved_seconds(self, tier: str, tokens: int, depth_tokens: int, nbytes: int) -> float:
        """Return how much sooner ``nbytes`` are loaded from ``tier`` than computed.

        The tokens of a block count by their share of bytes: where their layers are in several blocks, each has its
        part, and a block that is encoded, or holds states besides, is worth the same a byte as others of its depth.
        """
        computing = self.computing_byte_seconds(tokens, depth_tokens)
        return nbytes * max(computing - self.byte_seconds.get(tier, 0.0), LEAST_SHARE * computing)

    def is_loaded_too_slowly(self, tier: str, tokens: int) -> bool:
        """Return whether no turn gains by loading any of the first ``tokens`` of a sequence from ``tier``.

        The last of them decides: it takes longest to compute, and loads begin from the back.
        """
        loading = self.byte_seconds.get(tier, 0.0)
        return loading > TOO_SLOW_TIMES * self.computing_byte_seconds(0, tokens)
