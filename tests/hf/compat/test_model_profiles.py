"""The table of model profiles, and its effect on a turn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from kvtier import PrefixStore, TieredCache
from kvtier.hf.compat import model_profiles, names
from kvtier.hf.compat.model_profiles import PROFILES, profile_of, why_no_cache, why_not_so, why_off


class Model:
    """A model of a given type, with a given forward signature."""

    def __init__(self, model_type, forward=lambda input_ids, position_ids, past_key_values, cache: None, **config):
        self.config = SimpleNamespace(model_type=model_type, **config)
        self.config.get_text_config = lambda decoder: self.config
        self.forward = forward


@pytest.fixture
def installed(monkeypatch):
    """``installed(5, 17)`` pretends that transformers 5.17 is installed."""

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
def test_model_is_off_before_the_version_that_fixes_it(installed, model_type, first_right):
    model = Model(model_type)
    installed(first_right[0], first_right[1] - 1)
    assert f"before {first_right[0]}.{first_right[1]}" in why_off(model)
    installed(*first_right)
    assert why_off(model) is None


def test_position_ids_left_on_the_cache_by_a_model_are_deleted(make_model, generate, tokens, cache):
    """In a turn that starts from nothing, a model that continues from them would count the old prompt, too."""
    model = make_model("llama")
    model.config.model_type = "qwen4_exp_text"
    cache.position_ids, cache.mine = torch.arange(9), "kept"
    generate(model, tokens(20), cache)
    assert not hasattr(cache, "position_ids")
    assert cache.mine == "kept"


@pytest.mark.parametrize("model_type", ["cpmant", "flaubert", "prophetnet", "recurrent_gemma", "xlm"])
def test_model_that_is_wrong_in_every_version_is_off(installed, model_type):
    for version in ((5, 17), (5, 99)):
        installed(*version)
        assert why_off(Model(model_type)) == PROFILES[model_type].off


@pytest.mark.parametrize(("model_type", "value"), [("moshi", "sliding_window"), ("doge", "keep_window_size")])
def test_windowed_models_are_reused_only_within_their_window(model_type, value):
    model = Model(model_type, **{value: 100})
    assert why_not_so(model, 60, False, 40) is None
    for columns, answer in ((61, 40), (60, 41), (60, 0), (101, 1)):
        assert "beyond 100 tokens" in why_not_so(model, columns, False, answer)


def test_models_outside_the_table_get_the_default_profile():
    assert profile_of(Model("llama")) == profile_of(SimpleNamespace()) == model_profiles.ModelProfile()
    assert why_off(Model("llama")) is None


def test_argument_named_cache_is_ignored_in_older_transformers(monkeypatch):
    """XLM had an argument named ``cache`` long before transformers passed caches by this name."""
    old = Model("xlm", forward=lambda input_ids, cache: None)
    monkeypatch.setattr(names, "CACHE_ARGUMENT", "past_key_values")
    assert names.forward_argument(old) is None
    assert "takes no cache" in why_no_cache(old)
    monkeypatch.setattr(names, "CACHE_ARGUMENT", "cache")
    assert names.forward_argument(old) == "cache"


def test_prepare_cache_for_generation_accepts_keyword_arguments(model: LlamaForCausalLM):
    """MusicGen's own generate() passes keywords."""
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
