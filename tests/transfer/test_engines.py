"""Every transfer engine passes the EngineChecks of kvtier.testing."""

import random

import pytest
import torch

from kvtier.testing import EngineChecks, Recorder, SimulatedEngine
from kvtier.transfer import InlineEngine, StreamEngine, ThreadEngine, engine_for
from tests.support import fake_streams


class TestInlineEngine(EngineChecks):
    @pytest.fixture
    def engine(self):
        return InlineEngine()


class TestThreadEngine(EngineChecks):
    @pytest.fixture(params=[1, 4])
    def engine(self, request):
        engine = ThreadEngine(request.param)
        yield engine
        engine.close()


class TestStreamEngine(EngineChecks):
    @pytest.fixture
    def engine(self, monkeypatch):
        fake_streams.install(monkeypatch)
        engine = StreamEngine(torch.device("cpu"))
        yield engine
        engine.close()


def test_threads_enter_a_side_stream_by_objects_of_their_own(monkeypatch):
    """One object that two threads have entered leaves one of them on the stream of the other."""
    recorded = fake_streams.install(monkeypatch)
    engine = StreamEngine(torch.device("cpu"))
    mine, source = fake_streams.current_stream(), torch.arange(4.0)
    targets = [torch.zeros(4) for _ in range(8)]
    slow = engine.call(lambda: None)
    fences = [engine.copy(target, source, after=[slow] if i % 2 else []) for i, target in enumerate(targets)]
    for fence in fences:
        engine.settle(fence)
    assert all(torch.equal(target, source) for target in targets)
    assert fake_streams.current_stream() is mine
    assert len(set(recorded[2:])) == 1, "all copies to the device were on one stream"
    engine.close()


def test_a_device_that_cannot_record_streams_is_served_inline(monkeypatch):
    """Without ``record_stream``, freed memory could be reused while a side stream still copies."""
    fake_streams.install(monkeypatch)

    def missing(tensor, stream):
        raise NotImplementedError("record_stream")

    monkeypatch.setattr(torch.Tensor, "record_stream", missing)
    assert isinstance(engine_for(torch.device("meta")), InlineEngine)


class TestSimulatedEngine(EngineChecks):
    @pytest.fixture(params=range(20), ids=lambda seed: f"seed{seed}")
    def engine(self, request):
        engine = SimulatedEngine(random.Random(request.param))
        with engine.watching():
            yield engine
        engine.close()


class TestLazyEngine(EngineChecks):
    @pytest.fixture
    def engine(self):
        engine = SimulatedEngine(lazy=True)
        with engine.watching():
            yield engine
        engine.close()


class TestRecorder(EngineChecks):
    @pytest.fixture
    def engine(self):
        return Recorder(SimulatedEngine(lazy=True))
