"""The test device: real tensors under another name, streams that run late, memory that is poisoned and counted.

Run it with ``KVTIER_DEVICE=test``.
"""

from __future__ import annotations

import copy
import gc
import io
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.testing import RaceError
from kvtier.testing.device import DEVICE_TYPE

DEVICE = torch.get_default_device()
LARGE = 2**16  # floats: more than any other tensor here, so that its block is reused by tensors of this size only


@pytest.fixture
def lazy(machine):
    """The device; copies run only when something waits for them."""
    machine.restart(lazy=True)
    yield machine
    machine.restart()


def pinned(*values):
    return torch.tensor(values, device="cpu").pin_memory()


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_tensors_have_the_device_and_its_module(machine):
    there = torch.arange(6.0, device="cpu").view(2, 3).to(DEVICE)
    assert (there.device, there.is_cpu, there.untyped_storage().nbytes()) == (DEVICE, False, 24)
    assert torch.accelerator.current_accelerator().type == DEVICE_TYPE
    assert torch.get_device_module(DEVICE).memory_allocated() == machine.memory.held
    assert there[1:, ::2].tolist() == [[3.0, 5.0]]


def test_views_share_memory_and_results_do_not(machine):
    there = torch.zeros(4, 4, device=DEVICE)
    there[1:3].transpose(0, 1)[2].fill_(7)
    assert there.sum().item() == 14
    assert (there + 0).untyped_storage().data_ptr() != there.untyped_storage().data_ptr()
    assert there.view(-1)[6:].untyped_storage().data_ptr() == there.untyped_storage().data_ptr()


@given(shape=st.lists(st.integers(0, 4), max_size=4), seed=st.integers(0, 99))
def test_operators_give_the_bits_of_the_cpu(machine, shape, seed):
    here = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    there = here.to(DEVICE)
    for operate in (
        lambda x: x * 2 + 1,
        lambda x: x.softmax(-1) if x.dim() else x,
        lambda x: x.reshape(-1).sort().values,
        lambda x: torch.cat([x.reshape(-1), x.reshape(-1)]).cumsum(0),
        lambda x: torch.where(x > 0, x, -x).to(torch.bfloat16),
        lambda x: x.reshape(-1)[x.reshape(-1) > 0],
        lambda x: x.clone().mul_(3),
        lambda x: torch.view_as_complex(torch.stack([x, x], -1)).conj() * 1j,
        lambda x: copy.deepcopy(x),
    ):
        found, expected = operate(there), operate(here)
        assert found.device == DEVICE
        assert torch.equal(found.cpu(), expected)


def test_results_of_any_size_and_outputs_that_grow(machine):
    values = torch.tensor([3, 1, 3, 3], device=DEVICE)
    assert values.unique().tolist() == [1, 3]
    assert torch.histc(values.int(), bins=4, min=0, max=3).tolist() == [0, 1, 0, 3]
    out = torch.empty(0, dtype=torch.long, device=DEVICE)
    torch.arange(5, out=out)
    assert out.tolist() == [0, 1, 2, 3, 4]
    assert torch.nn.functional.conv1d(torch.ones(1, 1, 3, device=DEVICE), torch.ones(1, 1, 2, device=DEVICE)).sum() == 4


def test_operators_refuse_tensors_of_other_devices(machine):
    with pytest.raises(RuntimeError, match="cpu"):
        torch.ones(2, device=DEVICE) + torch.ones(2, device="cpu")
    with pytest.raises(RuntimeError, match="cpu"):
        torch.equal(torch.ones(2, device=DEVICE), torch.ones(2, device="cpu"))
    assert (torch.ones(2, device=DEVICE) + torch.tensor(1.0, device="cpu")).tolist() == [2, 2]


def test_tensors_are_pickled_with_their_device(machine):
    file = io.BytesIO()
    torch.save(torch.arange(3, device=DEVICE), file)
    file.seek(0)
    assert torch.load(file, map_location="cpu").tolist() == [0, 1, 2]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_new_and_freed_memory_is_poisoned(lazy):
    there = torch.empty(LARGE, device=DEVICE)
    assert there.isnan().all()
    there.fill_(1)
    address = there.data_ptr()
    del there
    again = torch.empty(LARGE, device=DEVICE)
    assert again.data_ptr() == address
    assert again.isnan().all()


def test_held_and_peak_bytes_are_counted_in_blocks_of_512(machine):
    gc.collect()
    held = machine.memory.held
    machine.memory.reset_peak()
    first = torch.empty(LARGE, device=DEVICE)
    one = torch.empty(1, device=DEVICE)
    assert machine.memory.held - held == 4 * LARGE + 512
    second = first[10:]
    del first
    assert machine.memory.held - held == 4 * LARGE + 512, "a view keeps the whole block"
    del second, one
    assert machine.memory.held == held
    assert machine.memory.peak - held == 4 * LARGE + 512
    machine.memory.reset_peak()
    assert machine.memory.peak == held


def late_copy(machine, *, recorded):
    """Free a tensor while a side stream still copies from it, then use its memory; return what the copy found."""
    side, host = torch.Stream(DEVICE), torch.empty(LARGE, device="cpu", pin_memory=True)
    there = torch.ones(LARGE, device=DEVICE)
    ready = torch.accelerator.current_stream(DEVICE).record_event()
    with side:
        side.wait_event(ready)
        host.copy_(there, non_blocking=True)
        if recorded:
            there.record_stream(side)
        copied = side.record_event()
    del there
    others = torch.empty(LARGE, device=DEVICE)
    if recorded:
        others.fill_(2)
    copied.synchronize()
    return host


