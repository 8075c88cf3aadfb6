"""ComputeCost: seconds to compute the tokens of a prompt, in models with and without sliding windows."""

from __future__ import annotations

from dataclasses import dataclass

from kvtier.costs.prefill import PrefillCost


@dataclass(frozen=True, slots=True)
class ComputeCost:
    """Seconds of a forward pass over one sequence.

    Attributes:
        every_layer: cost of the pass, of each token, and of the attention of full layers.
        windows: ``(tokens that a token sees, seconds for each pair of them)``, for each width of sliding attention.
    """

    every_layer: PrefillCost
    windows: tuple[tuple[int, float], ...] = ()

    def seconds(self, tokens: int, depth_tokens: int = 0) -> float:
        """Return the seconds of one pass over ``tokens`` tokens after ``depth_tokens``; 0 for no tokens."""
        if tokens <= 0:
            return 0.0
        in_windows = sum(
            pair_seconds * (pairs(depth_tokens + tokens, visible) - pairs(depth_tokens, visible))
            for visible, pair_seconds in self.windows
        )
        return self.every_layer.seconds(tokens, depth_tokens) + in_windows


def pairs(tokens: int, visible: int) -> float:
    """Return the pairs of a token and a token that it sees, itself included, if it sees at most ``visible``."""
    whole = min(tokens, visible)
    return whole * (whole + 1) / 2 + (tokens - whole) * visible
