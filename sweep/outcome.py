"""What the sweep finds: an outcome for each check, a row for each architecture, a run, all of it as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["yes", "draw", "no", "upstream", "refused", "misnamed", "wrong", "failed"]
"""
``yes``: the same tokens, and the checked thing happened.
``draw``: another token after logits that agree up to rounding; both answers are right.
``no``: the same tokens, but the checked thing did not happen: no reuse, no cold layer.
``upstream``: transformers' own cache ends in an exception, and so does kvtier's.
``refused``, of the control alone: the model takes no ``DynamicCache``.
``misnamed``, of the control alone: the sweep passed the cache under a name that the model does not know.
``wrong``: other tokens. ``failed``: an exception.
"""
RIGHT = ("yes", "draw")
CHECKS = ("generates", "reuses", "ram", "disk", "streams", "edited", "padded", "names")
UNMEASURED = ("deviation", "influence", "seconds")
"""Fields that differ from machine to machine: a committed file leaves them out."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one check found.

    Attributes:
        verdict: see ``Verdict``.
        reason: of every verdict but ``yes``.
        cached: tokens of the prompt that were reused.
        deviation: the largest difference between the logits of the answer and of the reference, up to the first token
            that is another one, as a share of their standard deviation.
    """

    verdict: Verdict
    reason: str | None = None
    cached: int | None = None
    deviation: float | None = None

    @property
    def right(self) -> bool:
        """Whether the checked thing happened, with a right answer."""
        return self.verdict in RIGHT


@dataclass(frozen=True, slots=True)
class Row:
    """What was found about one architecture.

    Attributes:
        model_type: as transformers names it.
        class_name: the model's class.
        layers: its kinds of layers, in words.
        outcomes: by check; empty if there is no model.
        control: what transformers alone does when it continues its own cache: ``yes``, ``draw``, ``wrong``, ``failed``,
            ``refused`` if there is no such cache, or ``misnamed``.
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
        return bool(self.outcomes) and all(outcome.right for outcome in self.outcomes.values())

    @property
    def bad(self) -> list[str]:
        """What must not be: wrong tokens, exceptions, and a control that was not run as transformers wants it."""
        found = [
            f"{self.model_type} {check}: {outcome.verdict}, {outcome.reason}"
            for check, outcome in self.outcomes.items()
            if outcome.verdict in ("wrong", "failed")
        ]
        if self.control is not None and self.control.verdict == "misnamed":
            found.append(f"{self.model_type} control: {self.control.reason}")
        return found


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the sweep.

    Attributes:
        rows: what it found.
        versions: of what decides the outcomes, by name.
        accepted: what was lost against the run before and accepted, a line for each column of a row.
    """

    rows: Sequence[Row]
    versions: Mapping[str, str]
    accepted: Sequence[str] = ()


def write_json(run: Run, path: Path, *, measured: bool = True) -> None:
    """Write a run, a line for each row; without ``measured``, all of it but ``UNMEASURED``."""
    without = () if measured else UNMEASURED
    rows = ",\n".join(json.dumps(_sparse(row, without)) for row in run.rows)
    head = json.dumps({"versions": dict(run.versions), "accepted": list(run.accepted)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-1]}, "rows": [\n{rows}\n]}}\n', encoding="utf-8")


def read_json(path: Path) -> Run:
    """Return the run that ``write_json`` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return Run([_row(each) for each in found["rows"]], found["versions"], found["accepted"])


def _sparse(value: Row | Outcome, without: Sequence[str]) -> dict[str, Any]:
    """Return the fields that differ from their defaults, and of those not ``without``."""
    found: dict[str, Any] = {}
    for each in fields(value):
        content = getattr(value, each.name)
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if each.name in without or content == default:
            continue
        if isinstance(content, Outcome):
            content = _sparse(content, without)
        elif isinstance(content, Mapping):
            content = {name: _sparse(outcome, without) for name, outcome in content.items()}
        found[each.name] = content
    return found


def _row(found: Mapping[str, Any]) -> Row:
    outcomes = {check: Outcome(**outcome) for check, outcome in found.get("outcomes", {}).items()}
    control = Outcome(**found["control"]) if "control" in found else None
    return Row(**{**found, "outcomes": outcomes, "control": control})
