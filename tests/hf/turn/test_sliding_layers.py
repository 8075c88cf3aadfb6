"""Sliding layers hold, load and keep what their attention sees, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from kvtier import PrefixStore, PromptError, TieredCache
from kvtier.hf.identity.fingerprint import identify
from kvtier.hf.turn.cost import COSTS, Costs
from kvtier.kv.window import Window
from tests.support.tiny import FedAlike, answer, assert_same_answer, left_padded, tiny
from tests.support.upstream import CACHE

LAYERS, VISIBLE, PAGE = 3, 6, 4  # two of the layers slide
WORDS = tuple(1 + (7 * n + n // 3) % 5 for n in range(60))
SPARSE = Costs(window_spacing_tokens=16, window_spacing_windows=1, window_margin_tokens=0)


@pytest.fixture
def model():
    return tiny("gemma3", LAYERS)


@pytest.fixture
def store():
    with PrefixStore(block_size=PAGE) as store:
        yield store


def cache_of(store, costs=COSTS):
    cache = TieredCache(store)
    cache.turns.costs = costs
    return cache


def ask(model, words, cache, **settings):
    """The answer is that of a ``DynamicCache`` that was fed the same way, and that of none."""
    ids = left_padded([words])
    with FedAlike(cache) as alike:
        found = answer(model, ids, cache, **settings)
    fed_alike = alike.cache(cache.last_turn.cached_tokens, model)
    assert_same_answer(found, answer(model, ids, fed_alike, **settings), exact=True)
    assert_same_answer(found, answer(model, ids, **settings), exact=False)
    return tuple(found.sequences[0].tolist())


def held_columns(cache):
    return [layer.memory.k.shape[2] for layer in cache.layers if layer.is_sliding]


def test_buffers_keep_the_columns_of_a_window_and_a_few_more(model, store):
    most = Window(VISIBLE, PAGE).most_columns
    with cache_of(store) as cache:
        ended = ask(model, WORDS[:40], cache, max_new_tokens=30)
        assert max(held_columns(cache)) <= most
        for new in (1, 5, 20):
            ended = ask(model, ended + WORDS[:3], cache, max_new_tokens=new)
            assert max(held_columns(cache)) <= most
            assert cache.last_turn.cached_by_tier["device"] >= len(ended) - new - 4


def test_prefill_makes_a_long_buffer_that_ends_with_the_next_token(model, store):
    with cache_of(store) as cache, torch.no_grad():
        cache.begin(model, left_padded([WORDS]))
        logits = model(left_padded([WORDS]), **{CACHE: cache}).logits
        assert held_columns(cache) == [len(WORDS)] * 2
        model(logits[:, -1:].argmax(-1), **{CACHE: cache})
        assert max(held_columns(cache)) <= Window(VISIBLE, PAGE).most_columns


def test_a_load_brings_only_the_last_columns_of_sliding_layers(model, store):
    with cache_of(store) as cache:
        ask(model, WORDS, cache)
    with cache_of(store) as other:
        ask(model, WORDS, other)
        full, *sliding = (layer.memory.spec.token_bytes for layer in reversed(other.layers))
        known = len(WORDS) - 1
        visible = known - Window(VISIBLE, PAGE).first_token(known)
        assert visible == VISIBLE - 1
        assert other.last_turn.restored_bytes == known * full + visible * sum(sliding)


def test_nothing_is_left_of_an_earlier_conversation_between_held_and_loaded_columns(model, store):
    """The prompt shares its first words with the held one. The store has the last words before its end."""
    longer = WORDS[:3] + WORDS[20:27]
    with cache_of(store) as cache:
        ask(model, longer, cache)
    with cache_of(store) as cache:
        ask(model, WORDS[:9], cache)
        ask(model, longer, cache)
        assert cache.last_turn.cached_tokens == len(longer) - 1
        ask(model, (*longer[:6], 1 + longer[6] % 5, 1), cache)


def test_padding_before_a_restored_row_is_there_for_attention(model, store):
    """The window begins in the padding: the row has fewer tokens than a window."""
    with cache_of(store) as cache:
        ask(model, WORDS[:5], cache)
    padded = left_padded([WORDS[:5]], extra=2)
    with cache_of(store) as cache:
        found = answer(model, padded, cache)
        assert cache.last_turn.cached_tokens == 4
        assert_same_answer(found, answer(model, padded), exact=False)


def test_blocks_with_the_pages_of_all_layers_have_another_root(model, store):
    """Those of earlier versions, which would not fit."""
    with cache_of(store) as cache:
        ask(model, WORDS[:9], cache)
        root, tokens = cache.turns.kept_row(0)
    assert identify(model, "", PAGE, tokens, has_windows=True).root == root
    assert identify(model, "", PAGE, tokens).root != root


def test_an_edit_goes_on_at_the_nearest_place_that_was_kept_and_the_report_says_so(model, store):
    with cache_of(store, SPARSE) as cache:
        ask(model, WORDS, cache)
    variants = [(*WORDS[:38], 1 + (WORDS[38] + n) % 5, *WORDS[39:]) for n in range(4)]
    edited, *others = variants
    with cache_of(store, SPARSE) as cache:
        ask(model, edited, cache)
        report = cache.last_turn
        assert report.cached_tokens == 32  # the spacing is 16: blocks before 32 and 48 are kept, [24, 32) and [40, 48)
        assert report.known_tokens == 38
        assert "the last of them at column 32: 6 known columns after it are computed again" in report.miss_reason
    branching = replace(SPARSE, checkpoint_worth_tokens=4)
    for words, expected in zip(others, (32, 38, 38), strict=True):  # from the second on, prompts have branched there
        with cache_of(store, branching) as cache:
            ask(model, words, cache)
            assert cache.last_turn.cached_tokens == expected


def test_few_windows_take_fewer_bytes_in_the_store(model):
    """Of a prompt of 60 words, sliding layers keep about a window before every place."""
    nbytes = {}
    for name, costs in (("all", COSTS), ("few", SPARSE)):
        with PrefixStore(block_size=PAGE) as store, cache_of(store, costs) as cache:
            ask(model, WORDS, cache)
            nbytes[name] = store.stats().tiers[0].nbytes
            full, *sliding = (layer.memory.spec.token_bytes for layer in reversed(cache.layers))
    assert nbytes["few"] < nbytes["all"]
    kept = (nbytes["few"] - 62 * full) // sum(sliding)
    assert kept <= 4 * (VISIBLE + 2 * PAGE) + PAGE


@pytest.mark.parametrize(
    "mode", [{"num_beams": 3}, {"do_sample": True, "top_k": 0, "num_return_sequences": 3}], ids=str
)
def test_beams_and_samples_longer_than_the_window_go_on_from_the_store(model, store, mode):
    ids = left_padded([WORDS[:30]])
    with cache_of(store) as cache:
        found = answer(model, ids, cache, max_new_tokens=25, **mode)
        assert_same_answer(found, answer(model, ids, max_new_tokens=25, **mode), exact=True)
    for sequence in found.sequences.tolist():
        with cache_of(store) as cache:
            ask(model, (*sequence, 2, 4), cache)
            beams = "num_beams" in mode
            assert cache.last_turn.cached_tokens >= (29 if beams else len(sequence) - 1)


def test_rows_of_a_batch_end_and_go_on_apart(model, store):
    rows = [WORDS[:30], WORDS[5:22], WORDS[3:48]]
    ids = left_padded(rows)
    with cache_of(store) as cache:
        found = answer(model, ids, cache, max_new_tokens=20)
        assert_same_answer(found, answer(model, ids, max_new_tokens=20), exact=True)
        longer = torch.cat([found.sequences, torch.tensor([[3, 1]] * 3)], 1)
        again = answer(model, longer, cache)
        assert cache.last_turn.cached_tokens == sum(map(len, rows)) + 3 * 19
        assert_same_answer(again, answer(model, longer), exact=False)
    for row, sequence in zip(rows, found.sequences.tolist(), strict=True):
        with cache_of(store) as cache:
            ask(model, (*sequence[-len(row) - 20 :], 2), cache)
            assert cache.last_turn.cached_tokens == len(row) + 20


def test_a_loop_that_goes_on_after_a_crop_out_of_reach_is_told_what_to_do(model, store):
    ids = left_padded([WORDS])
    with cache_of(store) as cache, torch.no_grad():
        cache.begin(model, ids)
        model(ids, **{CACHE: cache})
        cache.commit(ids)
        cache.crop(-30)
        with pytest.raises(PromptError, match=r"cropped to 30 tokens.*Call begin\(model, input_ids\)"):
            model(ids[:, 30:], **{CACHE: cache})
        assert cache.begin(model, ids[:, :32]).cached_tokens == 31
        logits = model(ids[:, 31:32], **{CACHE: cache}).logits
        assert torch.allclose(logits[:, -1], model(ids[:, :32]).logits[:, -1], atol=1e-4)


def test_recorded_columns_stay_until_crop(model, store):
    ids = left_padded([WORDS])
    reference = DynamicCache(config=model.config)
    with cache_of(store) as cache, torch.no_grad():
        for each in (cache, reference):
            model(ids[:, :20], **{CACHE: each})
            each.activate_past_recording()
            model(ids[:, 20:45], **{CACHE: each})
            model(ids[:, 45:50], **{CACHE: each})
            each.crop(-24)
        ours, theirs = (model(ids[:, 26:], **{CACHE: each}).logits for each in (cache, reference))
        assert torch.equal(ours, theirs)


def test_forks_drop_columns_each_for_itself(model, store):
    with cache_of(store) as cache:
        ended = ask(model, WORDS[:20], cache)
        with cache.fork() as twin:
            first, second = ask(model, ended + WORDS[:30], twin), ask(model, ended + WORDS[9:50], cache)
            ask(model, (*first, 1, 2), twin)
            ask(model, (*second, 4, 4), cache)


def test_a_turn_forked_in_the_middle_keeps_the_dropped_columns_of_both(model, store):
    ids = left_padded([WORDS])
    with cache_of(store) as cache, torch.no_grad():
        cache.begin(model, ids[:, :40])
        for begin in range(0, 40, 8):
            model(ids[:, begin : begin + 8], **{CACHE: cache})
        with cache.fork() as twin:
            other = torch.cat([ids[:, :40], ids[:, 3:23]], 1)
            for each, rest in ((twin, other), (cache, ids)):
                for begin in range(40, 60, 5):
                    model(rest[:, begin : begin + 5], **{CACHE: each})
                each.commit(rest)
    for sequence in (ids, other):
        for length in (34, 50, 59):
            with cache_of(store) as cache:
                ask(model, tuple(sequence[0, : length + 1].tolist()), cache)
                known = length if sequence is ids else min(length, 40)
                assert cache.last_turn.cached_tokens >= known


def test_samples_of_two_prompts_keep_the_windows_of_their_own_prompt(model, store):
    prompts = [WORDS[:30], WORDS[11:41]]
    ids = left_padded(prompts)
    with cache_of(store) as cache:
        answer(model, ids, cache, max_new_tokens=20, do_sample=True, top_k=0, num_return_sequences=2)
    for prompt in prompts:
        for length in (17, 24, 29):
            with cache_of(store) as cache:
                ask(model, (*prompt[:length], 1 + prompt[length] % 5), cache)
                assert cache.last_turn.cached_tokens == length


def test_a_turn_that_goes_on_in_place_keeps_no_window_that_it_does_not_have(model, store):
    """The store has lost everything: only the last columns of sliding layers are left to keep."""
    with cache_of(store) as cache:
        ended = ask(model, WORDS[:40], cache)
        store.prune(to_bytes=0)
        ended = ask(model, ended + WORDS[:3], cache)
        assert cache.last_turn.cached_by_tier["device"] > 40
    for length in (10, 25, 36, 44):
        with cache_of(store) as cache:
            ask(model, (*ended[:length], 1 + ended[length] % 5), cache)
    with cache_of(store) as cache:
        ask(model, (*ended, 2), cache)
        assert cache.last_turn.cached_tokens > 40
