"""A generate() that kvtier does not see never takes cached tokens for the start of its prompt."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, LogitsProcessor, LogitsProcessorList

import kvtier
from kvtier import PrefixStore, PromptError, TieredCache
from kvtier.errors import UnannouncedError
from kvtier.hf.compat.model_profiles import why_off
from kvtier.hf.compat.names import PREPARE_CACHE
from kvtier.hf.turn.exclusive_use import running_generate
from tests.support.reuse import reuse_off
from tests.support.upstream import CACHE, given

SETTINGS = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [0]}


@pytest.fixture
def taken(model):
    """``generate``, bound by a script before it makes its cache."""
    kvtier.uninstall()
    yield functools.partial(model.generate, **SETTINGS)
    with TieredCache(PrefixStore()):
        pass


@pytest.fixture
def renamed(monkeypatch):
    """A transformers that renamed the method by which kvtier notices such calls."""
    kvtier.uninstall()
    original = getattr(GenerationMixin, PREPARE_CACHE)
    monkeypatch.setattr("kvtier.hf.generate.hook.PREPARE_CACHE", "_called_otherwise")
    monkeypatch.setattr(GenerationMixin, PREPARE_CACHE, original)
    yield
    kvtier.uninstall()


@pytest.fixture(params=["llama", "mamba2", "falcon_h1", "gemma3"])
def any_model(request, make_model):
    return make_model(request.param)


@reuse_off
def test_generate_bound_before_the_cache_was_made_starts_cold(taken, model, store, tokens):
    with TieredCache(store) as cache:
        for seed in range(3):
            ids = tokens(20, seed=seed)
            assert torch.equal(taken(ids, **{CACHE: cache}), model.generate(ids, **SETTINGS))
            assert "taken from the model before" in cache.last_turn.miss_reason
        assert store.stats().tiers[0].blocks == 0
        model.generate(ids, past_key_values=cache, **SETTINGS)
        longer = torch.cat([ids, tokens(3, seed=7)], 1)
        model.generate(longer, past_key_values=cache, **SETTINGS)
        assert cache.last_turn.cached_tokens == 20


def test_unseen_generate_inside_a_seen_one_does_not_end_its_turn(taken, model, store, tokens):
    """The unseen call has its own cache."""

    class Asking(LogitsProcessor):
        def __call__(self, input_ids, scores):
            taken(input_ids, **{CACHE: DynamicCache(config=model.config)})
            return scores

    with TieredCache(store) as cache:
        for known in (0, 24):
            ids = tokens(25)
            asking = LogitsProcessorList([Asking()])
            found = model.generate(ids, past_key_values=cache, logits_processor=asking, **SETTINGS)
            assert torch.equal(found, model.generate(ids, **SETTINGS))
            assert cache.last_turn.cached_tokens == known


def test_generate_that_cannot_be_hooked_raises_on_a_filled_cache(renamed, any_model, tokens):
    """The first call finds the cache empty and is right. The next call would be answered from stale tokens."""
    taken = functools.partial(any_model.generate, **SETTINGS)
    with PrefixStore(block_size=8) as store, TieredCache(store, config=any_model.config) as cache:
        ids = tokens(20)
        name = next(iter(given(any_model, cache)))
        assert torch.equal(taken(ids, **{name: cache}), any_model.generate(ids, **SETTINGS))
        for other in (tokens(20, seed=1), tokens(26), ids):
            with pytest.raises(UnannouncedError, match=r"did not see.*holds \d+ tokens.*begin\(model, input_ids\)"):
                taken(other, **{name: cache})
        cache.reset()
        assert torch.equal(taken(other, **{name: cache}), any_model.generate(other, **SETTINGS))
        found = any_model.generate(ids, past_key_values=cache, **SETTINGS)
        assert torch.equal(found, any_model.generate(ids, **SETTINGS))
        with pytest.raises(PromptError, match="did not see"):
            taken(tokens(30, seed=2), **{name: cache})
        assert torch.equal(any_model.generate(ids, past_key_values=cache, **SETTINGS), found)


def test_custom_loop_inside_another_generate_must_announce_its_tokens(model, store, tokens):
    """Feeding a cache from inside a generate() looks like a generate() that kvtier did not see."""

    class Scoring(LogitsProcessor):
        def __init__(self, cache, announce):
            self.cache, self.announce = cache, announce

        def __call__(self, input_ids, scores):
            if self.announce:
                known = self.cache.begin(model, input_ids).cached_tokens
            else:
                known = self.cache.get_seq_length()
            model(input_ids[:, known:], **given(model, self.cache))
            if self.announce:
                self.cache.commit(input_ids)
            return scores

    ids = tokens(12)
    with TieredCache(store) as cache:
        model.generate(ids, logits_processor=LogitsProcessorList([Scoring(cache, True)]), **SETTINGS)
        assert cache.last_turn.cached_tokens == 15
    with TieredCache(store) as cache:
        model.generate(ids, logits_processor=LogitsProcessorList([Scoring(cache, False)]), **SETTINGS)
        with pytest.raises(UnannouncedError):
            model.generate(tokens(30), logits_processor=LogitsProcessorList([Scoring(cache, False)]), **SETTINGS)


def test_loop_outside_generate_may_feed_a_cache_without_a_turn(any_model, store, tokens):
    with TieredCache(store, config=any_model.config) as cache:
        ids = tokens(12)
        with torch.no_grad():
            any_model(ids[:, :8], use_cache=True, **given(any_model, cache))
            if why_off(any_model) is None:  # otherwise the tokens of states alone are not counted
                assert cache.get_seq_length() == 8
        assert running_generate() is None


def test_running_generate_returns_only_the_frame_of_a_models_call(model, tokens):
    seen = []

    class Looking(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(running_generate())
            return scores

    def generate(nothing):
        """A function of that name that belongs to no model."""
        return running_generate()

    model.generate(tokens(5), logits_processor=LogitsProcessorList([Looking()]), **SETTINGS)
    assert len(seen) == 5
    assert all(frame is seen[0] for frame in seen)
    assert seen[0].f_locals["self"] is model
    assert generate(1) is None


def test_seen_generate_leaves_no_frame_on_the_cache(model, cache, tokens):
    model.generate(tokens(12), past_key_values=cache, **SETTINGS)
    assert cache.turns._unseen_generate is None


@pytest.mark.sample(2, of="new processes")
def test_cache_made_in_the_arguments_of_the_first_call_keeps_its_prompt(tmp_path):
    """Python looks ``generate`` up on the model before it makes the cache."""
    script = f"""
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from kvtier import TieredCache

torch.manual_seed(0)
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).eval()
ids = torch.arange(1, 31)[None]
model.generate(ids, past_key_values=TieredCache({str(tmp_path / "kv")!r}), max_new_tokens=3, do_sample=False)
cache = TieredCache({str(tmp_path / "kv")!r})
model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
print(cache.last_turn.cached_tokens)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 16, run.stderr
