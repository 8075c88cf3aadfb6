"""The table of what is particular about models, and what follows from it for a turn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from kvtier import PrefixStore, TieredCache
from kvtier.hf.compat import model_profiles, names
from kvtier.hf.compat.model_profiles import PROFILES, profile_of, why_no_cache, why_not_so, why_off


class Model:
    """One of a kind, whose forward pass takes what is said."""

    def __init__(self, model_type, forward=lambda input_ids, position_ids, past_key_values, cache: None, **config):
        self.config = SimpleNamespace(model_type=model_type, **config)
        self.config.get_text_config = lambda decoder: self.config
        self.forward = forward


@pytest.fixture
def installed(monkeypatch):
    """``installed(5, 17)``: as if that version of transformers were there."""

    def pretend(*version):
        monkeypatch.setattr(model_profiles, "INSTALLED", version)

    return pretend


@pytest.mark.parametrize(
    ("model_type", "first_right"),
    [
        *((name, (5, 18)) for name in ("big_bird", "doge", "git", "megatron-bert", "rembert", "roformer")),
        *((name, (5, 21)) for name in ("qwen4_exp", "qwen4_exp_text")),
    ],
)
def test_what_a_version_gets_wrong_is_off_until_the_next(installed, model_type, first_right):
    model = Model(model_type)
    installed(first_right[0], first_right[1] - 1)
    assert f"before {first_right[0]}.{first_right[1]}" in why_off(model)
    installed(*first_right)
    assert why_off(model) is None


def test_notes_about_an_earlier_prompt_are_forgotten(make_model, generate, tokens, cache):
    """A model that goes on from them, in a turn that begins with nothing, would count the old prompt, too."""
    model = make_model("llama")
    model.config.model_type = "qwen4_exp_text"
    cache.position_ids, cache.mine = torch.arange(9), "kept"
    generate(model, tokens(20), cache)
    assert not hasattr(cache, "position_ids")
    assert cache.mine == "kept"


@pytest.mark.parametrize("model_type", ["cpmant", "flaubert", "prophetnet", "recurrent_gemma", "xlm"])
def test_what_every_version_gets_wrong_is_off(installed, model_type):
    for version in ((5, 17), (5, 99)):
        installed(*version)
        assert why_off(Model(model_type)) == PROFILES[model_type].off


@pytest.mark.parametrize(("model_type", "value"), [("moshi", "sliding_window"), ("doge", "keep_window_size")])
def test_some_are_right_within_so_many_tokens(model_type, value):
    model = Model(model_type, **{value: 100})
    assert why_not_so(model, 60, False, 40) is None
    for columns, answer in ((61, 40), (60, 41), (60, 0), (101, 1)):
        assert "beyond 100 tokens" in why_not_so(model, columns, False, answer)


def test_models_that_are_not_in_the_table_are_as_all_others():
    assert profile_of(Model("llama")) == profile_of(SimpleNamespace()) == model_profiles.ModelProfile()
    assert why_off(Model("llama")) is None


def test_before_its_time_cache_is_no_name_for_one(monkeypatch):
    """XLM had an argument of this name long before."""
    old = Model("xlm", forward=lambda input_ids, cache: None)
    monkeypatch.setattr(names, "CACHE_ARGUMENT", "past_key_values")
    assert names.forward_argument(old) is None
    assert "takes no cache" in why_no_cache(old)
    monkeypatch.setattr(names, "CACHE_ARGUMENT", "cache")
    assert names.forward_argument(old) == "cache"


def test_the_method_that_looks_at_a_cache_may_be_called_by_name(model: LlamaForCausalLM):
    """MusicGen's own generate() does."""
    with TieredCache(PrefixStore()):
        pass
    arguments = {"use_cache": True}
    model._prepare_cache_for_generation(
        generation_config=model.generation_config,
        model_kwargs=arguments,
        generation_mode=None,
        batch_size=1,
        max_cache_length=8,
    )
    assert isinstance(arguments[names.CACHE_ARGUMENT], DynamicCache)
