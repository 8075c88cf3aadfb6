"""Sums of blocks of weights: equal whatever number of threads read them, and no thread outlives the reading."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from kvtier.hf.identity.weights import block_sums
from kvtier.hf.identity.weights.block_sums import BLOCK_BYTES, FACTORS, all_block_sums

SEVERAL = [np.random.default_rng(n).integers(0, 255, n * BLOCK_BYTES, dtype=np.uint8) for n in (0, 1, 3, 64, 129)]
EXPECTED = [np.einsum("bw,w->b", data.view(np.int64).reshape(-1, 256), FACTORS) for data in SEVERAL]
HELPERS = 3


@pytest.fixture
def first_piece(monkeypatch):
    """Let four threads read, which all wait for each other at their first piece; return a list of calls made then."""
    monkeypatch.setattr(block_sums, "_helpers", lambda total_bytes: HELPERS)
    monkeypatch.setattr(block_sums, "_PIECE_BYTES", 2 * BLOCK_BYTES)
    barrier, begun, calls = threading.Barrier(HELPERS + 1), set(), []
    sums = block_sums.block_sums

    def watched(data):
        if threading.current_thread() not in begun:
            begun.add(threading.current_thread())
            barrier.wait(10)
            for call in calls:
                call()
        return sums(data)

    monkeypatch.setattr(block_sums, "block_sums", watched)
    return calls


def running():
    return [thread for thread in threading.enumerate() if thread.name == "kvtier-digest"]


def found_expected(found):
    return all(map(np.array_equal, found, EXPECTED)) and len(found) == len(EXPECTED)


def test_several_threads_find_the_same_sums(first_piece):
    assert found_expected(all_block_sums(SEVERAL))
    assert not running()


def test_caller_reads_alone_when_no_thread_can_be_started(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(block_sums, "_helpers", lambda total_bytes: HELPERS)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert found_expected(all_block_sums(SEVERAL))


def test_error_of_a_helper_reaches_the_caller(first_piece):
    """A piece that was not read must never count as read: its sums would be whatever the memory held."""

    def fail():
        if threading.current_thread().name == "kvtier-digest":
            raise MemoryError("no memory")

    first_piece.append(fail)
    with pytest.raises(MemoryError, match="no memory"):
        all_block_sums(SEVERAL)
    assert not running()


def test_interrupt_of_the_caller_ends_the_helpers(first_piece, monkeypatch):
    """A model may be large, and the caller waits for them."""
    read, sums = [], block_sums.block_sums

    def interrupt():
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        time.sleep(0.2)  # they are in the middle of their first pieces when the caller is interrupted

    first_piece.append(interrupt)
    monkeypatch.setattr(block_sums, "block_sums", lambda data: read.append(data) or sums(data))
    with pytest.raises(KeyboardInterrupt):
        all_block_sums(SEVERAL)
    assert not running()
    assert len(read) == HELPERS + 1


def test_small_models_are_read_without_threads():
    assert block_sums._helpers(1024) == 0
    assert block_sums._helpers(2**40) <= block_sums._MOST_THREADS - 1
