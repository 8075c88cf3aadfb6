"""Hooks that an owner vouches for keep reuse on, and are part of the root; others turn it off, with one warning.

``assert_reused`` compares each answer with that of plain ``generate()``.
"""

from __future__ import annotations

import functools
import re
import warnings

import pytest
import torch

from kvtier import ConfigurationError, TieredCache
from kvtier.errors import ReuseWarning
from kvtier.hf.identity.fingerprint import identify
from kvtier.hf.identity.trusted_hooks import TrustedHooks, qualified_name
from tests.support.upstream import CACHE

NAME = f"{__name__}.count_tokens"
seen = []


def count_tokens(module, inputs, output=None):
    """A hook, before or after, that changes nothing."""
    seen.append(type(module).__name__)


def steering(module, inputs, output):
    return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, module, inputs, output):
        self.calls += 1

    def count(self, module, inputs, output):
        self.calls += 1


def assert_reused(model, ids, cache, generate, cached):
    found = generate(model, ids, cache).sequences
    assert torch.equal(found, generate(model, ids).sequences)
    assert cache.last_turn.cached_tokens == cached, cache.last_turn.miss_reason


@pytest.fixture
def layer(model):
    return model.model.layers[1]


@pytest.mark.parametrize("how", ["after", "before", "everywhere"])
@pytest.mark.parametrize("given", [count_tokens, NAME], ids=["function", "name"])
def test_trusted_hook_keeps_reuse_on(model, layer, generate, tokens, store, how, given):
    everywhere = torch.nn.modules.module.register_module_forward_hook
    register = {"after": layer.register_forward_hook, "before": layer.register_forward_pre_hook}
    handle = register.get(how, everywhere)(count_tokens)
    seen.clear()
    try:
        with TieredCache(store, trusted_hooks=[given]) as cache:
            assert_reused(model, tokens(30), cache, generate, 0)
            assert_reused(model, tokens(30), cache, generate, 29)
            assert seen
    finally:
        handle.remove()


def test_other_hook_beside_a_trusted_one_turns_reuse_off(model, layer, generate, tokens, store):
    layer.register_forward_hook(count_tokens)
    layer.register_forward_hook(steering)
    with TieredCache(store, trusted_hooks=[count_tokens]) as cache:
        with pytest.warns(ReuseWarning, match=re.escape(f'TieredCache(trusted_hooks=["{__name__}.steering"])')):
            assert_reused(model, tokens(30), cache, generate, 0)
        assert f"the hook {__name__}.steering on model.layers.1 may change K and V" in cache.last_turn.miss_reason


def test_root_records_the_trusted_hooks_of_the_model(model, layer):
    trusted = TrustedHooks([count_tokens, "some.other.hook"])
    plain = identify(model, "", 8)
    assert identify(model, "", 8, trusted_hooks=trusted) == plain, "the model has no such hook"
    handle = layer.register_forward_hook(count_tokens)
    hooked = identify(model, "", 8, trusted_hooks=trusted)
    assert hooked.manifest["trusted_hooks"] == [NAME]
    assert hooked.root != plain.root
    assert identify(model, "", 8, trusted_hooks=TrustedHooks([NAME])).root == hooked.root
    model.model.layers[0].register_forward_pre_hook(count_tokens)
    handle.remove()
    assert identify(model, "", 8, trusted_hooks=trusted).root == hooked.root
    assert identify(model, "", 8).reason.startswith(f"the hook {NAME} on model.layers.0 ")


def test_prefix_under_a_trusted_hook_is_not_found_without_it(model, layer, generate, tokens, store):
    with TieredCache(store, trusted_hooks=[count_tokens]) as cache:
        handle = layer.register_forward_hook(count_tokens)
        assert_reused(model, tokens(30), cache, generate, 0)
        handle.remove()
        assert_reused(model, tokens(30), cache, generate, 0)
        assert_reused(model, tokens(30), cache, generate, 29)


