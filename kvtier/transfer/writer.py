"""Writer: one thread that writes behind the caller."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable

_log = logging.getLogger("kvtier.transfer")
LONGEST_WAIT_SECONDS = 2.0
"""The longest time that a caller waits for room in the queue."""
Task = Callable[[], None]


class Writer:
    """One thread that runs queued tasks in order, and postponed tasks when due. At most ``depth`` tasks are queued.

    If no thread can be started, the caller runs them. A task should handle its own errors; if it raises, the error is
    logged and the next task runs.

    Args:
        depth: how many tasks may be queued before callers wait for room.
        wait_seconds: how long a caller waits for room.
        clock: seconds that never go back, for ``postpone``.
    """

    def __init__(
        self,
        depth: int = 64,
        wait_seconds: float = LONGEST_WAIT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._depth = depth
        self._wait_seconds = wait_seconds
        self._clock = clock
        self._tasks: deque[Task] = deque()
        self._later: dict[str, tuple[float, Task]] = {}  # due time and task
        self._is_running = False
        self._is_stalled = False  # a caller has waited for room without success since the last task ended
        self._is_closing = False
        self._thread: threading.Thread | None = None
        # Entered rather than the condition: only a lock itself is taken and released without a step between.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._pid = os.getpid()

    def submit(self, task: Task) -> bool:
        """Queue ``task``, waiting up to ``wait_seconds`` for room; return whether it is queued, or done."""
        with self._lock:
            if self._has_thread():
                if not self._wait_for_room():
                    return False
                self._tasks.append(task)
                self._changed.notify_all()
                return True
        self._do(task)
        return True

    def _wait_for_room(self) -> bool:
        """Wait until the queue has room; return whether it has. Only the first of several callers waits."""
        give_up_at = time.monotonic() + self._wait_seconds
        while len(self._tasks) >= self._depth:
            left = give_up_at - time.monotonic()
            if self._is_stalled or left <= 0:
                self._is_stalled = True
                return False
            self._changed.wait(left)
        return True

    def postpone(self, key: str, seconds: float, task: Task) -> None:
        """Run ``task`` in ``seconds``, or sooner if ``hurry`` or ``flush`` is called; ``drop`` cancels it."""
        with self._lock:
            self._later[key] = (self._clock() + seconds, task)
            if self._has_thread():
                self._changed.notify_all()

    def drop(self, key: str) -> bool:
        """Cancel the task postponed under ``key``; return whether there was a task that had not begun."""
        with self._lock:
            return self._later.pop(key, None) is not None

    def hurry(self) -> None:
        """Queue all postponed tasks now."""
        with self._lock:
            has_thread = self._has_thread() if self._later else True
            tasks = [task for _, task in self._later.values()]
            self._later.clear()
            if has_thread:
                self._tasks.extend(tasks)
                self._changed.notify_all()
                return
        for task in tasks:
            self._do(task)

    def _has_thread(self) -> bool:
        """Start the thread unless it runs; return whether it runs."""
        if self._pid != os.getpid():  # the parent's queue and thread are not ours after a fork
            self._tasks, self._later, self._thread, self._pid = deque(), {}, None, os.getpid()
            self._is_running = self._is_stalled = False
        if self._thread is None or not self._thread.is_alive():  # it was closed, or an interrupt came before its start
            self._is_closing = False
            self._thread = threading.Thread(target=self._run, name="kvtier-write", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # no thread can be started: nothing is queued, the caller runs tasks
                self._thread = None
        return self._thread is not None

    def _run(self) -> None:
        while (task := self._next()) is not None:
            try:
                self._do(task)
            finally:
                with self._lock:
                    self._is_running = self._is_stalled = False
                    self._changed.notify_all()

    def _next(self) -> Task | None:
        """Return the next task, when it is due; None when the writer is closed and no task is left."""
        with self._lock:
            while True:
                if self._tasks:
                    self._is_running = True
                    return self._tasks.popleft()
                key, (due, task) = min(self._later.items(), key=lambda item: item[1][0], default=("", (None, None)))
                if due is None or task is None:
                    if self._is_closing:
                        return None
                    self._changed.wait()
                elif due <= self._clock():
                    del self._later[key]
                    self._is_running = True
                    return task
                else:
                    self._changed.wait(due - self._clock())

    @staticmethod
    def _do(task: Task) -> None:
        try:
            task()
        except Exception:
            _log.exception("a task behind generate() failed; what it was to write is not kept")

    @property
    def queued(self) -> int:
        """Number of tasks that are waiting or running, postponed tasks included."""
        if self._pid != os.getpid():
            return 0
        with self._lock:
            return len(self._tasks) + len(self._later) + self._is_running

    def flush(self) -> None:
        """Wait until every task queued or postponed so far has run."""
        if self._pid != os.getpid():
            return
        self.hurry()
        with self._lock:
            while self._thread is not None and (self._tasks or self._is_running):
                self._changed.wait()

    def close(self) -> None:
        """Run all queued and postponed tasks, then end the thread."""
        if self._pid != os.getpid():
            return
        self.hurry()
        with self._lock:
            thread, self._thread = self._thread, None
            self._is_closing = True
            self._changed.notify_all()
        if thread is not None:
            thread.join()
