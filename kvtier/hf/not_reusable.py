"""NotReusable: the result of every check that forbids reuse; and the warning of a reason that lasts."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

from kvtier.errors import ReuseWarning

_MOST_WARNINGS = 200  # of a process: reasons with texts of other libraries may differ in each turn
_PASSED_OVER = frozenset({"kvtier", "torch", "transformers"})  # the warning names the line that called these

_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class NotReusable:
    """K and V of this turn must not be reused.

    Attributes:
        reason: why, in words for ``TurnReport.miss_reason``.
        lasts: whether the reason lies in the model or the set-up, so that it holds for later turns too.
    """

    reason: str
    lasts: bool = False


def warn_of(reason: str) -> None:
    """Warn that nothing is reused, for a ``reason`` that lasts: once for each reason in a process."""
    if reason in _warned or len(_warned) >= _MOST_WARNINGS:
        return
    _warned.add(reason)
    warnings.warn(
        f"kvtier reuses nothing: {reason}. Answers are right, but each prompt is computed in full. "
        "(TieredCache.last_turn.miss_reason tells the reason of each turn; this warning comes once.)",
        ReuseWarning,
        stacklevel=_callers_level(),
    )


def forget_warnings() -> None:
    """Let each reason be warned of again."""
    _warned.clear()


def _callers_level() -> int:
    """Return the ``stacklevel`` of ``warn_of``'s first caller outside of kvtier and the libraries below it."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _PASSED_OVER:
            break
        level, frame = level + 1, frame.f_back
    return level
