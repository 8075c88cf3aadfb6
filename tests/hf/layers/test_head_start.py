"""The head start of fast pages: a load on a CPU is waited for where it begins, not inside the first layer."""

from __future__ import annotations

import os

import pytest
import torch

from kvtier.hf.layers.loads.prefix_load import PrefixLoad, RowPlan
from kvtier.kv.spec import KVSpec, LayerSpec

LAYER = LayerSpec(1, 4, 1, 4, torch.float32)


class FakeJob:
    """A load whose head starts are recorded; its pages never land."""

    def __init__(self):
        self.spec = KVSpec((LAYER, LAYER))
        self.nbytes = 640
        self.calls = []

    def start(self, place, patience_seconds):
        self.calls.append("start")

    def give_head_start(self, seconds):
        self.calls.append(seconds)

    def wait(self, layer):
        self.calls.append(f"layer {layer}")


def started(monkeypatch, *, spare_cores=0, device="cpu"):
    monkeypatch.setattr(torch, "get_num_threads", lambda: (os.cpu_count() or 1) - spare_cores)
    load = PrefixLoad(10, 0, [RowPlan(0, 0, 0, 0)], FakeJob(), 0)
    load.device, load.overlap_bytes_per_second = torch.device(device), 64.0
    load.start([None, None], [None, None], 10)
    return load


def test_pages_are_waited_for_before_generate_goes_on_but_no_longer_than_fast_ones_take(monkeypatch):
    load = started(monkeypatch)
    assert load.job.calls == ["start", 10.0]
    assert load.seconds > 0  # it counts as time for pages, as in a layer
    k = torch.ones(1, 1, 1, 4)
    load.take(0, None, k, k, lambda k, v: None)
    assert load.job.calls == ["start", 10.0, "layer 0"]


@pytest.mark.parametrize("how", [{"spare_cores": 1}, {"device": "meta"}])
def test_pages_land_beside_the_computation_where_it_leaves_a_core(monkeypatch, how):
    assert started(monkeypatch, **how).job.calls == ["start"]