def test_memory_recorded_with_a_stream_is_not_reused_before_its_work_has_ended(lazy):
    held = lazy.memory.held
    assert (late_copy(lazy, recorded=True) == 1).all()
    torch.accelerator.synchronize()
    assert lazy.memory.held == held


def test_memory_not_recorded_with_a_stream_is_reused_too_early(lazy):
    assert late_copy(lazy, recorded=False).isnan().all()


def test_a_kernel_on_memory_that_a_side_stream_still_uses_is_a_race(lazy):
    side, host = torch.Stream(DEVICE), torch.empty(LARGE, device="cpu", pin_memory=True)
    there = torch.ones(LARGE, device=DEVICE)
    side.wait_event(torch.accelerator.current_stream(DEVICE).record_event())
    with side:
        host.copy_(there, non_blocking=True)
    del there
    with pytest.raises(RaceError, match="R2"):
        torch.empty(LARGE, device=DEVICE).fill_(2)
    lazy.restart()


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_copy_without_a_wait_is_not_there_yet(lazy):
    side, there = torch.Stream(DEVICE), torch.empty(3, device=DEVICE)
    with side:
        there.copy_(pinned(1.0, 2.0, 3.0), non_blocking=True)
        copied = side.record_event()
    assert not copied.query()
    with pytest.raises(RaceError, match="R1"):
        there + 1
    lazy.restart(lazy=True)
    torch.accelerator.current_stream(DEVICE).wait_event(copied)
    assert (there + 1).tolist() == [2, 3, 4]


def test_the_host_reads_poison_before_it_waits(lazy):
    side, host = torch.Stream(DEVICE), torch.empty(3, device="cpu", pin_memory=True)
    there = torch.ones(3, device=DEVICE)
    side.wait_event(torch.accelerator.current_stream(DEVICE).record_event())
    with side:
        host.copy_(there, non_blocking=True)
        copied = side.record_event()
    assert host.isnan().all()
    waits = lazy.streams.host_waits.total()
    copied.synchronize()
    assert host.tolist() == [1, 1, 1]
    assert lazy.streams.host_waits.total() == waits + 1


def test_a_copy_that_is_not_ordered_after_a_kernel_is_a_race(lazy):
    side, host = torch.Stream(DEVICE), torch.empty(3, device="cpu", pin_memory=True)
    there = torch.ones(3, device=DEVICE)
    with side, pytest.raises(RaceError, match="R3"):
        host.copy_(there, non_blocking=True)
    lazy.restart()


def test_streams_of_a_thread_are_its_own(machine):
    seen = []
    with torch.Stream(DEVICE) as stream:
        thread = threading.Thread(target=lambda: seen.append(torch.accelerator.current_stream(DEVICE).stream_id))
        thread.start()
        thread.join()
        assert torch.accelerator.current_stream(DEVICE) == stream
        with pytest.raises(RuntimeError, match="entered before"), stream:
            pass
    assert seen == [0]


@given(seed=st.integers(0, 999), lazy=st.booleans(), links=st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_every_schedule_gives_the_bits_of_ordered_copies(machine, seed, lazy, links):
    """A value goes to the device and back, each time on another stream, after an event of the stream before."""
    machine.restart(seed, lazy=lazy)
    streams = [torch.Stream(DEVICE) for _ in range(3)]
    host, there = pinned(*range(9)), torch.empty(9, dtype=torch.long, device=DEVICE)
    before = torch.accelerator.current_stream(DEVICE).record_event()
    for number in links:
        with torch.Stream(stream_id=streams[number].stream_id) as stream:
            stream.wait_event(before)
            there.copy_(host, non_blocking=True)
            host = torch.empty(9, dtype=torch.long, device="cpu", pin_memory=True)
            host.copy_(there, non_blocking=True)
            before = stream.record_event()
    torch.accelerator.current_stream(DEVICE).wait_event(before)
    assert there.tolist() == list(range(9))
    before.synchronize()
    assert host.tolist() == list(range(9))


@pytest.mark.parametrize("modes", [(True, False), (False, True)], ids=["inside first", "outside first"])
def test_memory_is_used_again_inside_and_outside_of_inference_mode(machine, modes):
    address = []
    for inside in modes:
        with torch.inference_mode(inside):
            tensor = torch.empty(999, dtype=torch.float64, device=DEVICE)
        assert tensor.isnan().all()
        assert tensor.is_inference() == inside
        with torch.inference_mode(inside):
            tensor.zero_()
        address.append(tensor.data_ptr())
        del tensor
    assert address[0] == address[1]


# --- copies -----------------------------------------------------------------------------------------------------------


def test_copies_of_pageable_memory_block_and_are_counted(machine):
    pageable, there = torch.arange(3, device="cpu"), torch.empty(3, dtype=torch.long, device=DEVICE)
    assert not pageable.is_pinned()
    with machine.blocking_copies() as counts:
        there.copy_(pageable, non_blocking=True)
        pageable.copy_(there, non_blocking=True)
        there.cpu()
        there.sum().item()
    assert counts == {__file__: 4}


def test_only_copies_of_pinned_memory_that_nothing_waits_for_are_not_counted(machine):
    host, there = pinned(1, 2, 3), torch.empty(3, dtype=torch.long, device=DEVICE)
    assert host.is_pinned()
    assert host[1:].is_pinned()
    queued = machine.queued
    with machine.blocking_copies() as counts:
        there.copy_(host, non_blocking=True)
    assert not counts
    assert machine.queued == queued + 1
    with machine.blocking_copies() as counts:
        there.copy_(host)
    assert counts == {__file__: 1}
