"""How ``generate()`` treats a cache: the behaviours that kvtier relies on, each with the kvtier file that does."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import transformers
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    MambaConfig,
    MambaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from kvtier.hf.compat.names import CHUNKS_CONTINUE, forward_argument
from kvtier.hf.generate.request import _infer_mask
from kvtier.hf.inputs.request import DROPPED
from tests.support.upstream import CACHE


def relied_on(where):
    """The message of a failing test."""
    return f"transformers {transformers.__version__} does this in another way; kvtier/{where} relies on it"


class Watched(DynamicCache):
    """A cache that records its updates and reorders."""

    def __init__(self, config):
        super().__init__(config=config)
        self.updates, self.reorders = [], []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.updates.append((layer_idx, tuple(key_states.shape)))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reorder_cache(self, beam_idx):
        self.reorders.append(beam_idx.tolist())
        super().reorder_cache(beam_idx)


@pytest.fixture
def fed(model):
    """The arguments of each forward pass so far."""
    calls, forward = [], model.forward

    def watching(*args, **kwargs):
        assert not args
        calls.append(dict(kwargs))
        return forward(**kwargs)

    model.forward = watching
    watching.__signature__ = inspect.signature(forward)
    return calls


def columns(fed):
    return [call["input_ids"].shape[1] for call in fed]


GREEDY = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [0]}


@pytest.mark.parametrize("known", [0, 1, 9])
def test_generate_feeds_only_the_tokens_after_the_cached_prefix(model, tokens, fed, known):
    where = relied_on("hf/generate/run.py")
    ids, cache = tokens(10), Watched(model.config)
    if known:
        model(input_ids=ids[:, :known], **{CACHE: cache})
    fed.clear()
    cache.updates.clear()
    found = model.generate(ids, **{CACHE: cache}, **GREEDY)
    assert columns(fed) == [10 - known, 1, 1, 1], where
    assert fed[0][CACHE] is cache, where
    assert torch.equal(fed[0]["input_ids"], ids[:, known:]), where
    assert torch.equal(fed[0]["position_ids"], torch.arange(known, 10)[None]), where
    assert [layer for layer, _ in cache.updates] == [0, 1, 2] * 4, relied_on("hf/layers/container.py")
    assert {shape[:2] + shape[3:] for _, shape in cache.updates} == {(1, 2, 16)}, relied_on("hf/layers/attention.py")
    assert cache.get_seq_length() == found.shape[1] - 1, relied_on("hf/cache.py")  # the last token was not fed
    assert torch.equal(found[:, :10], ids), relied_on("hf/turn/turn.py")


def test_generate_feeds_padded_rows_only_the_tokens_after_the_cache(model, tokens, fed):
    ids, cache = tokens(10, rows=2), DynamicCache(config=model.config)
    ids[1, :4] = 0
    mask = (ids != 0).long()
    model(input_ids=ids[:, :7], attention_mask=mask[:, :7], **{CACHE: cache})
    fed.clear()
    model.generate(ids, attention_mask=mask, **{CACHE: cache}, **GREEDY)
    assert columns(fed) == [3, 1, 1, 1], relied_on("hf/generate/run.py")
    assert torch.equal(fed[0]["attention_mask"], mask), relied_on("hf/generate/run.py")


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_hooks_see_every_forward_pass_with_keyword_arguments_only(model, tokens, settings):
    seen = []
    model.register_forward_pre_hook(lambda model, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    cache = DynamicCache(config=model.config)
    model.generate(tokens(10), **{CACHE: cache}, **{**GREEDY, **settings})
    assert len(seen) >= 2, relied_on("hf/turn/token_trace.py: watching")
    assert all(not args and kwargs[CACHE] is cache for args, kwargs in seen), relied_on(
        "hf/turn/token_trace.py: watching"
    )


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_stopping_criteria_run_once_between_two_forward_passes(model, tokens, fed, settings):
    """The caller's criteria too: they run after all layers hold the prompt, and before the next token is fed."""
    seen = []

    class Notes(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append((len(fed), input_ids.shape[1]))
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    found = model.generate(tokens(10), stopping_criteria=StoppingCriteriaList([Notes()]), **{**GREEDY, **settings})
    assert found.shape[1] == 14
    assert seen[:2] == [(1, 11), (2, 12)], relied_on("hf/generate/prefill.py: PrefillDone")


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 3}], ids=str
)
def test_generate_places_expanded_rows_next_to_each_other(model, tokens, fed, settings):
    ids, repeats, cache = tokens(10, rows=2), 3, Watched(model.config)
    settings = {**GREEDY, "do_sample": "num_beams" not in settings, **settings}
    found = model.generate(ids, **{CACHE: cache}, **settings)
    where = relied_on("hf/turn/turn.py")
    assert torch.equal(fed[0]["input_ids"], ids.repeat_interleave(repeats, 0)), where
    assert torch.equal(found[:, :10], ids.repeat_interleave(settings["num_return_sequences"], 0)), where
    if "num_beams" in settings:
        assert cache.reorders, relied_on("hf/layers/container.py")
        assert all(len(rows) == 6 for rows in cache.reorders), relied_on("hf/layers/container.py")


