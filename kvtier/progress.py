"""Progress of long work: told to a callback, or shown as bars."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvtier.errors import ConfigurationError

_log = logging.getLogger("kvtier.progress")
_BAR_DELAY_SECONDS = 0.5

PREFILL, LOAD, COMMIT, FLUSH, REBUILD = "prefill", "load", "commit", "flush", "rebuild"
"""Kinds of work: a prompt is computed; K and V are loaded; a turn is kept; blocks are written; the catalog of a folder
is rebuilt."""


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """How far a piece of work is.

    Attributes:
        kind: ``"prefill"``, ``"load"``, ``"commit"``, ``"flush"`` or ``"rebuild"``.
        done: how much is done, in ``unit``. It never shrinks.
        total: how much there is to do, as far as it is known now.
        unit: ``"tokens"``, ``"bytes"`` or ``"blocks"``.
        seconds: since the work began.
        ended: whether this is the last event of the work. If it was interrupted, ``done`` is less than ``total``.
    """

    kind: str
    done: int
    total: int
    unit: str
    seconds: float
    ended: bool = False


Tell = Callable[[ProgressEvent], object]


class Progress:
    """Tells a callback how far work is. A callback that raises is not called again; the work goes on.

    Args:
        tell: is called on the thread that works, so it should return soon.
        now: monotonic seconds.
    """

    def __init__(self, tell: Tell, now: Callable[[], float] = time.perf_counter) -> None:
        self._tell: Tell | None = tell
        self.now = now

    def begin(self, kind: str, total: int, unit: str) -> Task:
        """Return a piece of work that begins now."""
        return Task(self, kind, total, unit)

    def tell(self, event: ProgressEvent) -> None:
        """Pass ``event`` to the callback. Its errors are logged once."""
        tell = self._tell
        if tell is None:
            return
        try:
            tell(event)
        except Exception as error:  # of any kind: it must not end a generate()
            self._tell = None
            _log.warning(
                "progress is not shown any more: the callback %r raised %s: %s", tell, type(error).__name__, error
            )


class Task:
    """One piece of work, and how far it is."""

    def __init__(self, progress: Progress, kind: str, total: int, unit: str) -> None:
        self.total = total
        self.done = 0
        self.ended = False
        self._progress, self._kind, self._unit = progress, kind, unit
        self._began = progress.now()
        self._tell()

    def to(self, done: int, total: int | None = None) -> None:
        """Note that ``done`` of ``total`` is done; less than before is ignored."""
        total = self.total if total is None else total
        done = max(self.done, min(done, total))
        total = max(done, total)
        if self.ended or (done, total) == (self.done, self.total):
            return
        self.done, self.total = done, total
        self._tell()

    def end(self, *, complete: bool = True) -> None:
        """Note that the work has ended; ``complete``: all of it was done. May be called more than once."""
        if self.ended:
            return
        self.ended = True
        if complete:
            self.done = self.total
        self._tell()

    def _tell(self) -> None:
        seconds = self._progress.now() - self._began
        self._progress.tell(ProgressEvent(self._kind, self.done, self.total, self._unit, seconds, self.ended))


class Bars:
    """Shows events as bars of tqdm, in terminals and notebooks. Work that ends soon shows none.

    Args:
        make_bar: takes the arguments of ``tqdm.tqdm``; by default ``tqdm.auto.tqdm``.
        delay_seconds: how long work takes before its bar appears.
    """

    def __init__(self, make_bar: Callable[..., Any] | None = None, delay_seconds: float = _BAR_DELAY_SECONDS) -> None:
        self._make_bar = make_bar
        self._delay_seconds = delay_seconds
        self._bars: dict[str, Any] = {}

    def __call__(self, event: ProgressEvent) -> None:
        """Draw ``event``."""
        bar = self._bars.get(event.kind)
        if bar is not None and event.done < bar.n:  # work that never ended: another one has begun
            self._bars.pop(event.kind).close()
            bar = None
        if bar is None:
            if event.ended:
                return
            bar = self._bars[event.kind] = self._new_bar(event)
        bar.total = event.total
        bar.update(event.done - bar.n)
        if event.ended:
            self._bars.pop(event.kind).close()

    def _new_bar(self, event: ProgressEvent) -> Any:
        if self._make_bar is None:
            from tqdm.auto import tqdm  # looks for a notebook when it is imported

            self._make_bar = partial(tqdm, disable=None)  # none where standard error is no terminal: a log
        is_bytes = event.unit == "bytes"
        return self._make_bar(
            total=event.total,
            desc=f"kvtier: {event.kind}",
            unit="B" if is_bytes else f" {event.unit}",
            unit_scale=is_bytes,
            delay=self._delay_seconds,
            leave=False,
        )


def progress_of(value: object) -> Progress | None:
    """Return what the argument ``progress`` asks for: True for bars, a callback, or False for nothing.

    Raises:
        ConfigurationError: it is none of these.
    """
    if value is False or value is None:
        return None
    if isinstance(value, Progress):
        return value
    if value is True:
        return Progress(Bars())
    if not callable(value):
        raise ConfigurationError(
            f"progress={value!r:.80} is unknown; pass True for bars, or a function of a ProgressEvent."
        )
    return Progress(value)
