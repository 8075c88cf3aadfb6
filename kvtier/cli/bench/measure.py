"""Rounds: every place answers once a round, and all answers are compared."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from kvtier.cli.bench.compare import Difference, difference, largest
from kvtier.cli.bench.places import COLD, PLAIN, PROCESS, Places, WorkerError
from kvtier.cli.bench.turns import Answer, Ids


@dataclass(frozen=True, slots=True)
class Row:
    """One place.

    Attributes:
        place: its name.
        seconds: time to the first token in each round.
        cached_by_tier: tokens that were reused, by tier.
        miss_reason: why no more were reused; None when all that could be were.
        same_calls: difference from plain transformers that is fed the same calls; None where that is the row itself, or
            where kvtier feeds the model in other pieces.
        repeatable: whether plain transformers gives the same bits again; only looked at after a difference.
        against_cold: difference from a prompt that is computed in one pass; None for plain transformers.
    """

    place: str
    seconds: tuple[float, ...]
    cached_by_tier: Mapping[str, int]
    miss_reason: str | None
    same_calls: Difference | None
    repeatable: bool
    against_cold: Difference | None

    @property
    def median_seconds(self) -> float:
        """Median of the rounds."""
        return median(self.seconds)

    @property
    def is_wrong(self) -> bool:
        """Whether its bits contradict calls that are known to repeat theirs."""
        return self.repeatable and self.same_calls is not None and not self.same_calls.equal_bits


@dataclass(frozen=True, slots=True)
class Measured:
    """All rows, and the control.

    Attributes:
        rows: one for each place.
        control: prompts that plain transformers computes in two passes, cut where the known prefix ends, against the
            same prompts in one pass: what the cut changes without kvtier.
        notes: what a reader should know.
    """

    rows: tuple[Row, ...]
    control: Difference
    notes: tuple[str, ...]

    def row(self, place: str) -> Row:
        """Return the row of a place."""
        return next(row for row in self.rows if row.place == place)


def measure(
    places: Places, prompts: Sequence[Ids], with_process: bool, most_seconds: float, say: Callable[[str], None]
) -> Measured:
    """Let every place answer each prompt.

    What disturbs the machine for a while then disturbs all places. Every second round goes backwards, so that no place
    always follows the same one.

    Args:
        places: what answers.
        prompts: one for each round.
        with_process: whether to try a new process.
        most_seconds: no round begins after so many; the first one always does.
        say: told what is being done.
    """
    runs = dict(places.runs(with_process))
    found: dict[str, list[Answer]] = {place: [] for place in runs}
    notes: list[str] = []
    until = time.monotonic() + most_seconds
    for number, prompt in enumerate(prompts):
        if number and time.monotonic() > until:
            notes.append(f"{number} of {len(prompts)} rounds: {most_seconds:g} seconds were over (--seconds).")
            break
        for place in list(runs)[:: -1 if number % 2 else 1]:
            say(f"round {number + 1} of {len(prompts)}: {place}")
            gc.collect()
            try:
                found[place].append(runs[place](prompt))
            except WorkerError as error:
                notes.append(str(error))
                del runs[PROCESS], found[PROCESS]
    rows = tuple(_row(place, prompts, found, places) for place in found)
    control = largest(map(difference, found[PLAIN], found[COLD]))
    return Measured(rows, control, (*notes, *_noted(rows)))


def _row(place: str, prompts: Sequence[Ids], found: Mapping[str, Sequence[Answer]], places: Places) -> Row:
    answers, same_calls, repeatable = found[place], None, True
    if place not in (COLD, PLAIN):
        # Where kvtier reused all or nothing, plain transformers did the same; otherwise no calls are the same.
        alike = {0: found[COLD], places.prefix_tokens: found[PLAIN]}
        pairs = [(a, alike[a.cached_tokens][at]) for at, a in enumerate(answers) if a.cached_tokens in alike]
        if len(pairs) == len(answers):
            same_calls = largest(difference(a, b) for a, b in pairs)
            if not same_calls.equal_bits and not places.feeds_alike:
                same_calls = None
            elif not same_calls.equal_bits:
                repeatable = difference(places.plain(prompts[0]), found[PLAIN][0]).equal_bits
    return Row(
        place,
        tuple(each.first_token_seconds for each in answers),
        answers[-1].cached_by_tier,
        answers[-1].miss_reason,
        same_calls,
        repeatable,
        largest(map(difference, answers, found[COLD])) if place not in (COLD, PLAIN) else None,
    )


def _noted(rows: Sequence[Row]) -> list[str]:
    notes = [f"{row.place}: {row.miss_reason}" for row in rows if row.miss_reason is not None]
    for row in rows:
        if not row.repeatable:
            notes.append(
                f"{row.place}: its bits differ, but plain transformers does not repeat its own here either; try "
                "torch.use_deterministic_algorithms(True)"
            )
    return notes
