"""TurnClock: when the forward passes of a turn began and ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator

import torch

from kvtier.costs.prefill import PrefillSample


def is_asynchronous(device: torch.device) -> bool:
    """Return whether a forward pass on ``device`` returns before it has ended."""
    return device.type not in ("cpu", "meta")


def wait_for_compute(devices: Collection[torch.device]) -> None:
    """Block the caller until what was enqueued on the current streams of ``devices`` has run.

    Reading a value does that with every backend, also with those that have no streams or events of their own.
    """
    for device in filter(is_asynchronous, devices):
        torch.zeros((), device=device).item()


class TurnClock:
    """Times the forward passes of one turn, from the first layer of one to the first layer of the next.

    On a device that computes asynchronously, a pass has ended when its end was waited for: ``generate`` waits for a
    pass that makes a token, sampling included, but not for one that computes a part of the prompt. Those that nothing
    waited for are no samples.

    Args:
        began: when the call began, in seconds of ``now``.
        prompt_columns: columns of the prompt.
        rows: sequences that are computed.
        is_asynchronous: whether a pass returns before it has ended.
        now: monotonic seconds.

    Attributes:
        first_token_seconds: from the beginning of the call to the end of the pass with the last column of the prompt;
            0 until then.
        prompt_seconds: the same from the time when the turn was planned.
        around_seconds: of these, those before the first pass, but those that waited for pages.
    """

    def __init__(
        self,
        began: float,
        prompt_columns: int,
        rows: int,
        *,
        is_asynchronous: bool = False,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.first_token_seconds = 0.0
        self.prompt_seconds = 0.0
        self.around_seconds = 0.0
        self._began = began
        self._planned_at = now()
        self._prompt_columns = prompt_columns
        self._rows = rows
        self._now = now
        self._is_asynchronous = is_asynchronous
        self._is_idle = True  # whether nothing was enqueued when the last pass began, or ended
        self._running: tuple[int, int, float, float] | None = None
        self._passes: list[tuple[PrefillSample, float]] = []

    def begin_pass(self, depth_columns: int, columns: int, waited_seconds: float) -> None:
        """Note that a pass of ``columns`` begins after ``depth_columns``; the pass before it has ended.

        ``waited_seconds`` is how long the turn has waited for pages so far.
        """
        now = self.end_pass(waited_seconds)
        if not self.around_seconds:
            self.around_seconds = max(0.0, now - self._planned_at - waited_seconds)
        self._running = columns, depth_columns, now, waited_seconds

    def end_pass(self, waited_seconds: float, *, is_settled: bool = False) -> float:
        """Note that the running pass, if any, has ended; return the time.

        ``is_settled`` says that a device which computes asynchronously was waited for.
        """
        now = self._now()
        if self._running is not None:
            columns, depth, began, waited = self._running
            self._running = None
            waiting = waited_seconds - waited
            was_idle = self._is_idle
            self._is_idle = not self._is_asynchronous or is_settled or depth + columns >= self._prompt_columns
            if was_idle and self._is_idle:
                sample = PrefillSample(columns, depth, max(0.0, now - began - waiting), self._rows)
                self._passes.append((sample, waiting))
            if depth + columns >= self._prompt_columns and not self.first_token_seconds:
                self.first_token_seconds = now - self._began
                self.prompt_seconds = now - self._planned_at
        return now

    def samples(self) -> Iterator[PrefillSample]:
        """Yield the passes that ended, but those that waited for pages as long as they computed."""
        yield from (sample for sample, waited in self._passes if waited < sample.seconds)
