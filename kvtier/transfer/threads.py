"""Readers: threads that read files."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class _Task:
    """A task that runs once, on the first thread that claims it, and its result."""

    def __init__(self, task: Callable[[], Any]) -> None:
        self.future: Future[Any] = Future()
        self._task = task
        self._claim = threading.Lock()

    def run(self) -> None:
        """Run the task, unless it has run or was cancelled."""
        if not self._claim.acquire(blocking=False) or not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self._task())
        except BaseException as error:
            self.future.set_exception(error)
            if not isinstance(error, Exception):
                raise

    def dropped(self, queued: Future[None]) -> None:
        """Cancel the task if the pool was closed before running it."""
        if queued.cancelled() and self._claim.acquire(blocking=False):
            self.future.cancel()
            self.future.set_running_or_notify_cancel()


class Readers:
    """A few threads that read pages in the order of the requests. Started on first use.

    If no thread can be started, the caller reads.
    """

    def __init__(self, threads: int = 2) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """Run ``task`` soon, after those submitted before it have started."""
        wanted = _Task(task)
        with self._lock:
            if self._pool is None or self._pid != os.getpid():  # threads do not survive a fork
                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="kvtier-read")
                self._pid = os.getpid()
            try:
                self._pool.submit(wanted.run).add_done_callback(wanted.dropped)
                return wanted.future
            except RuntimeError:  # no thread can be started; the pool may hold the task for a thread that comes later
                pass
        wanted.run()
        return wanted.future

    def leave_behind(self) -> None:
        """Let running tasks, which may hang, end on their own; later tasks get other threads."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.shutdown(wait=False)

    def close(self) -> None:
        """Let running tasks end, drop the others, join the threads."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.shutdown(wait=True, cancel_futures=True)
