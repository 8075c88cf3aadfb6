"""Every transfer engine passes the EngineChecks of kvtier.testing."""

import random

import pytest
import torch

from kvtier.testing import EngineChecks, Recorder, SimulatedEngine
from kvtier.transfer.accelerator import StreamEngine, engine_for
from kvtier.transfer.base import InlineEngine
from kvtier.transfer.cpu import ThreadEngine


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
    device = torch.get_default_device()

    @pytest.fixture
    def engine(self, machine):
        engine = StreamEngine(self.device)
        yield engine
        engine.close()


def test_a_device_that_cannot_record_streams_is_served_inline(machine, monkeypatch):
    """Without ``record_stream``, freed memory could be reused while a side stream still copies."""

    def missing(tensor, stream):
        raise NotImplementedError("record_stream")

    monkeypatch.setattr(torch.Tensor, "record_stream", missing)
    assert isinstance(engine_for(torch.get_default_device()), InlineEngine)


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
