"""Held rows that a turn wants in another order, or several times, are moved in the memory that holds them."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvtier import PrefixStore, TieredCache
from kvtier.kv.buffer import KVBuffer
from tests.support.places import StandIn
from tests.support.upstream import CACHE

# A buffer beside an accelerator, hot and cold layers under a budget, and the buffers of a CPU.
PLACES = {
    "beside": {"engine": lambda device: StandIn()},
    "hot": {"device_budget": 2**30},
    "cold": {"device_budget": 70_000},
    "host": {},
}


@pytest.fixture(params=PLACES)
def place(request):
    return request.param


@pytest.fixture
def cache(place, tmp_path):
    with PrefixStore(block_size=8) as store, TieredCache(store, **PLACES[place]) as cache:
        yield cache


def memories(cache):
    return [id(layer.memory) for layer in cache.layers if not layer.is_sliding]  # these drop columns


def assert_same(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_rows_in_another_order_are_moved(make_model, generate, tokens, cache, place, kind):
    model, reference = make_model(kind), DynamicCache(config=make_model(kind).config)
    first = generate(model, tokens(20, rows=3), cache).sequences
    generate(model, tokens(20, rows=3), reference)
    held, order = memories(cache), torch.tensor([2, 0, 0])
    ids = torch.cat([first[order], tokens(4, rows=3, seed=1)], 1)
    reference.reorder_cache(order)
    assert_same(generate(model, ids, cache), generate(model, ids, reference))
    assert cache.last_turn.cached_by_tier["device"] == 3 * 27
    assert bool(cache.last_turn.cold_layers) == (place == "cold")
    assert memories(cache) == held


def test_rows_of_beams_are_moved(make_model, generate, tokens, cache):
    model, ids = make_model("llama"), tokens(20)
    first = generate(model, ids, cache, num_beams=3)
    held = memories(cache)
    ids = torch.cat([first.sequences, tokens(4, seed=1)], 1)
    second = generate(model, ids, cache, num_beams=3)
    assert cache.last_turn.cached_by_tier["device"] >= 20
    assert memories(cache) == held
    assert torch.equal(second.sequences, generate(model, ids, num_beams=3).sequences)


def test_stored_columns_land_behind_moved_rows(make_model, generate, tokens, cache):
    """The cache was cropped between the turns: the rest of the prefix comes from the store."""
    model, reference = make_model("llama"), DynamicCache(config=make_model("llama").config)
    first = generate(model, tokens(20, rows=3), cache).sequences
    generate(model, tokens(20, rows=3), reference)
    cache.crop(-14)
    held, order = memories(cache), torch.tensor([2, 0, 1])
    ids = torch.cat([first[order], tokens(4, rows=3, seed=1)], 1)
    reference.reorder_cache(order)
    assert_same(generate(model, ids, cache), generate(model, ids, reference))
    assert dict(cache.last_turn.cached_by_tier) == {"device": 39, "host": 42, "disk": 0}
    assert memories(cache) == held


@pytest.mark.parametrize("place", ["beside"], indirect=True)
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_other_numbers_of_rows_need_no_second_buffer(make_model, generate, tokens, cache, before, after):
    """K is replaced before V, in memory with room for the prompt."""
    model, ids = make_model("llama"), tokens(20, rows=before)
    first = generate(model, ids, cache).sequences
    held, order = memories(cache), torch.arange(after) % before
    ids = torch.cat([first[order], tokens(4, rows=after, seed=1)], 1)
    ours = generate(model, ids, cache)
    assert memories(cache) == held
    assert torch.equal(ours.sequences, generate(model, ids).sequences)


@pytest.mark.parametrize("removed", [0, 14])
def test_a_fork_before_the_first_pass_has_all_rows_of_the_prompt(make_model, generate, tokens, cache, removed):
    """The cache holds one row, of which the prompt has three."""
    model = make_model("llama")
    first = generate(model, tokens(20), cache).sequences
    cache.crop(-removed)
    ids = torch.cat([first.repeat(3, 1), tokens(4, rows=3, seed=1)], 1)
    cache.begin(model, ids)
    with torch.no_grad(), cache.fork() as twin:
        assert twin.get_seq_length() == 27
        logits = [model(ids[:, 27:], **{CACHE: each}).logits for each in (twin, cache)]
    assert torch.equal(*logits)
    assert torch.allclose(logits[0], model(ids).logits[:, 27:], rtol=0, atol=1e-4)


def test_an_interrupt_while_rows_move_leaves_nothing(make_model, generate, tokens, cache, monkeypatch):
    """Some layers have moved and others have not."""
    model, ids, calls, select = make_model("llama"), tokens(20, rows=2), [], KVBuffer.select

    def interrupted(buffer, *arguments):
        calls.append(buffer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        select(buffer, *arguments)

    ids = generate(model, ids, cache).sequences.flip(0)
    monkeypatch.setattr(KVBuffer, "select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, cache)
    monkeypatch.undo()
    ours = generate(model, ids, cache)
    assert cache.last_turn.cached_by_tier["device"] == 0
    assert torch.equal(ours.sequences, generate(model, ids).sequences)
