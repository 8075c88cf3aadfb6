"""Streams of a device that is the CPU: they keep no queue, and notice the misuse that real streams suffer silently."""

from __future__ import annotations

import itertools
import threading

import torch


class FakeEvent:
    """An event that has passed."""

    def synchronize(self):
        """Do nothing."""


class FakeStream:
    """Has the interface of ``torch.Stream`` as far as ``StreamEngine`` uses it.

    An object can be entered once only: a real one would mix up the current streams of the threads that enter it.
    """

    numbers = itertools.count(1)
    current = threading.local()

    def __init__(self, device=None, *, stream_id=None, device_index=0, device_type=1):
        self.stream_id = next(self.numbers) if stream_id is None else stream_id
        self.device_index, self.device_type = device_index, device_type
        self._before = None

    def __enter__(self):
        if self._before is not None:
            raise RuntimeError("this object was entered before")
        self._before = current_stream()
        self.current.stream = self
        return self

    def __exit__(self, *_):
        self.current.stream = self._before

    def record_event(self):
        """Return an event that has passed."""
        return FakeEvent()

    def wait_event(self, event):
        """Do nothing: nothing is queued."""

    def synchronize(self):
        """Do nothing: nothing is queued."""


def current_stream(device=None):
    """Return the current stream of this thread."""
    if not hasattr(FakeStream.current, "stream"):
        FakeStream.current.stream = FakeStream(stream_id=0)
    return FakeStream.current.stream


def install(monkeypatch):
    """Give the CPU streams for the rest of a test; return the list of streams that memory was recorded with."""
    recorded = []
    monkeypatch.setattr(torch, "Stream", FakeStream)
    monkeypatch.setattr(torch.accelerator, "current_stream", current_stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(stream.stream_id))
    return recorded
