"""Writer and reader threads: task order, queue limits, errors and shutdown."""

import contextlib
import itertools
import threading
from concurrent.futures import CancelledError

import pytest

from kvtier.transfer.threads import Readers
from kvtier.transfer.writer import Writer
from tests.support.interrupts import InterruptAtLine


@pytest.fixture
def writer():
    writer = Writer(depth=2)
    yield writer
    writer.close()


def test_the_writer_runs_tasks_in_order_and_flush_waits_for_them(writer):
    done = []
    for i in range(20):
        writer.submit(lambda i=i: done.append(i))
    writer.flush()
    assert done == list(range(20))


def test_the_writer_blocks_the_caller_when_its_queue_is_full(writer):
    gate, running, submitted = threading.Event(), threading.Event(), []

    def task():
        running.set()
        gate.wait()

    def submit():
        for i in range(5):
            writer.submit(gate.wait)
            submitted.append(i)

    writer.submit(task)
    assert running.wait(30)
    caller = threading.Thread(target=submit)
    caller.start()
    caller.join(timeout=0.2)
    assert caller.is_alive()
    assert len(submitted) == 2
    gate.set()
    caller.join(timeout=30)
    writer.flush()
    assert len(submitted) == 5


def test_closing_the_writer_drains_it_and_ends_its_thread():
    writer, done = Writer(), []
    before = threading.active_count()
    for i in range(10):
        writer.submit(lambda i=i: done.append(i))
    assert threading.active_count() == before + 1
    writer.close()
    assert done == list(range(10))
    assert threading.active_count() == before


def test_writer_works_after_an_interrupt_anywhere_in_its_first_submit():
    for at in itertools.count():
        writer, interrupt, ran = Writer(), InterruptAtLine(at, {Writer.submit.__code__.co_filename}), threading.Event()
        with contextlib.suppress(KeyboardInterrupt), interrupt:
            writer.submit(lambda: None)
        writer.submit(ran.set)
        assert ran.wait(30)
        writer.close()
        if not interrupt.came:
            break
    assert at > 3


def test_writer_without_tasks_starts_no_thread():
    before = threading.active_count()
    writer = Writer()
    writer.flush()
    writer.close()
    writer.close()
    assert threading.active_count() == before


def test_readers_return_results_and_errors():
    readers = Readers()
    assert [readers.submit(lambda i=i: i * i).result() for i in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        readers.submit(lambda: 1 // 0).result()
    readers.close()


def test_closing_readers_cancels_queued_tasks_and_joins_the_threads():
    before = threading.active_count()
    readers = Readers(threads=1)
    gate, running = threading.Event(), threading.Event()

    def task():
        running.set()
        return gate.wait(30)

    first = readers.submit(task)
    assert running.wait(30)
    second = readers.submit(lambda: "never")
    dropped = threading.Event()
    second.add_done_callback(lambda _: dropped.set())
    closing = threading.Thread(target=readers.close)
    closing.start()
    assert dropped.wait(30)
    gate.set()
    closing.join(timeout=30)
    assert first.result() is True
    assert second.cancelled()
    assert threading.active_count() == before
    readers.close()


# --- no threads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_threads(monkeypatch):
    """A process that cannot start a thread until ``undo`` is called."""

    def start(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        yield patched


def test_readers_run_tasks_in_the_caller_when_no_thread_can_start(no_threads):
    readers, done = Readers(), []
    assert readers.submit(lambda: done.append(1) or 7).result(timeout=5) == 7
    with pytest.raises(ZeroDivisionError):
        readers.submit(lambda: 1 // 0).result(timeout=5)
    no_threads.undo()
    assert readers.submit(lambda: done.append(2) or 8).result(timeout=5) == 8
    readers.close()
    assert done == [1, 2], "each task runs once, though the pool may come to it later"


def test_writer_runs_tasks_in_the_caller_when_no_thread_can_start(no_threads):
    writer, done = Writer(), []
    writer.submit(lambda: done.append(1))
    writer.submit(lambda: 1 // 0)
    writer.flush()
    assert done == [1]
    no_threads.undo()
    writer.submit(lambda: done.append(2))
    writer.flush()
    writer.close()
    assert done == [1, 2]


def test_queued_task_of_a_closed_pool_raises_cancelled_error():
    readers, go = Readers(threads=1), threading.Event()
    running, waiting = readers.submit(go.wait), readers.submit(lambda: 1)
    closing = threading.Thread(target=readers.close)
    closing.start()
    with pytest.raises(CancelledError):
        waiting.result(timeout=5)
    go.set()
    closing.join()
    assert running.result(timeout=5)


# --- bounded waits and postponed tasks --------------------------------------------------------------------------------


def test_full_queue_blocks_a_caller_briefly_and_then_rejects_at_once():
    writer, gate, running = Writer(depth=1, wait_seconds=0.05), threading.Event(), threading.Event()
    writer.submit(lambda: running.set() or gate.wait())
    assert running.wait(30)
    assert writer.submit(lambda: None)
    assert not writer.submit(lambda: None)
    writer._wait_seconds = 1000.0
    assert not writer.submit(lambda: None), "nothing has ended since: it would wait in vain, too"
    gate.set()
    writer.flush()
    assert writer.submit(lambda: None)
    writer.close()


def test_postponed_task_runs_when_its_time_comes():
    now, done, other = [0.0], threading.Event(), threading.Event()
    writer = Writer(clock=lambda: now[0])
    writer.postpone("a", 5.0, done.set)
    writer.submit(other.set)
    assert other.wait(30)
    assert not done.is_set()
    assert writer.queued == 1
    now[0] = 5.0
    writer.submit(lambda: None)
    assert done.wait(30)
    writer.close()


def test_postponed_task_runs_without_any_other_task():
    done, writer = threading.Event(), Writer()
    writer.postpone("a", 0.01, done.set)
    assert done.wait(30)
    writer.close()


def test_dropped_postponed_task_never_runs(writer):
    done = []
    writer.postpone("a", 1000.0, lambda: done.append("a"))
    writer.postpone("b", 1000.0, lambda: done.append("b"))
    assert writer.drop("a")
    assert not writer.drop("a")
    writer.flush()
    assert done == ["b"]
    assert writer.queued == 0


def test_postponed_task_runs_at_flush_when_no_thread_can_start(no_threads):
    writer, done = Writer(), []
    writer.postpone("a", 0.0, lambda: done.append(1))
    assert done == []
    writer.flush()
    assert done == [1]


def test_closed_writer_can_be_used_again():
    writer, done = Writer(), []
    writer.close()
    for _ in range(2):
        writer.submit(lambda: done.append(1))
        writer.close()
    assert done == [1, 1]


def test_flush_tells_the_bytes_that_were_written_and_are_queued():
    writer, told = Writer(), []
    for nbytes in (10, 20, 30, 500):
        writer.postpone(str(nbytes), 1000.0, lambda: None, nbytes)
    assert writer.drop("500")
    assert writer.queued_bytes == 60
    writer.flush(lambda done, total: told.append((done, total)))
    assert told[-1] == (60, 60)
    assert told == sorted(told)
    assert {total for _, total in told} == {60}
    assert writer.queued_bytes == 0
    writer.flush(lambda done, total: told.append((done, total)))
    assert told[-1] == (0, 0)
    writer.close()
