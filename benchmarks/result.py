"""What a benchmark found: cases, targets, notes; as values and as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.machine import Machine
from benchmarks.measure import BenchmarkError, Sample, Spread, Tokens, agreement, paired_ratios

Unit = Literal["s", "s/token", "bytes", "share"]
RatioKind = Literal["speedup", "cost"]
"""``speedup``: the baseline's figure over the competitor's. ``cost``: the competitor's over the baseline's."""


@dataclass(frozen=True, slots=True)
class Row:
    """One competitor of a case.

    Attributes:
        name: the competitor.
        samples: its figure in each round.
        spread: of ``samples``.
        ratio: spread of its ratios to the baseline, round by round; None without a baseline.
        answer: whether its tokens were the reference's, see ``Case.reference``.
        same_calls: whether it makes the reference's forward calls, so that other tokens are an error.
        also: medians of the other figures of its samples.
    """

    name: str
    samples: tuple[float, ...]
    spread: Spread
    ratio: Spread | None
    answer: str
    same_calls: bool
    also: Mapping[str, float]

    @property
    def wrong(self) -> bool:
        """Whether its tokens contradict a reference that made the same forward calls."""
        return self.same_calls and self.answer not in ("equal", "no answer")


@dataclass(frozen=True, slots=True)
class Case:
    """Competitors that were measured against each other in the same rounds."""

    title: str
    metric: str
    unit: Unit
    baseline: str | None
    ratio_kind: RatioKind
    reference: str | None
    rows: tuple[Row, ...]
    facts: Mapping[str, Any]

    def row(self, name: str) -> Row:
        """Return the row of a competitor."""
        return next(row for row in self.rows if row.name == name)

    def ratio(self, name: str) -> float:
        """Return the median ratio of a competitor to the baseline."""
        ratio = self.row(name).ratio
        if ratio is None:
            raise BenchmarkError(f"{self.title}: there is no baseline")
        return ratio.median


def make_case(
    title: str,
    samples: Mapping[str, Sequence[Sample]],
    metric: str,
    *,
    unit: Unit = "s",
    baseline: str | None = None,
    ratio_kind: RatioKind = "speedup",
    reference: str | None = None,
    other_calls: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> Case:
    """Return the case that ``metric`` of ``samples`` makes.

    Args:
        title: what was done.
        samples: of each competitor, round by round.
        metric: which of their figures to compare; the others go to ``Row.also``.
        unit: of that figure.
        baseline: the competitor that ratios refer to.
        ratio_kind: which way ratios are written.
        reference: the competitor whose first answer all are compared with.
        other_calls: competitors that compute in other pieces, whose tokens may differ for that reason.
        facts: what else a reader of the JSON needs to know.
    """
    expected: Tokens | None = samples[reference][0].answer if reference is not None else None
    rows = []
    for name, kept in samples.items():
        values = tuple(float(sample.values[metric]) for sample in kept)
        ratio = None
        if baseline is not None:
            base = [float(sample.values[metric]) for sample in samples[baseline]]
            pairs = paired_ratios(base, values) if ratio_kind == "speedup" else paired_ratios(values, base)
            ratio = Spread.of(pairs)
        others = [key for key in kept[0].values if key != metric]
        also = {key: Spread.of([sample.values[key] for sample in kept]).median for key in others}
        verdict = agreement(kept, expected)
        rows.append(Row(name, values, Spread.of(values), ratio, verdict, name not in other_calls, also))
    return Case(title, metric, unit, baseline, ratio_kind, reference, tuple(rows), facts or {})


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that was promised before it was measured."""

    statement: str
    measured: float
    bound: float
    sense: Literal["at least", "at most", "more than", "less than"]
    unit: str = "×"

    @property
    def met(self) -> bool:
        """Whether the figure keeps the promise."""
        return {
            "at least": self.measured >= self.bound,
            "at most": self.measured <= self.bound,
            "more than": self.measured > self.bound,
            "less than": self.measured < self.bound,
        }[self.sense]


@dataclass(frozen=True, slots=True)
class Result:
    """All that one benchmark found."""

    benchmark: str
    purpose: str
    rounds: int
    quick: bool
    cases: tuple[Case, ...]
    targets: tuple[Target, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def wrong(self) -> tuple[str, ...]:
        """What answered with other tokens than the reference that made the same forward calls."""
        return tuple(f"{case.title}: {row.name} {row.answer}" for case in self.cases for row in case.rows if row.wrong)


def as_json(result: Result, machine: Machine) -> dict[str, Any]:
    """Return ``result`` and the machine it was found on, ready for ``json.dumps``."""
    fields = asdict(result)
    fields["targets"] = [asdict(target) | {"met": target.met} for target in result.targets]
    fields["wrong"] = list(result.wrong)
    return {"machine": asdict(machine), **fields}


def write_json(result: Result, machine: Machine, folder: Path) -> Path:
    """Write ``<folder>/<benchmark>.json`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.benchmark}.json"
    path.write_text(json.dumps(as_json(result, machine), indent=1) + "\n", encoding="utf-8")
    return path
