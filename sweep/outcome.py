"""What the sweep finds: an outcome for each check, a row for each architecture, all of it as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["yes", "draw", "no", "refused", "wrong", "failed"]
"""
``yes``: the same tokens, and what was asked for happened.
``draw``: another token after logits that agree up to rounding; both answers are right.
``no``: the same tokens, but what was asked for did not happen: nothing was reused, no layer was cold.
``refused``: transformers refuses a ``DynamicCache`` for this model, and kvtier refuses alike.
``wrong``: other tokens. ``failed``: an exception.
"""
CHECKS = ("generates", "reuses", "ram", "disk", "streams", "edited", "padded")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one check found.

    Attributes:
        verdict: see ``Verdict``.
        reason: of every verdict but ``yes``.
        cached: tokens of the prompt that were reused.
        deviation: the largest difference between the logits of the first new token and the reference's, as a share of
            their standard deviation.
    """

    verdict: Verdict
    reason: str | None = None
    cached: int | None = None
    deviation: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """What was found about one architecture.

    Attributes:
        model_type: as transformers names it.
        class_name: the model's class.
        layers: its kinds of layers, in words.
        outcomes: by check; empty if there is no model.
        control: what transformers alone does when it continues its own cache: ``yes``, ``draw``, ``wrong``, ``failed``,
            or ``refused`` if there is no such cache.
        keeps: whether the model keeps what it knows in a ``DynamicCache``, not nowhere or in a place of its own.
        not_made: why there is no tiny model.
        influence: what editing a token in the middle changes, as ``Outcome.deviation``: how much the checks can see.
        seconds: that it took.
    """

    model_type: str
    class_name: str
    layers: str = ""
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    control: Outcome | None = None
    keeps: bool = True
    not_made: str | None = None
    influence: float | None = None
    seconds: float = 0.0

    @property
    def green(self) -> bool:
        """Whether every check found what it should."""
        return bool(self.outcomes) and all(outcome.verdict in ("yes", "draw") for outcome in self.outcomes.values())

    @property
    def bad(self) -> list[str]:
        """What must not be: wrong tokens and exceptions."""
        return [
            f"{self.model_type} {check}: {outcome.verdict}, {outcome.reason}"
            for check, outcome in self.outcomes.items()
            if outcome.verdict in ("wrong", "failed")
        ]


def write_json(rows: Sequence[Row], versions: Mapping[str, str], path: Path) -> None:
    """Write what was found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"versions": dict(versions), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> tuple[list[Row], dict[str, str]]:
    """Return what ``write_json`` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return [_row(fields) for fields in found["rows"]], dict(found["versions"])


def _row(fields: Mapping[str, Any]) -> Row:
    outcomes = {check: Outcome(**outcome) for check, outcome in fields["outcomes"].items()}
    control = Outcome(**fields["control"]) if fields["control"] else None
    return Row(**{**fields, "outcomes": outcomes, "control": control})
