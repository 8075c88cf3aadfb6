"""Why K and V must not be reused: the one outcome that every check of a call, a prompt or a model returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NotReusable:
    """K and V of this turn must not be reused.

    Attributes:
        reason: why, in words for ``TurnReport.miss_reason``.
    """

    reason: str
