"""WriteBehind: writes blocks behind the caller; tail blocks wait until their conversation is idle.

The tail block of a conversation is partial, and the next turn replaces it by a longer one. If every turn wrote it, a
chat of many short turns would write several times the bytes that it keeps. So a *tail* waits, and is never written if
another tail replaces it meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvtier.transfer.writer import Writer

LONGEST_RESTS = 6
"""Longest wait of a tail, in multiples of ``rest_seconds``, while each turn replaces it."""
Task = Callable[[], None]


class WriteBehind:
    """The write queue of one store. Thread-safe.

    Args:
        rest_seconds: how long a conversation is idle before its tail is written; with 0 it is written at once.
        stalled: called when the queue is full and a task is not queued, because the drive does not keep up; also
            ``note_stall``.
        clock: monotonic seconds.
    """

    def __init__(
        self, rest_seconds: float, stalled: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rest_seconds = rest_seconds
        self.note_stall = stalled
        self._clock = clock
        self._since: dict[str, float] = {}  # waiting tails: when the first tail that each replaced came
        self._writer = Writer(clock=clock)

    def begin_anew(self) -> None:
        """Start with an empty queue in a forked child; the parent does its own work."""
        self._since, self._writer = {}, Writer(clock=self._clock)

    def submit(self, task: Task, nbytes: int = 0) -> bool:
        """Queue ``task``, which writes ``nbytes``.

        Returns False when the queue stays full: the drive hangs, or is much too slow.
        """
        queued = self._writer.submit(task, nbytes)
        if not queued:
            self.note_stall()
        return queued

    def submit_at_rest(self, key: str, task: Task, since: float | None, nbytes: int = 0) -> bool:
        """Queue ``task``, which writes the tail ``key``, to run when its conversation is idle.

        Args:
            key: the tail's key.
            task: writes the tail.
            since: result of ``take_back`` for the tail that this one replaces; None if none waited.
            nbytes: what it writes.

        Returns:
            Whether it is queued.
        """
        if not self._rest_seconds:
            return self.submit(task, nbytes)
        now = self._clock()
        began = now if since is None else since
        self._since[key] = began

        def write() -> None:
            self._since.pop(key, None)
            task()

        left = began + LONGEST_RESTS * self._rest_seconds - now
        self._writer.postpone(key, max(0.0, min(self._rest_seconds, left)), write, nbytes)
        return True

    def take_back(self, key: str) -> float | None:
        """Cancel the write of tail ``key``; return when it, or the first tail that it replaced, began to wait.

        None when it does not wait.
        """
        return self._since.pop(key, None) if self._writer.drop(key) else None

    def waits(self, key: str) -> bool:
        """Whether tail ``key`` waits to be written."""
        return key in self._since

    @property
    def queued(self) -> int:
        """Number of tasks that wait or run."""
        return self._writer.queued

    def hurry(self) -> None:
        """Run waiting tasks soon."""
        self._writer.hurry()

    @property
    def queued_bytes(self) -> int:
        """Bytes of K and V that wait to be written, or are being written."""
        return self._writer.queued_bytes

    def flush(self, tell: Callable[[int, int], None] | None = None) -> None:
        """Run all queued tasks, tails included, and wait for them.

        ``tell`` gets the bytes that were written so far, and those and the queued ones together.
        """
        self._writer.flush(tell)

    def close(self) -> None:
        """Run all queued tasks, and end the thread."""
        self._writer.close()