def test_generate_returns_the_callers_cache(model, tokens):
    cache = DynamicCache(config=model.config)
    found = model.generate(tokens(10), **{CACHE: cache}, return_dict_in_generate=True, **GREEDY)
    assert getattr(found, CACHE) is cache, relied_on("hf/generate/run.py")
    assert found.sequences.shape == (1, 14), relied_on("hf/generate/run.py")


@pytest.mark.parametrize("eos", [None, 0, 5])
@pytest.mark.parametrize("pad", [None, 0, 5, 7])
def test_inferred_padding_mask_matches_the_mask_of_generate(model, tokens, fed, pad, eos):
    """``generate()`` infers a mask if the caller passes none. A turn must know that mask before the call."""
    ids = tokens(10, rows=2)
    ids[1, :4] = 7
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = pad, eos
    ours = _infer_mask(model, ids, {})
    model.generate(ids, do_sample=False, max_new_tokens=1, **({"pad_token_id": 0} if pad is None else {}))
    theirs = fed[0].get("attention_mask")
    theirs = None if theirs is None or theirs.all() else theirs  # older versions pass a mask of ones
    assert (ours is None) == (theirs is None), relied_on("hf/generate/request.py")
    if ours is not None:
        assert torch.equal(ours, theirs), relied_on("hf/generate/request.py")


def test_settings_of_the_call_override_its_config_and_the_models(model, tokens):
    ids = tokens(10)
    model.generation_config.max_new_tokens = 1
    config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    where = relied_on("hf/generate/request.py")
    assert model.generate(ids, do_sample=False).shape[1] == 11, where
    assert model.generate(ids, generation_config=config).shape[1] == 12, where
    assert model.generate(ids, generation_config=config, max_new_tokens=3).shape[1] == 13, where


def test_prefill_chunks_continue_after_the_cache_in_versions_that_support_it(model, tokens, fed):
    ids, cache = tokens(10), DynamicCache(config=model.config)
    model(input_ids=ids[:, :4], **{CACHE: cache})
    fed.clear()
    model.generate(ids, **{CACHE: cache}, prefill_chunk_size=4, **GREEDY)
    assert (columns(fed)[:2] == [4, 2]) == CHUNKS_CONTINUE, relied_on("hf/compat/names.py")


@pytest.mark.parametrize("name", sorted(DROPPED))
def test_dropped_arguments_do_not_reach_the_forward_pass(model, tokens, name):
    ids = tokens(10)
    prepared = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **{name: 10, "position_ids": None})
    assert "input_ids" in prepared
    assert name not in prepared, relied_on("hf/inputs/request.py: DROPPED")


def test_generate_drops_no_other_arguments():
    """kvtier must know any further argument that ``prepare_inputs_for_generation`` withholds."""
    source = inspect.getsource(GenerationMixin.prepare_inputs_for_generation)
    (listed,) = re.findall(r"kwargs_to_avoid_forwarding = \((.*?)\)", source)
    assert set(re.findall(r'"(\w+)"', listed)) == DROPPED, relied_on("hf/inputs/request.py: DROPPED")


def test_labels_and_their_count_leave_tokens_and_kv_unchanged(model, tokens, fed):
    ids, (bare, labelled) = tokens(10), (DynamicCache(config=model.config) for _ in range(2))
    expected = model.generate(ids, **{CACHE: bare}, **GREEDY)
    fed.clear()
    found = model.generate(ids, **{CACHE: labelled}, labels=ids, num_items_in_batch=torch.tensor(3), **GREEDY)
    assert torch.equal(found, expected)
    assert all("labels" not in call for call in fed), relied_on("hf/inputs/request.py: DROPPED")
    for ours, theirs in zip(labelled.layers, bare.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys), relied_on("hf/inputs/request.py")
        assert torch.equal(ours.values, theirs.values), relied_on("hf/inputs/request.py")


def test_streamer_receives_the_prompt_first(model, tokens):
    class Notes(BaseStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value.flatten().tolist())

        def end(self):
            self.seen.append("end")

    notes, ids = Notes(), tokens(10)
    found = model.generate(ids, streamer=notes, **GREEDY)[0].tolist()
    assert notes.seen == [ids[0].tolist(), *([t] for t in found[10:]), "end"], relied_on("hf/generate/run.py")


def test_mamba_prepares_its_inputs_with_the_cache_as_keyword(tokens):
    """kvtier wraps ``prepare_inputs_for_generation`` for models with linear attention only."""
    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0)
    model, seen = MambaForCausalLM(config).eval(), []
    prepare, name = type(model).prepare_inputs_for_generation, forward_argument(model)

    def watching(input_ids, *args, **kwargs):
        seen.append((args, name in kwargs, kwargs.get("is_first_iteration", False)))
        return prepare(model, input_ids, *args, **kwargs)

    model.prepare_inputs_for_generation = watching
    model.generate(tokens(5) % 49 + 1, **{name: DynamicCache(config=config)}, **GREEDY)
    assert seen[0] == ((), True, True), relied_on("hf/generate/prefill.py: patch_prepare_inputs")
