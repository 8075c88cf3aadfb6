"""TurnClock: when the forward passes of a turn began and ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from kvtier.costs.prefill import PrefillSample


class TurnClock:
    """Times the forward passes of one turn, from the first layer of one to the first layer of the next.

    ``generate`` waits for a pass before it begins the next one, since it must know the token: so this is the time of
    the pass also on a device that computes asynchronously, sampling included.

    Args:
        began: when the call began, in seconds of ``now``.
        prompt_columns: columns of the prompt.
        rows: sequences that are computed.
        now: monotonic seconds.

    Attributes:
        first_token_seconds: from the beginning of the call to the end of the pass with the last column of the prompt;
            0 until then.
        prompt_seconds: the same from the time when the turn was planned.
    """

    def __init__(
        self, began: float, prompt_columns: int, rows: int, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.first_token_seconds = 0.0
        self.prompt_seconds = 0.0
        self._began = began
        self._planned_at = now()
        self._prompt_columns = prompt_columns
        self._rows = rows
        self._now = now
        self._running: tuple[int, int, float, float] | None = None
        self._passes: list[tuple[PrefillSample, float]] = []

    def begin_pass(self, depth_columns: int, columns: int, waited_seconds: float) -> None:
        """Note that a pass of ``columns`` begins after ``depth_columns``; the pass before it has ended.

        ``waited_seconds`` is how long the turn has waited for pages so far.
        """
        now = self.end_pass(waited_seconds)
        self._running = columns, depth_columns, now, waited_seconds

    def end_pass(self, waited_seconds: float) -> float:
        """Note that the running pass, if any, has ended; return the time."""
        now = self._now()
        if self._running is not None:
            columns, depth, began, waited = self._running
            self._running = None
            waiting = waited_seconds - waited
            sample = PrefillSample(columns, depth, max(0.0, now - began - waiting), self._rows)
            self._passes.append((sample, waiting))
            if depth + columns >= self._prompt_columns and not self.first_token_seconds:
                self.first_token_seconds = now - self._began
                self.prompt_seconds = now - self._planned_at
        return now

    def samples(self) -> Iterator[PrefillSample]:
        """Yield the passes that ended, but those that waited for pages as long as they computed."""
        yield from (sample for sample, waited in self._passes if waited < sample.seconds)
