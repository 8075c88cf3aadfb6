"""Threads that read, and a thread that writes."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Queue
from typing import Any, TypeVar

_log = logging.getLogger("kvtier.transfer")
T = TypeVar("T")


class _Task:
    """What is to be run once, by whoever comes first, and what comes of it."""

    def __init__(self, task: Callable[[], Any]) -> None:
        self.future: Future[Any] = Future()
        self._task = task
        self._claim = threading.Lock()

    def run(self) -> None:
        """Run it, unless somebody has, or nobody wants it any more."""
        if not self._claim.acquire(blocking=False) or not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self._task())
        except BaseException as error:
            self.future.set_exception(error)
            if not isinstance(error, Exception):
                raise

    def dropped(self, queued: Future[None]) -> None:
        """Note that a pool was closed before it came to the task, if so."""
        if queued.cancelled() and self._claim.acquire(blocking=False):
            self.future.cancel()
            self.future.set_running_or_notify_cancel()


class Readers:
    """A few threads that read pages in the order in which they are asked for. Started on first use.

    Where no thread can be started, the caller reads.
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

    def close(self) -> None:
        """Let running tasks end, drop the others, join the threads."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.shutdown(wait=True, cancel_futures=True)


class Writer:
    """One thread that runs tasks in order, behind the caller. At most ``depth`` tasks wait; more block the caller.

    Where no thread can be started, the caller runs them. Whoever queues a task handles its errors inside it; one that
    raises all the same is logged, and the next one runs.
    """

    def __init__(self, depth: int = 64) -> None:
        self._queue: Queue[Callable[[], None] | None] = Queue(maxsize=depth)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def submit(self, task: Callable[[], None]) -> None:
        """Queue ``task``; block while the queue is full."""
        with self._lock:
            if self._pid != os.getpid():  # the parent's queue and thread are not ours after a fork
                self._queue, self._thread, self._pid = Queue(maxsize=self._queue.maxsize), None, os.getpid()
            if self._thread is None or self._thread.ident is None:  # made but never started: an interrupt came between
                self._thread = threading.Thread(target=self._run, name="kvtier-write", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # no thread can be started: nothing is queued, and the caller does it
                    self._thread = None
            has_thread = self._thread is not None
        if has_thread:
            self._queue.put(task)
        else:
            self._do(task)

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            try:
                self._do(task)
            finally:
                self._queue.task_done()
        self._queue.task_done()

    @staticmethod
    def _do(task: Callable[[], None]) -> None:
        try:
            task()
        except Exception:
            _log.exception("a task behind generate() failed; what it was to write is not kept")

    @property
    def queued(self) -> int:
        """How many tasks wait to be run, or run."""
        return self._queue.unfinished_tasks if self._pid == os.getpid() else 0

    def flush(self) -> None:
        """Wait until every task queued so far has run."""
        if self._thread is not None and self._pid == os.getpid():
            self._queue.join()

    def close(self) -> None:
        """Run what is queued, then end the thread."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None and self._pid == os.getpid():
            self._queue.put(None)
            thread.join()
