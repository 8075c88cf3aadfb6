"""Competitors, interleaved in rounds: who runs when, and what their figures say about each other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

Tokens = tuple[int, ...]


class BenchmarkError(Exception):
    """A competitor did not do what its name says, so that its figure would mean something else."""


class SkippedError(Exception):
    """The machine has not what a benchmark needs; the message says what that is."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one competitor did in one round: its figures by name, and the tokens it answered with (None: no answer)."""

    values: Mapping[str, float]
    answer: Tokens | None = None


@dataclass(frozen=True, slots=True)
class Competitor:
    """One way to do the job. ``run`` prepares off the clock, times itself, and tidies up."""

    name: str
    run: Callable[[], Sample]


@dataclass(frozen=True, slots=True)
class Options:
    """How a benchmark runs.

    Attributes:
        rounds: None means its own default.
        quick: short, and only for looking at.
        say: what is told of its progress.
        trace: a file of requests, for the benchmark that replays one.
    """

    rounds: int | None = None
    quick: bool = False
    say: Callable[[str], None] = field(default=lambda _: None)
    trace: Path | None = None

    def rounds_or(self, default: int) -> int:
        """Return the rounds that were asked for, or 2 when quick, or ``default``."""
        return self.rounds if self.rounds is not None else 2 if self.quick else default


def turn_order(names: Sequence[str], round_index: int) -> list[str]:
    """Return who runs in which order in a round.

    Rounds come in pairs, there and back again, each pair beginning one competitor further: nobody always runs first,
    and nobody always follows the same one.
    """
    start = round_index // 2 % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if round_index % 2 else order


def interleave(
    competitors: Sequence[Competitor], rounds: int, say: Callable[[str], None]
) -> dict[str, tuple[Sample, ...]]:
    """Run every competitor once a round.

    What disturbs the machine for a while then disturbs them all. Garbage is collected before each one: none pays for
    what another left.

    Raises:
        BenchmarkError: two competitors have one name, or there are no rounds.
    """
    by_name = {competitor.name: competitor for competitor in competitors}
    if len(by_name) != len(competitors):
        raise BenchmarkError("two competitors have the same name")
    if rounds < 1:
        raise BenchmarkError(f"rounds={rounds}: at least one is needed")
    samples: dict[str, list[Sample]] = {name: [] for name in by_name}
    for round_index in range(rounds):
        for name in turn_order(list(by_name), round_index):
            say(f"round {round_index + 1} of {rounds}: {name}")
            gc.collect()
            samples[name].append(by_name[name].run())
    return {name: tuple(kept) for name, kept in samples.items()}


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and extremes of some figures."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of ``values`` (at least one)."""
        return cls(float(median(values)), float(min(values)), float(max(values)))


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return one ratio for each round: figures of one round share what the machine was doing then."""
    return [n / d for n, d in zip(numerators, denominators, strict=True)]


def agreement(samples: Sequence[Sample], reference: Tokens | None) -> str:
    """Return ``"equal"``, or the first round and token in which an answer leaves ``reference``, or ``"no answer"``."""
    if reference is None or any(sample.answer is None for sample in samples):
        return "no answer"
    for round_index, sample in enumerate(samples):
        answer = sample.answer
        assert answer is not None
        if answer != reference:
            pairs = zip(answer, reference, strict=False)
            shorter = min(len(answer), len(reference))
            at = next((i for i, (seen, expected) in enumerate(pairs) if seen != expected), shorter)
            return f"differs at token {at} in round {round_index + 1}"
    return "equal"
