"""Custom, assisted and beam decoding, which may take tokens back, keep only tokens that were seen to be fed."""

from __future__ import annotations

import pytest
import torch

from kvtier import BusyError, TieredCache
from tests.support.upstream import CACHE

pytestmark = pytest.mark.sample(2)


@pytest.fixture
def used(model, generate, tokens, cache):
    """A cache that holds a turn of 30 + 8 tokens, and a prompt that continues it by 6."""
    sequences = generate(model, tokens(30), cache).sequences
    return cache, torch.cat([sequences, tokens(6, seed=1)], 1)


@pytest.fixture
def same(model, generate):
    """``same(cache, ids, **settings)``: the sequences of a turn, compared with a fresh ``DynamicCache``."""

    def run(cache, ids, **settings):
        torch.manual_seed(5)
        expected = generate(model, ids, **settings)
        torch.manual_seed(5)
        found = generate(model, ids, cache, **settings)
        expected, found = (out if torch.is_tensor(out) else out.sequences for out in (expected, found))
        assert torch.equal(found, expected)
        return found

    return run


def plain(model, input_ids, generation_config=None, **model_kwargs):
    """Greedy decoding in a few lines, as a user would write it."""
    while input_ids.shape[1] < generation_config.max_length:
        past = model_kwargs[CACHE].get_seq_length()
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=input_ids.shape[1] - past, **model_kwargs
        )
        outputs = model(**inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        input_ids = torch.cat([input_ids, outputs.logits[:, -1].argmax(-1, keepdim=True)], 1)
    return input_ids


def contrastive(model, input_ids, generation_config=None, candidates=3, alpha=0.6, **model_kwargs):
    """Contrastive search: of a few likely tokens, take the least similar to earlier text. Looks at the whole prompt."""
    cache, mask = model_kwargs[CACHE], model_kwargs.get("attention_mask")

    def call(ids):
        nonlocal mask
        begin = cache.get_seq_length()
        positions = torch.arange(begin, begin + ids.shape[1])[None].expand_as(ids)
        if mask is not None:
            assert bool(mask.all()), "rows are not padded here"
        return model(ids, **{CACHE: cache}, position_ids=positions, output_hidden_states=True)

    outputs = call(input_ids)
    said = outputs.hidden_states[-1]
    while input_ids.shape[1] < generation_config.max_length:
        chances, tokens = outputs.logits[:, -1].softmax(-1).topk(candidates)
        cache.batch_repeat_interleave(candidates)
        outputs = call(tokens.reshape(-1, 1))
        states = outputs.hidden_states[-1].view(len(input_ids), candidates, -1)
        alike = torch.cosine_similarity(states[:, :, None], said[:, None], dim=-1).max(-1).values
        best = ((1 - alpha) * chances - alpha * alike).argmax(-1)
        chosen = best + torch.arange(len(input_ids)) * candidates
        cache.batch_select_indices(chosen)
        outputs.logits = outputs.logits[chosen]
        row = torch.arange(len(input_ids))
        said = torch.cat([said, states[row, best][:, None]], 1)
        input_ids = torch.cat([input_ids, tokens[row, best][:, None]], 1)
    return input_ids


def keeping_no_place(model, input_ids, **model_kwargs):
    """Feed only the last eight tokens, at the first positions."""
    model(input_ids[:, -8:], **{CACHE: model_kwargs[CACHE]})
    return input_ids


def at_other_positions(model, input_ids, **model_kwargs):
    positions = torch.arange(7, 7 + input_ids.shape[1])[None]
    model(input_ids, **{CACHE: model_kwargs[CACHE]}, position_ids=positions)
    return input_ids


def blind_to_some(model, input_ids, **model_kwargs):
    mask = torch.ones_like(input_ids)
    mask[:, 3] = 0
    model(input_ids, **{CACHE: model_kwargs[CACHE]}, attention_mask=mask)
    return input_ids


def with_vectors(model, input_ids, **model_kwargs):
    vectors = model.get_input_embeddings()(input_ids) * 1.5
    model(inputs_embeds=vectors, **{CACHE: model_kwargs[CACHE]})
    return input_ids


def with_a_part_of_the_model(model, input_ids, **model_kwargs):
    model.model(input_ids.flip(1), **{CACHE: model_kwargs[CACHE]})
    return input_ids


def with_k_and_v_of_its_own(model, input_ids, **model_kwargs):
    cache = model_kwargs[CACHE]
    model(input_ids, **{CACHE: cache})
    cache.crop(-1)
    for index, layer in enumerate(cache.layers):
        cache.update(layer.keys[:, :, :1] * 2, layer.values[:, :, :1] * 2, index)
    return input_ids


def with_nothing(model, input_ids, **model_kwargs):
    return input_ids


UNKNOWN = [at_other_positions, blind_to_some, with_vectors, with_a_part_of_the_model, with_k_and_v_of_its_own]


def test_custom_generate_loop_starts_cold_and_its_tokens_are_kept(used, same, tokens, store):
    cache, ids = used
    found = same(cache, ids, custom_generate=plain)
    assert cache.last_turn.cached_tokens == 0
    assert "custom generate" in cache.last_turn.miss_reason
    assert cache.last_turn.generated_tokens == 8
    longer = torch.cat([found, tokens(3, seed=2)], 1)
    with TieredCache(store) as restored:
        same(restored, longer)
        assert restored.last_turn.cached_by_tier["host"] == found.shape[1] - 1
    same(cache, longer)
    assert cache.last_turn.cached_by_tier["device"] == found.shape[1] - 1


def test_custom_generate_loop_keeps_each_row_of_a_padded_batch(used, same, tokens):
    cache, _ = used
    ids = tokens(20, rows=3, seed=4)
    ids[1, :6], ids[2, :13] = 0, 0
    found = same(cache, ids, custom_generate=plain)
    same(cache, found)
    assert [row.cached_tokens for row in cache.last_turn.rows] == [27, 21, 14]


@pytest.mark.parametrize("rows", [1, 2])
def test_contrastive_search_starts_cold_and_its_tokens_are_kept(used, same, tokens, rows):
    """The loop needs hidden states of the whole prompt, repeats rows, feeds candidates and drops all except one."""
    cache, ids = used
    ids = torch.cat([ids, tokens(ids.shape[1], seed=8)])[:rows]
    settings = {"custom_generate": contrastive, "candidates": 3}
    for _ in range(2):
        found = same(cache, ids, **settings)
        assert cache.last_turn.cached_tokens == 0
    longer = torch.cat([found, tokens(3, rows=rows, seed=2)], 1)
    same(cache, longer)
    assert cache.last_turn.cached_by_tier["device"] == rows * found.shape[1]  # the last token was fed as a candidate


@pytest.mark.parametrize("function", UNKNOWN, ids=lambda function: function.__name__)
def test_tokens_fed_in_an_unknown_way_are_not_kept(function, model, cache, same, tokens):
    ids = tokens(20, seed=6)
    model.generate(ids, past_key_values=cache, custom_generate=function, max_new_tokens=4)
    assert cache.last_turn.cached_tokens == 0
    same(cache, torch.cat([ids, tokens(3, seed=7)], 1))
    assert cache.last_turn.cached_tokens == 0
    same(cache, torch.cat([ids.flip(1), tokens(3, seed=7)], 1))
    assert cache.last_turn.cached_tokens == 0


def test_custom_generate_keeps_the_tokens_it_fed_instead_of_the_prompt(model, cache, same, tokens):
    ids = tokens(20, seed=6)
    model.generate(ids, past_key_values=cache, custom_generate=keeping_no_place, max_new_tokens=4)
    same(cache, torch.cat([ids[:, -8:], tokens(3, seed=7)], 1))
    assert cache.last_turn.cached_tokens == 8
    same(cache, torch.cat([ids, tokens(3, seed=7)], 1))
    assert cache.last_turn.cached_tokens == 0


def test_custom_generate_that_feeds_nothing_keeps_nothing(model, cache, same, tokens):
    ids = tokens(20, seed=6)
    model.generate(ids, past_key_values=cache, custom_generate=with_nothing, max_new_tokens=4)
    same(cache, ids)
    assert cache.last_turn.cached_tokens == 0


def test_failing_custom_generate_leaves_a_working_cache_and_no_hooks(model, used, same):
    cache, ids = used

    def failing(model, input_ids, **model_kwargs):
        model(input_ids, **{CACHE: model_kwargs[CACHE]})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.generate(ids, past_key_values=cache, custom_generate=failing, max_new_tokens=4)
    same(cache, ids)
    assert cache.last_turn.cached_tokens == ids.shape[1] - 1
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


# --- decoding modes of transformers that take tokens back, or move rows -----------------------------------------------


@pytest.mark.parametrize("how", ["prompt-lookup", "assistant"])
def test_assisted_decoding_starts_cold_and_its_tokens_are_kept(how, model, make_model, used, same, tokens, store):
    cache, ids = used
    ids = torch.cat([ids, ids[:, :12]], 1)  # something to look up
    assistant = make_model("llama", num_hidden_layers=1)
    settings = {"prompt_lookup_num_tokens": 3} if how == "prompt-lookup" else {"assistant_model": assistant}
    found = same(cache, ids, **settings)
    assert cache.last_turn.cached_tokens == 0
    reference = model(found[:, :-1])
    for layer, (k, v) in zip(cache.layers, _states(getattr(reference, CACHE)), strict=True):
        assert torch.allclose(layer.keys, k, atol=1e-4)
        assert torch.allclose(layer.values, v, atol=1e-4)
    longer = torch.cat([found, tokens(3, seed=2)], 1)
    with TieredCache(store) as restored:
        same(restored, longer)
        assert restored.last_turn.cached_by_tier["host"] == found.shape[1] - 1
    same(cache, longer)
    assert cache.last_turn.cached_by_tier["device"] == found.shape[1] - 1


def _states(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


def test_transformers_still_fails_at_assisted_decoding_on_a_known_prefix(make_model, tokens):
    """The reason that assisted turns start cold. If this test fails, transformers is fixed and they may start warm."""
    from transformers import DynamicCache

    model = make_model("llama", dtype=torch.float64)
    settings = {"max_new_tokens": 8, "do_sample": False, "prompt_lookup_num_tokens": 3}
    wrong = 0
    for seed in range(6):
        ids = tokens(30, seed=seed)
        ids = torch.cat([ids, ids[:, :12]], 1)
        known = DynamicCache(config=model.config)
        model(ids[:, :20], **{CACHE: known})
        expected = model.generate(ids, **settings)
        try:
            wrong += not torch.equal(model.generate(ids, **{CACHE: known}, **settings), expected)
        except (RuntimeError, ValueError):
            wrong += 1
    assert wrong


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 3, "do_sample": True}], ids=["beams", "sampled"])
def test_beam_search_reuses_the_prefix_and_its_answer_is_kept(settings, used, same, tokens):
    cache, ids = used
    found = same(cache, ids, **settings)
    assert cache.last_turn.cached_tokens == 37
    longer = torch.cat([found, tokens(3, seed=2)], 1)
    same(cache, longer)
    assert cache.last_turn.cached_tokens >= ids.shape[1] + 4


