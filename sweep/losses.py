"""What a run of the sweep lost against the run before it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sweep.models import base_of
from sweep.outcome import Outcome, Row


@dataclass(frozen=True, slots=True)
class Difference:
    """How the rows of two runs differ.

    Attributes:
        lost: a line for each column of a row that was yes and is not any more, with the reason.
        new: architectures that were not in the run before.
        gone: architectures that transformers does not list any more.
    """

    lost: Sequence[str]
    new: Sequence[str]
    gone: Sequence[str]


def difference(before: Sequence[Row], now: Sequence[Row], listed: Collection[str]) -> Difference:
    """Return how ``now`` differs from the rows of the run ``before``.

    Args:
        before: rows of all architectures that ``now`` should have, too.
        now: rows.
        listed: what transformers lists; an architecture that left the list counts as gone, not as lost.
    """
    found = {row.model_type: row for row in now}
    lost: list[str] = []
    gone: list[str] = []
    for row in before:
        if row.model_type in found or base_of(row.model_type) in listed:
            lost += _lost(row, found.get(row.model_type))
        else:
            gone.append(row.model_type)
    known = {row.model_type for row in before}
    return Difference(lost, [name for name in found if name not in known], gone)


def _lost(before: Row, now: Row | None) -> list[str]:
    """Return a line for each column that the row has lost."""
    outcomes: Mapping[str, Outcome] = {} if now is None else now.outcomes
    missing = "it was not examined" if now is None else now.not_made or "the check was not run"
    lines = []
    for check, was in before.outcomes.items():
        if not was.right:
            continue
        outcome = outcomes.get(check)
        if outcome is None:
            lines.append(f"{before.model_type} {check}: {missing}")
        elif not outcome.right:
            lines.append(f"{before.model_type} {check}: {outcome.verdict}, {outcome.reason}")
        elif (outcome.cached or 0) < (was.cached or 0):
            lines.append(f"{before.model_type} {check}: {outcome.cached or 0} tokens, not {was.cached} as before")
    return lines
