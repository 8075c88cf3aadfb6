"""An interrupted or abandoned turn leaves a cache and a store that the next turn can trust."""

from __future__ import annotations

import pytest
import torch

from kvtier import PrefixStore, TieredCache
from tests.support.interrupts import Interrupt
from tests.support.upstream import CACHE

LAYERS = 3


@pytest.mark.sample(6)  # of 144
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("at_pass", [0, 1, 4], ids=["prefill", "first-token", "fifth-token"])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("start", ["empty", "device", "ram", "disk"])
def test_turns_after_an_interrupt_in_any_layer_are_exact(
    make_model, generate, tokens, tmp_path, kind, start, layer, at_pass, before
):
    model = make_model(kind)
    path = tmp_path if start == "disk" else None
    ids = tokens(30)
    with PrefixStore(path, block_size=8) as store, TieredCache(store) as cache:
        if start != "empty":
            ids = torch.cat([generate(model, ids, cache).sequences, tokens(5, seed=1)], 1)
        if start == "disk":
            store.flush()
            fresh = PrefixStore(path, block_size=8)
        else:
            fresh = store
        with fresh, TieredCache(fresh) as other:
            target = cache if start in ("empty", "device") else other
            with Interrupt(model.model.layers[layer], at_pass, before), pytest.raises(KeyboardInterrupt):
                generate(model, ids, target)
            expected = generate(model, ids).sequences
            changed = ids.clone()
            changed[0, 20] = 199 - changed[0, 20]
            for again in (target, TieredCache(fresh)):
                assert torch.equal(generate(model, ids, again).sequences, expected)
                assert torch.equal(generate(model, changed, again).sequences, generate(model, changed).sequences)


def test_prompt_of_an_interrupted_turn_is_kept(model, generate, tokens, cache):
    with Interrupt(model.model.layers[1], 3, True), pytest.raises(KeyboardInterrupt):
        generate(model, tokens(30), cache)
    generate(model, tokens(30), cache)
    assert cache.last_turn.cached_tokens == 29


@pytest.mark.parametrize("at_pass", [0, 2])
def test_turn_after_interrupted_beam_search_is_exact(model, generate, tokens, cache, at_pass):
    ids = tokens(30, rows=2)
    generate(model, ids[:, :20], cache)
    with Interrupt(model.model.layers[1], at_pass, True), pytest.raises(KeyboardInterrupt):
        generate(model, ids, cache, num_beams=3)
    assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)


def test_turn_after_begin_without_commit_is_exact(model, generate, tokens, cache):
    """``begin`` without ``commit``, with and without a forward pass between."""
    ids = tokens(30)
    generate(model, ids[:, :20], cache)
    cache.begin(model, ids)
    assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)
    cache.begin(model, tokens(10, seed=4))
    with torch.no_grad():
        model(tokens(10, seed=4), **{CACHE: cache})
    assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)
