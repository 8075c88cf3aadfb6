"""Streams and events of the test device: queues that run in any order that the events allow."""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence

import torch

from kvtier.testing.simulation.accesses import Past
from kvtier.testing.simulation.races import Detector

Task = Callable[[], None]


class Point:
    """A point in the queue of a stream. ``past`` is the work known to end before it."""

    def __init__(self, queue: Queue, past: Past, judged_by: Detector) -> None:
        self.queue = queue
        self.past = past
        self.judged_by = judged_by
        self.passed = False


class Queue:
    """Work of one stream, in order: tasks, points to wait for, and points to pass.

    Attributes:
        number: of the stream; 0 is the default stream.
        computes: whether kernels run on it.
        past: the copies that its next work comes after, as far as no kernels run on it.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.computes = number == 0
        self.past = Past()
        self.work: deque[Task | tuple[str, Point]] = deque()


class Scheduler:
    """Decides when queued work runs. Kernels run when they are launched, after all that their stream waits for.

    Work of a stream runs when something waits for it, or at random before. An unordered copy reads and writes what it
    finds then. Kernels are never late: the detector judges copies that are not ordered after them.

    Args:
        choices: decides what runs early.
        lazy: run nothing early.

    Attributes:
        lock: held by whatever runs on the device.
        host_waits: how often a thread has waited for a point, by its name.
        detector: judges the order of copies and kernels.
    """

    def __init__(self, choices: random.Random, *, lazy: bool) -> None:
        self.lock = threading.RLock()
        self.host_waits: Counter[str] = Counter()
        self._numbers = 0
        self._queues: dict[int, Queue] = {}
        self._current = threading.local()
        self.restart(choices, lazy=lazy)

    def restart(self, choices: random.Random, *, lazy: bool) -> None:
        """Run all work, and begin with a new detector."""
        with self.lock:
            if self._queues:
                self.synchronize()
            self._choices, self._lazy = choices, lazy
            self.detector = Detector()
            for queue in self._queues.values():
                queue.past = Past()

    # The streams of a thread

    def new_number(self) -> int:
        """Return the number of a new stream."""
        with self.lock:
            self._numbers += 1
            return self._numbers

    @property
    def current(self) -> int:
        """Number of the current stream of this thread."""
        return getattr(self._current, "number", 0)

    @current.setter
    def current(self, number: int) -> None:
        self._current.number = number

    def queue(self, number: int) -> Queue:
        """Return the queue of a stream."""
        if number not in self._queues:
            self._queues[number] = Queue(number)
        return self._queues[number]

    # Work

    def launch(self, name: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        """Let a kernel run now, on the current stream: run what the stream waits for, and judge the kernel."""
        queue = self.queue(self.current)
        if not queue.computes:
            queue.computes = True
            self.detector.waited(queue.past)
        if queue.work:
            self._drain(queue)
        self.detector.kernel(name, reads, writes)

    def copy(self, name: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor], task: Task) -> None:
        """Queue a copy on the current stream. ``reads`` and ``writes`` are its memory on the device."""
        queue = self.queue(self.current)
        if queue.computes:
            self.detector.waited(self.detector.enqueue(name, [self.detector.mark()], reads, writes))
        else:
            queue.past = self.detector.enqueue(name, [queue.past], reads, writes)
        queue.work.append(task)
        self._run_some()

    def record(self, number: int) -> Point:
        """Queue a point."""
        with self.lock:
            queue = self.queue(number)
            past = self.detector.mark() if queue.computes else queue.past
            point = Point(queue, past, self.detector)
            if queue.work:
                queue.work.append(("pass", point))
            else:
                point.passed = True
            self._run_some()
            return point

    def wait(self, number: int, point: Point) -> None:
        """Let the work that is queued on a stream from now on run after ``point``."""
        with self.lock:
            queue = self.queue(number)
            if queue.computes:
                self.detector.waited(self._past(point))
            else:
                queue.past = queue.past.joined((self._past(point),))
            queue.work.append(("wait", point))
            self._run_some()

    def has_passed(self, point: Point) -> bool:
        """Whether a point was passed. If it was, all that is queued later comes after it."""
        with self.lock:
            if point.passed:
                self.detector.settled(self._past(point))
            return point.passed

    def settle(self, point: Point) -> None:
        """Block the host until ``point`` is passed."""
        with self.lock:
            self.host_waits[threading.current_thread().name] += 1
            self._finish(point)
            self.detector.settled(self._past(point))

    def synchronize(self, number: int | None = None) -> None:
        """Block the host until all work of a stream, or of all streams, has run."""
        with self.lock:
            for each in [number] if number is not None else list(self._queues):
                self.settle(self.record(each))

    def _past(self, point: Point) -> Past:
        return point.past if point.judged_by is self.detector else Past()

    def _run_some(self) -> None:
        if self._lazy:
            return
        while self._choices.randrange(2):
            ready = [queue for queue in self._queues.values() if queue.work and self._is_ready(queue)]
            if not ready:
                return
            self._step(self._choices.choice(ready))

    def _is_ready(self, queue: Queue) -> bool:
        first = queue.work[0]
        return not isinstance(first, tuple) or first[0] == "pass" or first[1].passed

    def _step(self, queue: Queue) -> None:
        """Run the first work of ``queue``, and what it waits for."""
        first = queue.work[0]
        if not isinstance(first, tuple):
            queue.work.popleft()
            first()
            return
        kind, point = first
        if kind == "wait":
            self._finish(point)
        else:
            point.passed = True
        queue.work.popleft()

    def _finish(self, point: Point) -> None:
        while not point.passed:
            self._step(point.queue)

    def _drain(self, queue: Queue) -> None:
        while queue.work:
            self._step(queue)
