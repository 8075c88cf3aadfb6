"""When loading a prefix beats computing it, and when doing both at once beats either.

A prompt of ``n`` tokens whose first ``n - 1`` are known: the last one is computed in every case. *Cold* computes all in
one pass. *Load* brings ``n - 1`` tokens, then computes one. *Both* computes the front while the rest is loaded from the
back, as Cake does (Jin et al., 2025), then computes one. All are seconds to the first token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvtier.costs.compute import ComputeCost
from kvtier.costs.footprint import Footprint
from kvtier.costs.transfer import TransferCost

_LONGEST_TOKENS = 2**24  # no model continues so long a prompt


@dataclass(frozen=True, slots=True)
class Split:
    """A prompt of which the first ``computed_tokens`` are computed while the others are loaded."""

    computed_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Race:
    """Computing a prefix against loading it from one place.

    Attributes:
        compute: cost of computing tokens.
        load: cost of loading bytes.
        footprint: bytes of a prefix.
        shares_cores: whether the cores that compute also copy, so that neither is hidden behind the other.
    """

    compute: ComputeCost
    load: TransferCost
    footprint: Footprint
    shares_cores: bool = False

    def cold_seconds(self, tokens: int) -> float:
        """Return the seconds when nothing is known."""
        return self.compute.seconds(tokens)

    def load_seconds(self, tokens: int) -> float:
        """Return the seconds when all but the last token are loaded."""
        return self.load.seconds(self.footprint.nbytes(tokens - 1)) + self._last_pass_seconds(tokens)

    def both(self, tokens: int) -> Split:
        """Return the best split; its ends are *cold* and *load*, so that it is never slower than either."""
        known = tokens - 1
        if self.shares_cores:
            # Convex on both sides of the place from where on only windows are loaded.
            turn = max(0, known - self.footprint.window_tokens)
            splits = {_lowest(self._sum_seconds(known), 0, turn), _lowest(self._sum_seconds(known), turn, known - 1)}
        else:
            # Computing takes longer the more is computed, loading the less is: the best split is where they meet.
            meeting = _first(0, known, lambda front: self._computed_last(known, front))
            splits = {max(0, meeting - 1), meeting}
        last = self._last_pass_seconds(tokens)
        found = [Split(front, self._split_seconds(known, front) + last) for front in sorted(splits) if front < known]
        ends = [Split(0, self.load_seconds(tokens)), Split(tokens, self.cold_seconds(tokens))]
        return min([*ends, *found], key=lambda split: split.seconds)

    def break_even_tokens(self) -> int | None:
        """Return the shortest prompt from which on loading is no slower than computing; None if there is none."""

        def loss(tokens: int) -> float:
            return self.load_seconds(tokens) - self.cold_seconds(tokens)

        if loss(_LONGEST_TOKENS) > 0:
            return None
        # Loaded bytes grow ever slower, the computation ever faster: the loss rises at most once, then falls for good.
        worst = _lowest(lambda tokens: -loss(tokens), 2, _LONGEST_TOKENS)
        return _first(worst, _LONGEST_TOKENS, lambda tokens: loss(tokens) <= 0)

    def break_even_bytes_per_second(self, tokens: int) -> float | None:
        """Return the bandwidth at which loading takes as long as computing, without latency; None for one token."""
        saved = self.cold_seconds(tokens) - self._last_pass_seconds(tokens)
        return self.footprint.nbytes(tokens - 1) / saved if tokens > 1 and saved > 0 else None

    def _last_pass_seconds(self, tokens: int) -> float:
        return self.compute.seconds(1, tokens - 1)

    def _loading_seconds(self, known: int, front: int) -> float:
        return self.load.seconds(self.footprint.nbytes(known, front))

    def _computed_last(self, known: int, front: int) -> bool:
        return self.compute.seconds(front) >= self._loading_seconds(known, front)

    def _split_seconds(self, known: int, front: int) -> float:
        computing, loading = self.compute.seconds(front), self._loading_seconds(known, front)
        return computing + loading if self.shares_cores else max(computing, loading)

    def _sum_seconds(self, known: int) -> Callable[[int], float]:
        return lambda front: self._split_seconds(known, front)


def _first(begin: int, end: int, holds: Callable[[int], bool]) -> int:
    """Return the first number from ``begin`` on that ``holds``, which all later ones do; ``end`` if none before."""
    while begin < end:
        middle = (begin + end) // 2
        begin, end = (begin, middle) if holds(middle) else (middle + 1, end)
    return begin


def _lowest(of: Callable[[int], float], begin: int, end: int) -> int:
    """Return the number from ``begin`` to ``end`` at which a convex function is lowest."""
    return _first(begin, max(begin, end), lambda at: of(at + 1) >= of(at))
