"""Writing behind the caller: what goes to disk at once, and what waits until its conversation rests.

The last block of a conversation is not full, and the next turn replaces it by a longer one. Written each time, a chat
of many short turns would write several times what it keeps. So such a *tail* waits, and is not written at all if
another one takes its place meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvtier.transfer import Writer

LONGEST_RESTS = 6
"""A tail waits this many times as long as a conversation must rest, at most, while one takes the place of another."""
Task = Callable[[], None]


class WriteBehind:
    """The queue of one store. Thread-safe.

    Args:
        rest_seconds: how long a conversation rests before its tail is written; with 0 it is written at once.
        stalled: called when there is no room in the queue, and what was to be queued is not.
        clock: seconds that never go back.
    """

    def __init__(
        self, rest_seconds: float, stalled: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rest_seconds = rest_seconds
        self._stalled = stalled
        self._clock = clock
        self._since: dict[str, float] = {}  # of tails that wait: when the first of those that they replaced came
        self._writer = Writer(clock=clock)

    def begin_anew(self) -> None:
        """Forget, in a child that was forked, what its parent does."""
        self._since, self._writer = {}, Writer(clock=self._clock)

    def submit(self, task: Task) -> bool:
        """Queue ``task``. Returns False when the queue stays full: the drive hangs, or is much too slow."""
        queued = self._writer.submit(task)
        if not queued:
            self.note_stall()
        return queued

    def note_stall(self) -> None:
        """Tell that something is not written, since the drive does not keep up."""
        self._stalled()

    def submit_at_rest(self, key: str, task: Task, since: float | None) -> bool:
        """Queue ``task``, which writes the tail ``key``, for when its conversation rests.

        Args:
            key: of the tail.
            task: what is to be done.
            since: what ``take_back`` returned of the tail that this one replaces; None if none waited.

        Returns:
            Whether it is queued.
        """
        if not self._rest_seconds:
            return self.submit(task)
        now = self._clock()
        began = now if since is None else since
        self._since[key] = began

        def write() -> None:
            self._since.pop(key, None)
            task()

        left = began + LONGEST_RESTS * self._rest_seconds - now
        self._writer.postpone(key, max(0.0, min(self._rest_seconds, left)), write)
        return True

    def take_back(self, key: str) -> float | None:
        """Do not write tail ``key``; return since when it, or one that it replaced, has waited. None: it does not."""
        return self._since.pop(key, None) if self._writer.drop(key) else None

    def waits(self, key: str) -> bool:
        """Whether tail ``key`` waits to be written."""
        return key in self._since

    @property
    def queued(self) -> int:
        """How many tasks wait to be done, or are being done."""
        return self._writer.queued

    def hurry(self) -> None:
        """Write soon what waits."""
        self._writer.hurry()

    def flush(self) -> None:
        """Do everything queued so far, tails included, and wait for it."""
        self._writer.flush()

    def close(self) -> None:
        """Do everything that is queued, and end the thread."""
        self._writer.close()
