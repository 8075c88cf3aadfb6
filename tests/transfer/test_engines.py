"""Every transfer engine passes the EngineChecks of kvtier.testing."""

import random

import pytest

from kvtier.testing import EngineChecks, Recorder, SimulatedEngine
from kvtier.transfer import InlineEngine, ThreadEngine


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
