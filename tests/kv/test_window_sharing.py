"""Sharing a buffer copies nothing; the first write that conflicts gives the writer a copy."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from kvtier.kv.buffer import KVBuffer
from kvtier.kv.page import Page
from kvtier.kv.spec import LayerSpec

GEOMETRY = LayerSpec(2, 3, 1, 2, torch.float32)


def states(value: float, columns: int = 1):
    return torch.full((1, 2, columns, 3), value), torch.full((1, 1, columns, 2), value)


def filled(columns: int = 10, capacity: int = 20) -> KVBuffer:
    buffer = KVBuffer(1, GEOMETRY, capacity, "cpu")
    buffer.append(0, *states(1.0, columns), 0)
    return buffer


def address(buffer: KVBuffer) -> tuple[int, int]:
    return buffer.k.data_ptr(), buffer.v.data_ptr()


def holds(buffer: KVBuffer, *values: float) -> bool:
    k, v = buffer.contents(len(values))
    expected = torch.tensor(values)
    return torch.equal(k[0, 0, :, 0], expected) and torch.equal(v[0, 0, :, 0], expected)


def test_first_append_to_a_shared_buffer_is_in_place_and_later_ones_copy():
    buffer = filled()
    first, second = buffer.share(10), buffer.share(10)
    at = address(buffer)
    assert address(first) == address(second) == at
    second.append(10, *states(2.0), 0)
    assert address(second) == at
    first.append(10, *states(3.0), 0)
    buffer.append(10, *states(4.0), 0)
    assert len({address(buffer), address(first), address(second)}) == 3
    for each, last in ((buffer, 4.0), (first, 3.0), (second, 2.0)):
        assert holds(each, *[1.0] * 10, last)


def test_columns_appended_in_place_survive_an_append_to_a_shorter_twin():
    buffer = filled()
    shorter = buffer.share(10)
    buffer.append(10, *states(2.0, 5), 0)
    third = shorter.share(10)
    third.append(10, *states(3.0, 5), 0)
    assert holds(buffer, *[1.0] * 10, *[2.0] * 5)
    assert holds(third, *[1.0] * 10, *[3.0] * 5)


def test_append_after_a_crop_leaves_the_twin_unchanged():
    buffer = filled()
    twin = buffer.share(10)
    buffer.append(9, *states(5.0), 0)
    assert holds(buffer, *[1.0] * 9, 5.0)
    assert holds(twin, *[1.0] * 10)


@pytest.mark.parametrize(
    "write",
    [
        lambda buffer: buffer.clear(0, 2, 4),
        lambda buffer: buffer.put(0, 2, Page(torch.zeros(2, 2, 3), torch.zeros(1, 2, 2))),
        lambda buffer: buffer.view(0, 2).cut(0, 2).take(Page(torch.zeros(2, 2, 3), torch.zeros(1, 2, 2)), 0, 2),
        lambda buffer: buffer.write(2, *states(0.0, 2)),
        lambda buffer: buffer.copy(0, 2, 4, zeros(), 0, 0),
    ],
    ids=["clear", "put", "landing", "write", "copy"],
)
def test_overwriting_shared_columns_leaves_the_twin_unchanged(write):
    buffer = filled()
    twin = buffer.share(10)
    write(buffer)
    assert holds(buffer, 1.0, 1.0, 0.0, 0.0, *[1.0] * 6)
    assert holds(twin, *[1.0] * 10)


def zeros() -> KVBuffer:
    buffer = KVBuffer(1, GEOMETRY, 2, "cpu")
    buffer.write(0, *states(0.0, 2))
    return buffer


@pytest.mark.parametrize("leave", [lambda buffer: buffer.close(), lambda buffer: None], ids=["closed", "collected"])
def test_last_remaining_owner_writes_in_place(leave):
    buffer = filled()
    twin = buffer.share(10)
    at = address(buffer)
    leave(buffer)
    del buffer
    twin.append(3, *states(6.0), 0)
    assert address(twin) == at
    assert holds(twin, 1.0, 1.0, 1.0, 6.0)


def test_append_to_a_closed_buffer_does_not_change_its_twin():
    buffer = filled()
    twin = buffer.share(10)
    buffer.close()
    buffer.append(3, *states(7.0), 0)
    assert holds(twin, *[1.0] * 10)


def test_growing_a_shared_buffer_leaves_its_twin_in_place():
    buffer = filled()
    twin = buffer.share(10)
    at = address(buffer)
    twin.reserve(500, live=10)
    assert address(buffer) == at != address(twin)
    buffer.append(3, *states(8.0), 0)  # the only owner again
    assert address(buffer) == at
    assert holds(twin, *[1.0] * 10)


def test_selecting_rows_of_a_shared_buffer_leaves_its_twin_unchanged():
    k, v = torch.arange(2.0).view(2, 1, 1, 1), torch.arange(2.0).view(2, 1, 1, 1)
    buffer = KVBuffer(2, LayerSpec.of(k, v), 4, "cpu")
    buffer.append(0, k, v, 0)
    twin = buffer.share(1)
    twin.select(torch.tensor([1, 0]), 1)
    assert buffer.k[:, 0, 0, 0].tolist() == [0.0, 1.0]
    assert twin.k[:, 0, 0, 0].tolist() == twin.v[:, 0, 0, 0].tolist() == [1.0, 0.0]


def test_deep_copy_shares_no_memory():
    buffer = filled()
    twin = copy.deepcopy(buffer)
    assert address(twin) != address(buffer)
    buffer.write(0, *states(0.0, 10))
    assert holds(twin, *[1.0] * 10)


def test_concurrent_appends_to_shared_buffers_keep_their_own_values():
    buffer = filled(columns=4, capacity=200)
    twins = [buffer.share(4) for _ in range(4)]
    start = threading.Barrier(len(twins))

    def work(twin: KVBuffer, value: float) -> None:
        start.wait()
        for column in range(4, 150):
            twin.append(column, *states(value), 0)

    threads = [threading.Thread(target=work, args=(twin, 10.0 + i)) for i, twin in enumerate(twins)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, twin in enumerate(twins):
        assert holds(twin, *[1.0] * 4, *[10.0 + i] * 146)