def test_object_stands_for_itself_and_a_name_for_all_of_that_name():
    one, other = Counter(), Counter()
    assert TrustedHooks([one]).cover(one)
    assert not TrustedHooks([one]).cover(other)
    assert TrustedHooks([one.count]).cover(one.count)
    assert not TrustedHooks([one.count]).cover(other.count)
    assert not TrustedHooks([one.count]).cover(one)
    assert TrustedHooks([f"{__name__}.Counter"]).cover(other)
    assert TrustedHooks([f"{__name__}.Counter.count"]).cover(other.count)
    part = functools.partial(count_tokens)
    assert not TrustedHooks([count_tokens]).cover(part), "its arguments may be anything"
    assert TrustedHooks([NAME]).cover(part)
    first, second = (lambda *_: None for _ in range(2))
    assert qualified_name(first) == qualified_name(second)
    assert not TrustedHooks([first]).cover(second)
    assert not TrustedHooks().cover(count_tokens)


def test_trusted_hook_of_accelerate_keeps_reuse_on(model, generate, tokens, store):
    from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module

    class Noting(ModelHook):
        def post_forward(self, module, output):
            seen.append(1)
            return output

    noting = Noting()
    add_hook_to_module(model.model.layers[0].mlp, SequentialHook(ModelHook(), noting))
    with TieredCache(store, trusted_hooks=[noting]) as cache:
        assert_reused(model, tokens(30), cache, generate, 0)
        assert_reused(model, tokens(30), cache, generate, 29)
    with TieredCache(store) as cache, pytest.warns(ReuseWarning, match=r"Noting on model\.layers\.0\.mlp may change"):
        assert_reused(model, tokens(30), cache, generate, 0)


def test_fork_trusts_the_same_hooks(model, layer, generate, tokens, store):
    layer.register_forward_hook(count_tokens)
    with TieredCache(store, trusted_hooks=[count_tokens]) as cache:
        assert_reused(model, tokens(30), cache, generate, 0)
        with cache.fork() as fork:
            assert_reused(model, tokens(30), fork, generate, 29)


@pytest.mark.parametrize(
    "value",
    [NAME, count_tokens, 3, [3], [None], [""], [count_tokens, b"name"]],
    ids=str.split("name function number numbers none empty bytes"),
)
def test_wrong_trusted_hooks_raise(value):
    with pytest.raises(ConfigurationError, match=r"trusted_hooks.*pass"):
        TieredCache(trusted_hooks=value)


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_lasting_reason_is_warned_of_once_and_names_the_callers_line(model, generate, tokens, store, cache):
    model.train()
    with pytest.warns(ReuseWarning, match=r"training mode \(call model\.eval\(\)\)") as warned:
        model.generate(tokens(10), **{CACHE: cache}, max_new_tokens=2, do_sample=False)
    assert [each.filename for each in warned] == [__file__]
    with warnings.catch_warnings(), TieredCache(store) as other:
        warnings.simplefilter("error")
        generate(model, tokens(10), cache)
        generate(model, tokens(10), other)
        assert "training mode" in other.last_turn.miss_reason


def test_each_lasting_reason_is_warned_of(model, layer, generate, tokens, cache):
    layer.register_forward_hook(steering)
    with pytest.warns(ReuseWarning, match="steering"):
        generate(model, tokens(10), cache)
    model.train()
    with pytest.warns(ReuseWarning, match="training mode"):
        generate(model, tokens(10), cache)


@pytest.mark.parametrize(
    "settings", [{"use_cache": False}, {"prompt_lookup_num_tokens": 2}], ids=lambda settings: next(iter(settings))
)
def test_reason_of_one_call_is_not_warned_of(model, tokens, cache, settings):
    """Warnings are errors here."""
    cache.begin(model, tokens(10), torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1, 1]]))
    assert "holes" in cache.last_turn.miss_reason
    model.generate(tokens(10), **{CACHE: cache}, max_new_tokens=2, do_sample=False, **settings)
    assert cache.last_turn.miss_reason


def test_warning_turned_into_an_error_leaves_the_cache_usable(model, generate, tokens, cache):
    generate(model, tokens(30), cache)
    model.train()
    with pytest.raises(ReuseWarning):
        generate(model, tokens(30), cache)
    model.eval()
    assert_reused(model, tokens(30), cache, generate, 29)


def test_reasons_that_differ_in_each_turn_are_not_warned_of_forever(monkeypatch):
    from kvtier.hf import not_reusable

    monkeypatch.setattr(not_reusable, "_MOST_WARNINGS", 3)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for turn in range(10):
            not_reusable.warn_of(f"an object at {turn}")
    assert len(warned) == 3
