"""Verdicts: on one answer beside a reference, and on several answers of one check."""

from __future__ import annotations

from collections.abc import Sequence

from sweep.outcome import Outcome, Verdict
from sweep.turns import ROUNDING, Answer, compare

_FROM_BAD_TO_GOOD: Sequence[Verdict] = ("failed", "wrong", "upstream", "no", "draw", "yes")


def judge(answer: Answer, reference: Answer, rounding: float = ROUNDING) -> Outcome:
    """Return whether ``answer`` is right. Equal tokens are not enough: with other logits they are luck."""
    comparison = compare(answer, reference, rounding)
    verdict: Verdict = "yes"
    reason = None
    if comparison.differs_at is not None:
        verdict = "draw" if comparison.draw else "wrong"
        reason = f"differs at token {comparison.differs_at}"
    elif not comparison.deviation <= rounding:  # NaN is no rounding either
        verdict, reason = "wrong", f"the same tokens, but logits off by {comparison.deviation:.1%} of their spread"
    return Outcome(verdict, reason, None, comparison.deviation)


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the first of the worst ``outcomes``."""
    return min(outcomes, key=lambda outcome: _FROM_BAD_TO_GOOD.index(outcome.verdict))
