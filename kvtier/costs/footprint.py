"""Footprint: the bytes that a known prefix takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one sequence: K and V of full layers, K and V of sliding layers, and states.

    Attributes:
        token_bytes: of one token in all layers that keep every token.
        window_token_bytes: of one token in all layers with sliding attention.
        window_tokens: most tokens that those layers keep: a window without the token that comes next.
        state_bytes: of recurrent and convolution states, however many tokens they have seen.
    """

    token_bytes: int
    window_token_bytes: int = 0
    window_tokens: int = 0
    state_bytes: int = 0

    def nbytes(self, tokens: int, computed_tokens: int = 0) -> int:
        """Return the bytes of ``tokens`` tokens, less those in full layers and windows of the first computed ones."""
        missing = tokens - computed_tokens
        if missing <= 0:
            return 0
        in_windows = min(missing, self.window_tokens)
        return self.state_bytes + missing * self.token_bytes + in_windows * self.window_token_bytes

    def tokens_in(self, budget_bytes: int) -> int | None:
        """Return the tokens of the longest sequence whose bytes fit; None for any length, because none adds bytes."""
        left = budget_bytes - self.state_bytes
        each_in_window = self.token_bytes + self.window_token_bytes
        if left < 0 or self.nbytes(1) > budget_bytes:
            return 0
        if self.window_tokens * each_in_window > left:
            return left // each_in_window
        left -= self.window_tokens * each_in_window
        return self.window_tokens + left // self.token_bytes if self.token_bytes else None
