"""NotReusable: the result of every check of a call, a prompt or a model that forbids reuse."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NotReusable:
    """K and V of this turn must not be reused.

    Attributes:
        reason: why, in words for ``TurnReport.miss_reason``.
    """

    reason: str
