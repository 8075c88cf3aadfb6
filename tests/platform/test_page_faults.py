"""Providing memory before it is written: nothing in it changes, and a system that cannot is asked once."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest

from kvtier.kv.page import PageView
from kvtier.platform import page_faults
from kvtier.platform.page_faults import provide

PAGES = 64
needs_advice = pytest.mark.skipif(page_faults._madvise() is None, reason="this system does not provide memory ahead")


@pytest.fixture
def fresh():
    """Return memory that was never written: uint8 ``[bytes]``."""
    return np.frombuffer(mmap.mmap(-1, PAGES * mmap.PAGESIZE), dtype=np.uint8)


def faults():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@needs_advice
def test_provided_memory_is_written_without_faults(fresh):
    before = faults()
    fresh[:: mmap.PAGESIZE] = 1
    by_page = faults() - before
    provided = np.frombuffer(mmap.mmap(-1, PAGES * mmap.PAGESIZE), dtype=np.uint8)
    assert provide(provided.ctypes.data, provided.nbytes)
    before = faults()
    provided[:: mmap.PAGESIZE] = 1
    assert faults() - before < by_page


@needs_advice
def test_contents_stay_and_pages_at_the_ends_are_left_alone(fresh, monkeypatch):
    fresh[:] = np.arange(len(fresh)) % 251
    asked = []
    monkeypatch.setattr(page_faults, "_madvise", lambda: lambda *call: asked.append(call) or 0)
    assert provide(fresh.ctypes.data + 5, fresh.nbytes - 10)
    ((begin, size, _),) = asked
    assert (begin, size) == (fresh.ctypes.data + mmap.PAGESIZE, (PAGES - 2) * mmap.PAGESIZE)
    monkeypatch.undo()
    assert provide(fresh.ctypes.data, fresh.nbytes)
    assert np.array_equal(fresh, np.arange(len(fresh)) % 251)


def test_little_memory_and_memory_that_cannot_be_had_are_left_to_the_first_write(fresh, monkeypatch):
    assert not provide(fresh.ctypes.data, mmap.PAGESIZE)
    monkeypatch.setattr(page_faults, "_madvise", lambda: lambda *call: -1)
    assert not provide(fresh.ctypes.data, fresh.nbytes)


@pytest.mark.parametrize("lacks", ["another system", "no such call", "no such advice"])
def test_system_without_the_call_is_never_asked(fresh, monkeypatch, lacks):
    asked = []

    class Library:
        def __init__(self, name):
            if lacks == "no such advice":
                self.madvise = lambda *call: asked.append(call) or -1

    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(sys, "platform", "darwin" if lacks == "another system" else "linux")
    page_faults._madvise.cache_clear()
    try:
        for _ in range(3):
            assert not provide(fresh.ctypes.data, fresh.nbytes)
    finally:
        page_faults._madvise.cache_clear()
    assert len(asked) == (lacks == "no such advice")


def test_view_provides_the_tokens_of_each_head_alone(monkeypatch):
    """Memory beyond them is only reserved, and must stay so."""
    k, v = np.empty((2, 4096, 128), dtype=np.uint8), np.empty((1, 4096, 64), dtype=np.uint8)
    asked = []
    monkeypatch.setattr("kvtier.kv.page.provide", lambda *memory: asked.append(memory))
    PageView(k, v).cut(1000, 3000).provide()
    heads = [(k, 0), (k, 1), (v, 0)]
    assert asked == [(part[head, 1000:].ctypes.data, 2000 * part.shape[2]) for part, head in heads]
