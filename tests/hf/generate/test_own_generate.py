"""Model classes with their own ``generate`` are never answered from cached tokens of another prompt."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

import kvtier
from kvtier import TieredCache
from tests.support.reuse import reuse_off
from tests.support.upstream import CACHE

pytestmark = reuse_off


def greedy(model, ids, cache):
    """A loop as in some classes: it continues from any tokens in the cache."""
    sequences = ids
    with torch.no_grad():
        feed = ids[:, cache.get_seq_length() :]
        for _ in range(5):
            feed = model(feed, **{CACHE: cache}).logits[:, -1:].argmax(-1)
            sequences = torch.cat([sequences, feed], 1)
    return sequences


def looping():
    class Looping(LlamaForCausalLM):
        def generate(self, inputs, past_key_values=None, **kwargs):
            return greedy(self, inputs, past_key_values)

    return Looping


def passing_on():
    class PassingOn(LlamaForCausalLM):
        def generate(self, inputs, **kwargs):
            return super().generate(inputs, max_new_tokens=5, do_sample=False, **kwargs)

    return PassingOn


@pytest.fixture
def of_class(model):
    """``of_class(kind)``: the same model with another class."""

    def make(kind):
        other = kind(model.config).eval()
        other.load_state_dict(model.state_dict())
        other.generation_config = model.generation_config
        return other

    return make


@pytest.mark.parametrize("made", ["before", "after"])
def test_own_generate_loop_starts_with_an_empty_cache(store, tokens, of_class, made):
    """The class is defined before the cache is made, or after."""
    kind = looping() if made == "before" else None
    with TieredCache(store) as cache:
        own = of_class(kind or looping())
        for seed in range(3):
            ids = tokens(20, seed=seed)
            found = own.generate(ids, past_key_values=cache)
            assert torch.equal(found, greedy(own, ids, DynamicCache()))
            assert cache.last_turn is None or "generate of its own" in cache.last_turn.miss_reason
        assert cache.get_seq_length() == 0
        assert cache.last_turn.cached_tokens == 0


def test_class_defined_after_a_turn_is_not_answered_from_that_turn(model, generate, cache, tokens, of_class):
    generate(model, tokens(20), cache)
    own = of_class(looping())
    assert torch.equal(
        own.generate(tokens(30, seed=1), past_key_values=cache), greedy(own, tokens(30, seed=1), DynamicCache())
    )


def test_own_generate_that_calls_super_reuses_the_stored_prefix(cache, tokens, of_class):
    own = of_class(passing_on())
    with TieredCache() as warm:  # made after the class
        warm.close()
    ids = tokens(20)
    first = own.generate(ids, past_key_values=cache)
    again = torch.cat([first, tokens(3, seed=1)], 1)
    found = own.generate(again, past_key_values=cache)
    assert torch.equal(found, own.generate(again, **{CACHE: DynamicCache()}))
    assert cache.last_turn.cached_by_tier["host"] == 24  # the buffers were emptied; the prefix comes from the store


def test_error_in_an_own_generate_leaves_the_cache_empty(cache, tokens, of_class):
    own = of_class(looping())
    with TieredCache() as warm:
        warm.close()
    with pytest.raises(IndexError):
        own.generate(tokens(20) + 100_000, past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert "generate of its own" in cache.last_turn.miss_reason


def test_uninstall_restores_the_generate_of_subclasses(tokens, of_class):
    kvtier.uninstall()
    kind = looping()
    original = vars(kind)["generate"]
    with TieredCache() as cache:
        assert vars(kind)["generate"] is not original
        kvtier.uninstall()
        assert vars(kind)["generate"] is original
        cache.close()
    later = looping()
    assert later.generate.__code__ is original.__code__
    with TieredCache():
        assert vars(kind)["generate"] is not original
        assert looping().generate.__code__ is not original.__code__


def test_uninstall_leaves_what_a_class_has_got_since(tokens, of_class, monkeypatch):
    kind, patched = looping(), looping()
    inherits = type("Inherits", (type(of_class(looping())),), {})
    own = vars(kind)["generate"]
    for owner in (kind, patched, inherits):
        monkeypatch.setattr(owner, "generate", lambda self, *args, **kwargs: None)
    with TieredCache():  # wraps what is there now
        monkeypatch.undo()
        later = patched.generate = lambda self, *args, **kwargs: None
        kvtier.uninstall()
    assert vars(kind)["generate"] is own
    assert vars(patched)["generate"] is later
    assert "generate" not in vars(inherits)
