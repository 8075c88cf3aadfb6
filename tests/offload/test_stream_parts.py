"""The parts of offloading: order of cold layers, memory budgets, and reuse of host memory."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import BudgetError, ConfigurationError
from kvtier.kv.spec import LayerSpec
from kvtier.offload.accounting import MemoryBudget, TransferStats, cold_order, round_up, smallest_budget_bytes
from kvtier.offload.extents import HostExtent
from kvtier.offload.host_memory import HostPool, StagingBuffer
from kvtier.offload.manager import OffloadManager
from kvtier.offload.placement import PagePlacement
from kvtier.offload.storage.spill_folder import SpillFolder
from kvtier.platform.memory import free_device_bytes
from kvtier.testing import SimulatedEngine
from kvtier.transfer.accelerator import StreamEngine, engine_for
from kvtier.transfer.base import InlineEngine
from kvtier.transfer.cpu import ThreadEngine


@given(st.integers(1, 200))
def test_cold_order_spreads_any_number_of_first_layers_evenly(layers):
    order = cold_order(layers)
    assert sorted(order) == list(range(layers))
    assert order[0] == layers - 1
    for count in range(2, layers + 1):
        chosen = sorted(order[:count])
        gaps = [b - a for a, b in zip(chosen, [*chosen[1:], chosen[0] + layers], strict=True)]
        assert max(gaps) <= 4 * layers / count, "a long stretch without a cold layer, and a crowd elsewhere"


def test_smallest_budget_is_two_slots_plus_one_page_per_layer():
    assert round_up(1, 8) == round_up(8, 8) == 8
    assert smallest_budget_bytes([10, 30, 20], rows=2, columns=17, page_tokens=8) == 2 * 30 * 2 * 24 + 60 * 2 * 8
    assert smallest_budget_bytes([10], rows=1, columns=8, page_tokens=8, hot_bytes=7) == 7 + 80 + 80


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50)), max_size=30))
def test_memory_budget_tracks_used_and_peak_bytes(steps):
    ledger, held, most = MemoryBudget(60), {}, 0
    for owner, nbytes in steps:
        ledger.set(owner, nbytes)
        held[owner] = nbytes
        most = max(most, sum(held.values()))
        assert ledger.used_bytes == sum(held.values())
        assert ledger.peak_bytes == most
        assert ledger.fits(60 - ledger.used_bytes)
        assert not ledger.fits(61 - ledger.used_bytes)
    ledger.begin_peak()
    assert ledger.peak_bytes == ledger.used_bytes


def test_transfer_stats_report_the_traffic_since_a_copy():
    transfers = TransferStats(bytes_down=5, bytes_up=7, waits=1, wait_seconds=0.5)
    before = transfers.copy()
    transfers.bytes_up += 3
    assert transfers.since(before) == TransferStats(0, 3, 0, 0.0)


def slabs_of(limit, slab_bytes=1024):
    ledger = MemoryBudget(limit)
    return HostPool(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8), ledger, slab_bytes), ledger


def test_host_pool_stays_within_its_budget_and_reuses_slabs():
    host_pool, ledger = slabs_of(2048)
    pieces = [host_pool.take(512) for _ in range(4)]
    assert ledger.used_bytes == 2048
    assert host_pool.take(1) is None
    host_pool.give(pieces[0], ["a"])
    assert host_pool.take(512) is None, "its neighbour lives"
    host_pool.give(pieces[1], ["b"])
    again = host_pool.take(512)
    assert again.after == ("a", "b")
    assert again.memory.data_ptr() == pieces[0].memory.data_ptr()
    assert host_pool.take(512, leave=1) is not None
    assert ledger.peak_bytes == 2048


def test_last_slab_of_a_budget_may_be_smaller():
    host_pool, ledger = slabs_of(1500)
    assert host_pool.take(1024) is not None
    assert host_pool.take(400) is None
    piece = host_pool.take(256)
    assert ledger.used_bytes == 1280
    host_pool.give(piece, ())
    assert host_pool.take(9999) is None
    assert ledger.used_bytes == 1024, "what is empty and too small is given back to the system"


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.integers(2_000, 300_000))
def test_host_pool_counts_what_the_machine_gives(sizes, limit):
    """Allocators of pinned memory round up to powers of two: 333 MiB that are asked for are 512 that are taken."""
    given, ledger = [], MemoryBudget(limit)

    def make(nbytes):
        given.append(next_power_of_two(nbytes))
        return torch.empty(nbytes, dtype=torch.uint8)

    host_pool = HostPool(make, ledger, slab_bytes=4096, taken=next_power_of_two)
    staging = StagingBuffer(host_pool, limit)
    pieces = [host_pool.take(size, leave=staging.reserve_bytes) for size in sizes]
    for _ in range(3):
        staging.next(1, 1, LayerSpec(1, 4, 1, 4, torch.float32))
        staging.used([])
    assert ledger.used_bytes == sum(given) <= limit
    assert all(piece is None or piece.memory.nbytes == size for piece, size in zip(pieces, sizes, strict=True))


def next_power_of_two(nbytes):
    return 1 << (nbytes - 1).bit_length()


def test_host_pool_slabs_grow_with_demand():
    host_pool, ledger = slabs_of(None, 64 * 2**20)
    held = []
    for _ in range(9):
        host_pool.take(2**20)
        held.append(ledger.used_bytes // 2**20)
    assert held == [1, 2, 4, 4, 8, 8, 8, 8, 16]


def test_released_host_extents_return_their_memory():
    host_pool, ledger = slabs_of(1024)
    engine, spec = InlineEngine(), LayerSpec(1, 4, 1, 4, torch.float32)
    k = torch.randn(1, 1, 8, 4)
    for _ in range(5):  # four times as many bytes as fit
        run = HostExtent(engine, host_pool, host_pool.take(256), 1, 8, spec)
        run.fill(k, k, [])
        del run
        gc.collect()
    assert ledger.peak_bytes == 1024


def test_staging_buffer_cycles_through_a_fixed_number_of_pieces():
    host_pool, ledger = slabs_of(6 * 1024)
    staging, spec = StagingBuffer(host_pool, 6 * 1024), LayerSpec(1, 4, 1, 4, torch.float32)
    reserve = staging.reserve_bytes
    for turn in range(9):
        _, after = staging.next(1, 4, spec)
        assert list(after) == ([turn - 3] if turn >= 3 else [])
        staging.used([turn])
    assert ledger.used_bytes == reserve == 3 * 1024
    assert list(staging.chunks(3, 100, 32)) == [(3, 35), (35, 67), (67, 99), (99, 100)]


def test_devices_sharing_a_host_budget_leave_each_other_staging_room(tmp_path):
    host, folder = MemoryBudget(1_000_000), SpillFolder(tmp_path)
    one, two = (PagePlacement(InlineEngine(), host, folder, TransferStats(), 16, devices=2) for _ in range(2))
    k = torch.zeros(1, 2, 16, 8)
    kept = [one.lower(k, k, [])[0] for _ in range(600)]  # continues in files when the host is full
    kept += [two.lower(k, k, [])[0]]
    assert {part.extent.tier for parts in kept for part in parts} == {"host", "disk"}
    assert host.peak_bytes <= 1_000_000
    kept.clear()
    folder.close()


def test_budget_error_counts_only_the_layers_of_its_device(tmp_path):
    """The layers of other devices need no memory of this one."""
    layers, page = 6, 4
    offload = OffloadManager(9 * 2**10, None, tmp_path, page, lambda: layers, lambda device: InlineEngine())
    memories = []
    for index in range(layers):
        k = torch.zeros(1, 1, page, 16, device="cpu" if index < 2 else "meta")
        memories.append(offload.layer(index, k, k, None, may_be_cold=True))
        memories[-1].append(0, k, k, 0)
    more = torch.zeros(1, 1, 1000 - page, 16)
    with pytest.raises(BudgetError) as raised:
        memories[0].append(page, more, more, 0)
    smallest = smallest_budget_bytes([128] * 2, rows=1, columns=1000, page_tokens=page)
    assert f"on cpu, even with every layer cold: the prefetch ring and one page per layer need {smallest} bytes" in str(
        raised.value
    )
    offload.close()


def test_a_failed_copy_that_is_no_longer_needed_frees_its_slot(tmp_path):
    """Whatever it failed with: the budget must not go on counting the slot."""

    def fail(step, ordinal):
        if step == "copy":
            raise RuntimeError("the device failed")

    engine = SimulatedEngine(lazy=True, fail=fail)
    offload = OffloadManager(2**20, 2**20, tmp_path, 4, lambda: 1, lambda device: engine)
    k = torch.zeros(1, 1, 4, 2)
    layer = offload.layer(0, k, k, None, may_be_cold=True)
    layer.turn_cold()
    layer.append(0, k, k, 0)
    ledger = offload.device_memory(torch.device("cpu")).ledger
    layer.close()
    assert ledger.used_bytes == 0


def test_accelerator_without_streams_gets_the_inline_engine(monkeypatch):
    def no_streams(device):
        raise NotImplementedError("no streams")

    monkeypatch.setattr(torch, "Stream", no_streams)
    engine = engine_for(torch.device("meta"))
    assert isinstance(engine, InlineEngine)
    assert not engine.device_is_host
    assert isinstance(engine_for(torch.device("cpu")), ThreadEngine)


def test_memory_that_cannot_be_pinned_is_pageable_and_warns_once(monkeypatch, caplog):
    engine = StreamEngine.__new__(StreamEngine)
    engine._pinned, engine._device = True, torch.device("meta")
    original = torch.empty

    def cannot_pin(*shape, pin_memory=False, **settings):
        if pin_memory:
            raise RuntimeError("invalid argument")
        return original(*shape, **settings)

    monkeypatch.setattr(torch, "empty", cannot_pin)
    with caplog.at_level(logging.WARNING):
        assert engine.host_nbytes(333) == 512
        assert engine.host_empty(64).nbytes == 64
        assert engine.host_nbytes(333) == 333
        assert engine.host_empty(32).nbytes == 32
    assert caplog.text.count("cannot pin") == 1


def test_free_memory_of_a_device_that_reports_none_raises():
    with pytest.raises(ConfigurationError, match="device_budget"):
        free_device_bytes(torch.device("meta"))


def test_free_device_bytes_leaves_a_reserve(monkeypatch):
    class Memory:
        available = 10 * 2**30

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    monkeypatch.setattr("kvtier.platform.memory.host_memory_bytes", lambda: 20 * 2**30)
    assert free_device_bytes(torch.device("cpu")) == 8 * 2**30
    Memory.available = 2**20
    assert free_device_bytes(torch.device("cpu")) == 0
