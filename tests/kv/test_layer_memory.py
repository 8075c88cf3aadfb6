"""The LayerMemoryChecks of kvtier.testing, run on a buffer, a hot layer under a budget and a cold layer in files."""

from __future__ import annotations

import random

import pytest
import torch

from kvtier.kv.buffer import KVBuffer
from kvtier.kv.codecs import ExponentZstd
from kvtier.offload.manager import OffloadManager
from kvtier.testing import LayerMemoryChecks, SimulatedEngine
from kvtier.transfer.base import InlineEngine
from kvtier.transfer.cpu import ThreadEngine


class TestBuffer(LayerMemoryChecks):
    @pytest.fixture
    def make(self):
        return lambda k, v: KVBuffer.like(k, v)


ENGINES = {
    "inline": lambda device: InlineEngine(),
    "threads": lambda device: ThreadEngine(),
    "simulated": lambda device: SimulatedEngine(random.Random(4), lazy=True),
}


@pytest.mark.parametrize("engine", ENGINES)
class TestOffloadedLayer(LayerMemoryChecks):
    @pytest.fixture(params=["hot", "cold", "cold, encoded"])
    def make(self, request, tmp_path, engine):
        codec = ExponentZstd() if "encoded" in request.param else None
        offload = OffloadManager(2**20, 2**20, tmp_path, 4, lambda: 1, ENGINES[engine], codec)

        def made(k, v):
            layer = offload.layer(0, k, v, None, may_be_cold=True)
            if request.param != "hot":
                layer.turn_cold()
            return layer

        yield made
        offload.close()


def test_layer_turned_cold_is_cold_and_pages_appended_tokens(tmp_path):
    offload = OffloadManager(2**20, 2**20, tmp_path, 4, lambda: 1, lambda device: InlineEngine())
    k = torch.ones(1, 1, 8, 2)
    layer = offload.layer(0, k, k, None, may_be_cold=True)
    layer.turn_cold()
    layer.append(0, k, k, 0)
    assert layer.is_cold
    assert layer.paged == 8
    offload.close()
