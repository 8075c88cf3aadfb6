"""A change to a cache inside generate() gives right tokens, or a kvtier error that says what to do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import Cache, LogitsProcessor, StoppingCriteria

from kvtier import BusyError, ClosedError, ConfigurationError, TieredCache
from kvtier.errors import KvtierError
from tests.support import families
from tests.support.reuse import reuse_off
from tests.support.upstream import given

KINDS = ["llama", "gemma3", "qwen3_next", "falcon_h1", "mamba2"]


def prompt(columns, seed=0):
    return torch.randint(1, 60, (1, columns), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def build():
    models = {}

    def make(name):
        if name == "mamba2" and not hasattr(Cache, "get_conv_state"):
            pytest.skip("this version of transformers does not tell such a cache how many tokens it has seen")
        if name not in models:
            models[name] = families.build(name)
        return models[name]

    return make


class _AtStep(LogitsProcessor, StoppingCriteria):
    """Calls ``do`` at one step, as a streamer, a stopping criterion or a logits processor."""

    def __init__(self, step, do):
        self.left, self.do, self.result = step, do, None

    def put(self, value):
        self._count()

    def end(self):
        pass

    def _count(self):
        self.left -= 1
        if self.left == 0:
            self.result = self.do()

    def __call__(self, input_ids, scores):
        self._count()
        return scores


class _AtStepToo(_AtStep):
    def __call__(self, input_ids, scores, **_):
        self._count()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def callbacks(place, at):
    return {place: at if place == "streamer" else [at]}


def drop_layers(cache):
    del cache.layers


def clear_layers(cache):
    cache.layers.clear()


def replace_layers(cache):
    cache.layers = []


def reset_layers(cache):
    for layer in cache.layers:
        layer.reset()


def crop_layers(cache):
    for layer in cache.layers:
        layer.crop(-2)


CHANGES = {
    "reset": (lambda model, cache: cache.reset(), BusyError),
    "begin": (lambda model, cache: cache.begin(model, prompt(5)), BusyError),
    "commit": (lambda model, cache: cache.commit(prompt(30)), BusyError),
    "close": (lambda model, cache: cache.close(), ClosedError),
    "crop": (lambda model, cache: cache.crop(-2), BusyError),
    "crop layers": (lambda model, cache: crop_layers(cache), BusyError),
    "delete layers": (lambda model, cache: drop_layers(cache), ConfigurationError),
    "clear layers": (lambda model, cache: clear_layers(cache), KvtierError),
    "replace layers": (lambda model, cache: replace_layers(cache), KvtierError),
    "reset layers": (lambda model, cache: reset_layers(cache), BusyError),
    "fork": (lambda model, cache: cache.fork(), None),
    "copy": (lambda model, cache: copy.copy(cache), None),
    "deepcopy": (lambda model, cache: copy.deepcopy(cache), None),
    "generate": (lambda model, cache: model.generate(prompt(5), max_new_tokens=2), None),
    "read": (lambda model, cache: [cache.get_seq_length(), repr(cache), cache.last_turn, len(cache)], None),
    "flush": (lambda model, cache: cache.flush(), None),
}
NEEDS_WINDOWS = ("crop", "crop layers", "reset layers")


@pytest.mark.sample(11)  # of 240
@pytest.mark.parametrize("place", ["streamer", "stopping_criteria", "logits_processor"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", KINDS)
def test_change_during_generate_gives_right_tokens_or_a_kvtier_error(build, store, name, change, place):
    model, ids = build(name), prompt(20)
    do, error = CHANGES[change]
    if change in NEEDS_WINDOWS and name not in ("llama", "gemma3"):
        pytest.skip("transformers refuses it for states, or does it without a trace")
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    cache = TieredCache(store)
    model.generate(ids[:, :12], past_key_values=cache, max_new_tokens=2)
    kind = _AtStepToo if place == "stopping_criteria" else _AtStep
    at = kind(3, lambda: do(model, cache))
    if error is None:
        assert torch.equal(model.generate(ids, past_key_values=cache, **settings, **callbacks(place, at)), expected)
    else:
        with pytest.raises(error):
            model.generate(ids, past_key_values=cache, **settings, **callbacks(place, at))
    if change == "close":
        return
    for used in (cache, TieredCache(store), *([at.result] if isinstance(at.result, TieredCache) else [])):
        longer = torch.cat([expected, prompt(3, seed=1)], 1)
        mask = torch.ones_like(longer)
        found = model.generate(longer, past_key_values=used, max_new_tokens=5, do_sample=False, attention_mask=mask)
        assert torch.equal(found, model.generate(longer, max_new_tokens=5, do_sample=False, attention_mask=mask))


@reuse_off
@pytest.mark.parametrize("change", ["close", "crop", "clear layers"])
@pytest.mark.parametrize("name", KINDS)
def test_change_after_the_last_token_leaves_answer_and_next_turn_right(build, store, name, change):
    """No more tokens are fed. The answer is right, and so are its kept tokens."""
    model, ids = build(name), prompt(20)
    if change == "crop" and name not in ("llama", "gemma3"):
        pytest.skip("transformers refuses it for states")
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    cache = TieredCache(store)
    at = _AtStep(7, lambda: CHANGES[change][0](model, cache))  # the prompt is put first
    assert torch.equal(model.generate(ids, past_key_values=cache, streamer=at, **settings), expected)
    assert at.left == 0
    if change == "close":
        assert "closed" in cache.last_turn.miss_reason
        cache = TieredCache(store)
    longer = torch.cat([expected, prompt(3, seed=1)], 1)
    found = model.generate(longer, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, model.generate(longer, max_new_tokens=5, do_sample=False))


def test_deleting_layers_raises_and_changes_nothing(build, store):
    """The error comes at once."""
    model, ids = build("llama"), prompt(20)
    with TieredCache(store) as cache:
        found = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        with pytest.raises(ConfigurationError, match="cannot be deleted"):
            del cache.layers
        assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False), found)
        assert cache.last_turn.cached_by_tier["device"] == 19


def test_crop_by_assisted_decoding_is_allowed(build, store):
    """Assisted decoding takes draft tokens back."""
    model, ids = build("llama"), prompt(20)
    with TieredCache(store) as cache:
        settings = {"max_new_tokens": 8, "do_sample": False, "prompt_lookup_num_tokens": 3}
        found = model.generate(torch.cat([ids, ids], 1), past_key_values=cache, **settings)
        assert torch.equal(found, model.generate(torch.cat([ids, ids], 1), **settings))


@pytest.mark.sample(8)  # of 15
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, TieredCache.fork])
@pytest.mark.parametrize("name", KINDS)
def test_copy_and_deepcopy_continue_like_a_fork(build, store, name, duplicate):
    model, settings = build(name), {"max_new_tokens": 4, "do_sample": False}
    with TieredCache(store) as cache:
        ids = model.generate(prompt(20), past_key_values=cache, **settings)
        with duplicate(cache) as twin:
            assert type(twin) is TieredCache
            for seed, used in enumerate([cache, twin, cache, twin]):
                longer = torch.cat([ids, prompt(3 + seed, seed)], 1)
                found = model.generate(longer, past_key_values=used, **settings)
                assert torch.equal(found, model.generate(longer, **settings))
                if name != "mamba2":
                    assert used.last_turn.cached_by_tier["device"] >= 20


def test_fork_detaches_states_from_the_autograd_graph(build, store):
    """A custom loop forgot ``no_grad``."""
    model, ids = build("qwen3_next"), prompt(20)
    with TieredCache(store) as cache:
        cache.begin(model, ids)
        model(ids, **given(model, cache))
        with cache.fork() as twin:
            states = [s for layer in twin.turns.layers.states.values() for s in layer.recurrent_states.values()]
            assert states
            assert not any(state.requires_grad for state in states)


def test_pickling_a_cache_raises_type_error(cache):
    with pytest.raises(TypeError, match=r"TieredCache\(folder\)"):
        pickle.dumps(cache)
