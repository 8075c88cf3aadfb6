"""Device memory of buffers beside ``DynamicCache``'s, counted on a device without memory."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvtier.errors import ConfigurationError
from kvtier.kv.buffer import KVBuffer
from kvtier.kv.room import Room
from kvtier.offload.manager import OffloadManager
from kvtier.transfer.base import InlineEngine
from tests.support.counted_memory import CountedMemory

META = torch.device("meta")
HEADS, DIM = 8, 128


def new_tokens(rows, columns):
    return tuple(torch.empty(rows, HEADS, columns, DIM, dtype=torch.bfloat16, device=META) for _ in range(2))


class Buffers:
    """As many buffers as a model has layers, with the interface of a cache."""

    def __init__(self, layers, room):
        self.room = room
        self.memories = [None] * layers
        self.length = [0] * layers

    def update(self, k, v, layer):
        if self.memories[layer] is None:
            self.memories[layer] = KVBuffer.like(k, v, self.room)
        begin = self.length[layer]
        self.length[layer] += k.shape[2]
        return self.memories[layer].append(begin, k, v, 0)

    def reorder_cache(self, rows):
        for layer, memory in enumerate(self.memories):
            memory.select(rows, self.length[layer])


def play(cache, layers, turns, rows=1, beams=False, before_turn=lambda columns, new: None):
    """Feed prompts and then single tokens; return the held and peak bytes at the end of each turn."""
    counts, columns = [], 0
    with CountedMemory() as memory:
        for prompt, answer in turns:
            columns += prompt
            before_turn(columns, answer)
            for step in range(answer + 1):
                for layer in range(layers):
                    cache.update(*new_tokens(rows, prompt if step == 0 else 1), layer)
                if beams and step:
                    cache.reorder_cache(torch.zeros(rows, dtype=torch.long))
            columns += answer
            counts.append((memory.held, memory.peak))
            memory.peak = 0
    return counts


def memory_of(turns, *, layers=2, known=True, **options):
    room = Room(lambda: layers)

    def before_turn(columns, answer):
        room.begin_turn(columns, answer if known else 0)

    ours = play(Buffers(layers, room), layers, turns, before_turn=before_turn, **options)
    theirs = play(DynamicCache(), layers, turns, **options)
    return list(zip(ours, theirs, strict=True))


LENGTHS = [512, 2_048, 8_192, 16_384]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rows", [1, 4])
def test_device_memory_is_as_tight_as_dynamic_cache(length, rows):
    """One long prompt with an answer, then two more turns of a conversation."""
    for (held, peak), (their_held, their_peak) in memory_of([(length, 16), (100, 40), (7, 8)], rows=rows):
        assert held <= 1.05 * their_held
        assert peak <= their_peak


@pytest.mark.parametrize("length", LENGTHS)
def test_device_memory_is_as_tight_as_dynamic_cache_with_beams(length):
    for (held, peak), (their_held, their_peak) in memory_of([(length, 12)], rows=4, beams=True):
        assert held <= 1.05 * their_held
        assert peak <= their_peak


class OffloadedBuffers(Buffers):
    """The same under a budget in which all layers stay hot."""

    def __init__(self, layers, offload):
        super().__init__(layers, None)
        self.offload = offload

    def update(self, k, v, layer):
        if self.memories[layer] is None:
            self.memories[layer] = self.offload.layer(layer, k, v, None, may_be_cold=True)
        return super().update(k, v, layer)


@pytest.mark.parametrize("length", LENGTHS)
def test_hot_layers_under_a_budget_take_little_more_than_dynamic_cache(length, tmp_path):
    """They grow in small steps also where the end is known: what an answer may need is left to other layers."""
    layers, turns = 2, [(length, 16), (100, 40), (7, 8)]
    offload = OffloadManager(2**40, None, tmp_path, 256, lambda: layers, lambda device: InlineEngine())
    ours = play(OffloadedBuffers(layers, offload), layers, turns, before_turn=offload.begin_turn)
    theirs = play(DynamicCache(), layers, turns)
    for (held, peak), (their_held, their_peak) in zip(ours, theirs, strict=True):
        assert held <= 1.05 * their_held
        assert peak <= 1.05 * their_peak
    offload.close()


@pytest.mark.parametrize("length", LENGTHS)
def test_buffers_grow_by_little_where_the_length_is_not_known(length):
    """In a custom loop, nothing says how long the answer will be."""
    for (held, _), (their_held, _) in memory_of([(length, 70)], known=False):
        assert held <= 1.05 * their_held


def test_columns_ahead_are_not_reserved_when_memory_is_short():
    """They would take more than a quarter of the free memory."""
    free, column_bytes = 100_000, 10
    room = Room(lambda: 4, lambda device: free)
    room.begin_turn(400, 600)
    assert room.capacity(300, column_bytes, META) == 400, "the prompt is fed in chunks"
    assert room.capacity(401, column_bytes, META) == 1_000
    room.begin_turn(400, 627)
    assert room.capacity(400, column_bytes, META) == 400
    assert room.capacity(401, column_bytes, META) == 401 + 401 // 32
    assert room.capacity(1_000, column_bytes, META) == 1_000 + 1_000 // 32, "decided once a turn"
    room.begin_turn(400, 600)
    assert room.capacity(401, column_bytes, META) == 1_000
    assert room.capacity(1_001, column_bytes, META) == 1_001 + 1_001 // 32, "more than the turn said it needs"
    assert room.capacity(100_000, column_bytes, META) == 100_256


def test_a_device_that_tells_no_free_memory_reserves_the_turns_columns():
    def unknown(device):
        raise ConfigurationError("it does not tell")

    room = Room(free_bytes=unknown)
    room.begin_turn(400, 600)
    assert room.capacity(401, 10, META) == 1_000


def test_buffer_takes_exactly_what_it_needs_when_memory_is_short(monkeypatch):
    """The allocation of more fails; the buffer keeps its content and grows by what is needed."""
    k = torch.ones(1, 1, 4, 2)
    room = Room()
    buffer = KVBuffer.like(k, k, room)
    buffer.append(0, k, k, 0)
    largest, original = 2 * buffer.capacity, torch.empty

    def small(shape, **settings):
        if len(shape) == 4 and shape[2] > largest:
            raise torch.OutOfMemoryError("out of memory")
        return original(shape, **settings)

    monkeypatch.setattr(torch, "empty", small)
    needed = largest - 1
    buffer.reserve(needed, live=4)
    assert buffer.capacity == needed
    assert torch.equal(buffer.contents(4)[0], k)
    with pytest.raises(torch.OutOfMemoryError):
        buffer.reserve(largest + 1, live=4)
    assert torch.equal(buffer.contents(4)[1], k)
    assert buffer.capacity == needed