def test_crop_at_the_end_of_a_turn_loses_only_the_cropped_token(model, used, same, tokens):
    """On some devices the host runs one step ahead, and then undoes that step."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    cache, ids = used

    class Undo(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            ends = input_ids.shape[1] >= ids.shape[1] + 5
            cache.crop(-1 if ends else 0)
            return torch.full((1,), ends)

    expected = model.generate(ids, max_new_tokens=5, do_sample=False, suppress_tokens=[0])
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [0]}
    found = model.generate(ids, past_key_values=cache, stopping_criteria=StoppingCriteriaList([Undo()]), **settings)
    assert torch.equal(found, expected)
    same(cache, torch.cat([found, tokens(3, seed=2)], 1))
    assert cache.last_turn.cached_by_tier["device"] == found.shape[1] - 2
    assert cache.last_turn.cached_tokens == found.shape[1] - 2


def test_crop_in_the_middle_of_generate_raises_and_keeps_only_the_prompt(model, used, same, tokens):
    from transformers import StoppingCriteria, StoppingCriteriaList

    cache, ids = used

    class TakeBack(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == ids.shape[1] + 4:
                cache.crop(-2)
            return torch.zeros(1, dtype=torch.bool)

    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [0]}
    with pytest.raises(BusyError, match="changed inside generate"):
        model.generate(ids, past_key_values=cache, stopping_criteria=StoppingCriteriaList([TakeBack()]), **settings)
    same(cache, torch.cat([ids, tokens(3, seed=2)], 1))
    assert cache.last_turn.cached_tokens == ids.shape[1]
