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
_Sized = tuple[Task, int]  # a task, and the bytes that it writes


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
        self._tasks: deque[_Sized] = deque()
        self._later: dict[str, tuple[float, _Sized]] = {}  # due time and task
        self._running_bytes = 0
        self._done_bytes = 0  # of all tasks that have run
        self._is_running = False
        self._is_stalled = False  # a caller has waited for room without success since the last task ended
        self._is_closing = False
        self._thread: threading.Thread | None = None
        # Entered rather than the condition: only a lock itself is taken and released without a step between.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._pid = os.getpid()

    def submit(self, task: Task, nbytes: int = 0) -> bool:
        """Queue ``task``, waiting up to ``wait_seconds`` for room; return whether it is queued, or done.

        ``nbytes``: what it writes, for ``flush``.
        """
        with self._lock:
            if self._has_thread():
                if not self._wait_for_room():
                    return False
                self._tasks.append((task, nbytes))
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

    def postpone(self, key: str, seconds: float, task: Task, nbytes: int = 0) -> None:
        """Run ``task`` in ``seconds``, or sooner if ``hurry`` or ``flush`` is called; ``drop`` cancels it.

        ``nbytes``: what it writes, for ``flush``.
        """
        with self._lock:
            self._later[key] = (self._clock() + seconds, (task, nbytes))
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
        for task, nbytes in tasks:
            self._do(task)
            self._done_bytes += nbytes

    def _has_thread(self) -> bool:
        """Start the thread unless it runs; return whether it runs."""
        if self._pid != os.getpid():  # the parent's queue and thread are not ours after a fork
            self._tasks, self._later, self._thread, self._pid = deque(), {}, None, os.getpid()
            self._is_running = self._is_stalled = False
            self._running_bytes = 0
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
                    self._done_bytes += self._running_bytes
                    self._running_bytes = 0
                    self._changed.notify_all()

    def _next(self) -> Task | None:
        """Return the next task, when it is due; None when the writer is closed and no task is left."""
        with self._lock:
            while True:
                if self._tasks:
                    task, self._running_bytes = self._tasks.popleft()
                    self._is_running = True
                    return task
                key, (due, sized) = min(self._later.items(), key=lambda item: item[1][0], default=("", (None, None)))
                if due is None or sized is None:
                    if self._is_closing:
                        return None
                    self._changed.wait()
                elif due <= self._clock():
                    del self._later[key]
                    task, self._running_bytes = sized
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

    @property
    def queued_bytes(self) -> int:
        """Bytes that the tasks write that are waiting or running, postponed tasks included."""
        if self._pid != os.getpid():
            return 0
        with self._lock:
            later = sum(nbytes for _, (_, nbytes) in self._later.values())
            return later + sum(nbytes for _, nbytes in self._tasks) + self._running_bytes

    def flush(self, tell: Callable[[int, int], None] | None = None) -> None:
        """Wait until every task queued or postponed so far has run.

        ``tell`` gets the bytes that were written meanwhile, and those and the bytes that are still queued; no lock is
        held.
        """
        if self._pid != os.getpid():
            return
        with self._lock:
            before = self._done_bytes
        self.hurry()
        is_busy = True
        while is_busy:
            with self._lock:
                is_busy = self._thread is not None and bool(self._tasks or self._is_running)
                if is_busy:
                    self._changed.wait()
                done, left = self._done_bytes - before, self.queued_bytes
            if tell is not None:
                tell(done, done + left)

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
