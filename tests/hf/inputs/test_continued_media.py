"""Turns that leave out pictures and sounds which the cache holds, as transformers asks for it: no answer is blind."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from kvtier import PrefixStore, PromptError, TieredCache
from kvtier.hf.compat.names import MEDIA_CONTINUE
from kvtier.hf.inputs.multimodal import KINDS
from tests.support.media import (
    BY_GRID,
    FAMILIES,
    PLACE,
    VOCABULARY,
    WITH_STATES,
    Picture,
    answer,
    new_words,
    prompt,
    seeing,
    words,
)
from tests.support.upstream import CACHE

pytestmark = pytest.mark.skipif(not MEDIA_CONTINUE, reason="such inputs turn reuse off in this transformers")

BEFORE, BETWEEN, AFTER = words(12, 1), words(9, 2), words(7, 3)
A, B, C = Picture(10), Picture(11), Picture(12)
TYPES = ("token_type_ids", "mm_token_type_ids")


@pytest.fixture(params=FAMILIES)
def kind(request):
    """A family that sees or hears."""
    return request.param


@pytest.fixture
def cache():
    """A cache over a store of its own, which holds nothing."""
    with PrefixStore() as store, TieredCache(store) as cache:
        yield cache


def blind(kind, *rows, types="none", before=None):
    """A prompt without what is to be seen; ``types``: those of the whole prompt, of the rows ``before`` it, or none."""
    given = prompt(kind, *rows)
    kept = {name: given[name] for name in ("input_ids", "attention_mask")}
    source = given if types == "whole" else prompt(kind, *before) if types == "before" else {}
    return kept | {name: source[name] for name in TYPES if name in source}


def same(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-3), (ours - theirs).abs().max()


def asked(kind, given, against, on, **settings):
    """Ask with ``given``; the answer is that on a fresh ``DynamicCache`` with the arguments ``against``."""
    torch.manual_seed(3)
    expected = answer(seeing(kind), against, **settings)
    torch.manual_seed(3)
    found = answer(seeing(kind), given, on, **settings)
    same(found, expected)
    return new_words(given, found)


@pytest.mark.sample(8)  # of 24
@pytest.mark.parametrize("types", ["none", "whole", "before"])
@pytest.mark.parametrize("kind", [*FAMILIES, WITH_STATES])
def test_a_cache_is_continued_as_a_dynamic_cache_is(kind, cache, types):
    """Three turns, of which the first shows two pictures."""
    plain, first = DynamicCache(config=seeing(kind).config), [BEFORE, A, BETWEEN, B, AFTER]
    expected, found = (answer(seeing(kind), prompt(kind, first), each) for each in (plain, cache))
    same(found, expected)
    row = [*first, new_words(prompt(kind, first), found)]
    for seed in (5, 6):
        row = [*row, words(6, seed)]
        given = blind(kind, row, types=types, before=[first])
        expected, found = (answer(seeing(kind), given, each) for each in (plain, cache))
        same(found, expected)
        same(found, answer(seeing(kind), prompt(kind, row)))
        assert cache.last_turn.prompt_tokens - cache.last_turn.cached_tokens <= 6 + 1
        row = [*row, new_words(given, found)]


@pytest.mark.sample(11)  # of 21
@pytest.mark.parametrize("types", ["none", "whole", "before"])
def test_what_is_not_held_is_asked_for(kind, cache, types):
    """Also where the store knows the conversation: only the cache that computed it can say what entered."""
    row = [BEFORE, A, AFTER]
    given = blind(kind, row, types=types, before=[row])
    with pytest.raises(PromptError, match="cache holds nothing") as error:
        answer(seeing(kind), given, cache)
    tensor = "input_features" if kind == "voxtral" else "pixel_values"
    assert f"no {tensor} were passed" in str(error.value)
    said = asked(kind, prompt(kind, row), prompt(kind, row), cache)
    with TieredCache(cache.store) as other:
        with pytest.raises(PromptError, match="cache holds nothing"):
            answer(seeing(kind), given, other)
        answer(seeing(kind), prompt(kind, [words(9, 8)]), other)
        with pytest.raises(PromptError, match="no row that begins like row 0"):
            answer(seeing(kind), given, other)
    longer = [*row, said, BETWEEN]
    asked(kind, blind(kind, longer), prompt(kind, longer), cache)  # whatever failed elsewhere
    assert cache.last_turn.cached_tokens > len(BEFORE)


def test_what_belongs_to_a_picture_may_be_passed_without_it(kind, cache):
    """Grids and sizes say nothing of what a picture shows: they are no picture."""
    whole = prompt(kind, [BEFORE, A, AFTER])
    row = [BEFORE, A, AFTER, asked(kind, whole, whole, cache), words(6, 8)]
    seen = prompt(kind, row)
    beside = {name: seen[name] for names in KINDS.values() for name in names[1:] if name in seen}
    given = {**blind(kind, row), **beside}
    asked(kind, given, seen, cache)
    assert cache.last_turn.prompt_tokens - cache.last_turn.cached_tokens <= 7
    with TieredCache(cache.store) as other, pytest.raises(PromptError, match="cache holds nothing"):
        answer(seeing(kind), given, other)


def test_words_after_a_picture_may_change(kind, cache):
    asked(kind, prompt(kind, [BEFORE, A, AFTER]), prompt(kind, [BEFORE, A, AFTER]), cache)
    for row in ([BEFORE, A, words(9, 8)], [BEFORE, A, words(4, 9)], [BEFORE, A, AFTER[:3], words(5, 10)]):
        asked(kind, blind(kind, row), prompt(kind, row), cache)
        assert cache.last_turn.cached_tokens > len(BEFORE)


def test_words_right_after_a_picture_may_change(kind, cache):
    """Where positions have a grid, they go on from its far end."""
    bare = Picture(10, bare=True)
    asked(kind, prompt(kind, [BEFORE, bare, AFTER]), prompt(kind, [BEFORE, bare, AFTER]), cache)
    row = [BEFORE, bare, words(9, 8)]
    assert row[2][0] != AFTER[0]
    asked(kind, blind(kind, row), prompt(kind, row), cache)
    asked(kind, prompt(kind, row), prompt(kind, row), cache)
    assert cache.last_turn.cached_tokens == cache.last_turn.prompt_tokens - 1


def test_a_picture_with_fewer_placeholders_is_not_held(kind, cache):
    asked(kind, prompt(kind, [BEFORE, A, AFTER]), prompt(kind, [BEFORE, A, AFTER]), cache)
    given = blind(kind, [BEFORE, A, AFTER])
    first = given["input_ids"][0].tolist().index(PLACE)
    given["input_ids"][0, first + 2 : first + 4] = 7
    given["input_ids"][given["input_ids"] == PLACE] = torch.tensor(7)
    given["input_ids"][0, first : first + 2] = PLACE
    with pytest.raises(PromptError, match="no row that begins like row 0"):
        answer(seeing(kind), given, cache)
    asked(kind, blind(kind, [BEFORE, A, BETWEEN]), prompt(kind, [BEFORE, A, BETWEEN]), cache)


def test_words_before_a_picture_may_not_change(kind, cache):
    asked(kind, prompt(kind, [BEFORE, A, AFTER]), prompt(kind, [BEFORE, A, AFTER]), cache)
    for row in ([words(12, 8), A, AFTER], [BEFORE[:11], A, AFTER], [BEFORE, AFTER, A, AFTER], [BEFORE, A, AFTER, B]):
        with pytest.raises(PromptError, match="no row that begins like row 0 up to its last placeholder"):
            answer(seeing(kind), blind(kind, row), cache)
        asked(kind, blind(kind, [BEFORE, A, BETWEEN]), prompt(kind, [BEFORE, A, BETWEEN]), cache)  # it still holds A


@pytest.mark.sample(4)  # of 7
def test_words_take_the_place_of_a_later_picture(kind, cache):
    """Positions after the first picture are not those after both."""
    row = [BEFORE, A, BETWEEN, B, AFTER]
    asked(kind, prompt(kind, row), prompt(kind, row), cache)
    for other in ([BEFORE, A, BETWEEN, words(20, 8)], [BEFORE, A, words(20, 9)]):
        asked(kind, blind(kind, other), prompt(kind, other), cache)
        row = [*other, words(5, 12)]
        asked(kind, blind(kind, row), prompt(kind, row), cache)
        asked(kind, prompt(kind, row), prompt(kind, row), cache)  # and what was kept is that of the prompt
        assert cache.last_turn.cached_tokens == cache.last_turn.prompt_tokens - 1


def test_what_is_kept_of_such_a_turn_is_what_media_would_have_given(kind, cache):
    row = [BEFORE, A, AFTER]
    said = asked(kind, prompt(kind, row), prompt(kind, row), cache)
    row = [*row, said, BETWEEN]
    said = asked(kind, blind(kind, row), prompt(kind, row), cache)
    row = [*row, said, AFTER]
    with TieredCache(cache.store) as restored:
        asked(kind, prompt(kind, row), prompt(kind, row), restored)
        assert restored.last_turn.cached_tokens >= restored.last_turn.prompt_tokens - len(AFTER) - 1


def test_a_new_picture_comes_with_the_old_ones(kind, cache):
    row = [BEFORE, A, AFTER]
    said = asked(kind, prompt(kind, row), prompt(kind, row), cache)
    row = [*row, said, BETWEEN]
    said = asked(kind, blind(kind, row), prompt(kind, row), cache)
    row = [*row, said, B, AFTER]
    asked(kind, prompt(kind, row), prompt(kind, row), cache)
    assert cache.last_turn.cached_tokens > 12 + 6 + 7
    asked(kind, blind(kind, [*row, BETWEEN]), prompt(kind, [*row, BETWEEN]), cache)


def test_rows_of_a_batch(kind, cache):
    rows = [[BEFORE, A, AFTER], [words(4, 5), B, AFTER]]
    asked(kind, prompt(kind, *rows), prompt(kind, *rows), cache)
    for turn in ([rows[1], rows[0]], [rows[0], [words(30, 6)]], [rows[0]]):
        longer = [[*row, BETWEEN] for row in turn]
        # A row of other words begins anew beside a row that knows much: they are cut where nothing is known of it.
        if len(turn) > 1 and len(turn[1]) == 1:
            with pytest.raises(PromptError, match="cannot be taken from this cache"):
                answer(seeing(kind), blind(kind, *longer), cache)
            asked(kind, prompt(kind, *rows), prompt(kind, *rows), cache)
            continue
        asked(kind, blind(kind, *longer), prompt(kind, *longer), cache)
        assert cache.last_turn.cached_tokens > 0


def test_a_row_of_words_beside_one_with_a_picture(kind, cache):
    rows = [[BEFORE, A, AFTER], [words(9, 5)]]
    asked(kind, prompt(kind, *rows), prompt(kind, *rows), cache)
    longer = [[*row, BETWEEN] for row in rows]
    asked(kind, blind(kind, *longer), prompt(kind, *longer), cache)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_and_samples(kind, cache, settings):
    row = [BEFORE, A, AFTER]
    asked(kind, prompt(kind, row), prompt(kind, row), cache)
    longer = [*row, BETWEEN]
    asked(kind, blind(kind, longer), prompt(kind, longer), cache, **settings)
    asked(kind, blind(kind, [*longer, AFTER]), prompt(kind, [*longer, AFTER]), cache)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_forks_crops_and_other_conversations(kind, cache):
    row = [BEFORE, A, AFTER]
    asked(kind, prompt(kind, row), prompt(kind, row), cache)
    asked(kind, prompt(kind, row), prompt(kind, row), TieredCache(cache.store))
    longer = [*row, BETWEEN]
    with cache.fork() as twin:
        asked(kind, prompt(kind, [BEFORE, B]), prompt(kind, [BEFORE, B]), cache)
        asked(kind, blind(kind, longer), prompt(kind, longer), twin)
        twin.crop(-4)
        asked(kind, blind(kind, longer), prompt(kind, longer), twin)
        twin.crop(-(twin.get_seq_length() - len(BEFORE) - 3))  # within the picture
        with pytest.raises(PromptError, match="no row that begins"):
            answer(seeing(kind), blind(kind, longer), twin)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_turns_that_cannot_begin_with_what_is_held(kind, cache):
    """Another model, decoding that starts cold: what was held cannot be used, and the picture cannot be fed."""
    row, longer = [BEFORE, A, AFTER], [BEFORE, A, AFTER, BETWEEN]
    asked(kind, prompt(kind, row), prompt(kind, row), cache)
    for settings, reason in (
        ({"prompt_lookup_num_tokens": 2}, "starts cold"),
        ({"custom_generate": lambda model, input_ids, **_: input_ids}, "a custom generate may"),
        ({"use_cache": False}, "use_cache=False was passed"),
    ):
        with pytest.raises(PromptError, match=reason):
            answer(seeing(kind), blind(kind, longer), cache, **settings)
        asked(kind, prompt(kind, row), prompt(kind, row), cache)
    asked(kind, prompt(kind, row), prompt(kind, row), cache)
    other = copy.deepcopy(seeing(kind))
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(1.5)
    with pytest.raises(PromptError, match="not the one that filled this cache"):
        answer(other, blind(kind, longer), cache)


def test_arguments_that_may_bring_media_of_their_own_are_let_through(cache):
    given = blind("llava", [BEFORE, A, AFTER])
    model = seeing("llava")
    with torch.no_grad():
        features = model.model.get_image_features(prompt("llava", [A])["pixel_values"], return_dict=True)
    ready = {**given, "mm_encoder_outputs": {"image": features}}
    same(answer(model, copy.deepcopy(ready), cache), answer(model, prompt("llava", [BEFORE, A, AFTER])))
    assert "mm_encoder_outputs" in cache.last_turn.miss_reason
    embeds = model.get_input_embeddings()(given["input_ids"])
    ready = {"inputs_embeds": embeds, **given}
    same(answer(model, ready, cache), answer(model, ready))


def test_one_kind_of_media_does_not_answer_for_another(cache):
    """A picture is passed, a film is not."""
    given = prompt("qwen2_5_vl", [BEFORE, A, AFTER])
    given["input_ids"][0, 2:6] = 198
    with pytest.raises(PromptError, match="placeholders of kind video, but no pixel_values_videos were passed"):
        answer(seeing("qwen2_5_vl"), given, cache)


@pytest.mark.parametrize("kind", [k for k in BY_GRID if k != WITH_STATES])
def test_types_of_a_shorter_prompt_go_on_with_words(kind, cache):
    """Processors give types to words, too; the prompt of the next turn is longer than they are."""
    first = prompt(kind, [BEFORE])
    said = new_words(first, answer(seeing(kind), first, cache))
    longer = {**prompt(kind, [BEFORE, said, AFTER]), "mm_token_type_ids": first["mm_token_type_ids"]}
    with_all = prompt(kind, [BEFORE, said, AFTER])
    same(answer(seeing(kind), longer, cache), answer(seeing(kind), with_all))
    assert cache.last_turn.cached_tokens == 12 + 5


def loop(model, cache, ids, steps=5):
    """Greedy decoding by hand, of words."""
    report = cache.begin(model, ids)
    sequences, feed = ids, ids[:, cache.get_seq_length() :]
    with torch.no_grad():
        for _ in range(steps):
            feed = model(feed, **{CACHE: cache}).logits[:, -1, 1:VOCABULARY].argmax(-1, keepdim=True) + 1
            sequences = torch.cat([sequences, feed], 1)
    return sequences, report


def test_loops_continue_what_the_cache_holds(kind, cache):
    row, silent = [BEFORE, A, AFTER], {"suppress_tokens": [0, *range(VOCABULARY, 200)]}
    said = asked(kind, prompt(kind, row), prompt(kind, row), cache, **silent)
    row = [*row, said, BETWEEN]
    answer(seeing(kind), prompt(kind, [words(5, 20), B, C, AFTER]))  # what the model remembers is of another prompt
    ids = blind(kind, row)["input_ids"]
    expected = answer(seeing(kind), prompt(kind, row), max_new_tokens=5, **silent).sequences
    answer(seeing(kind), prompt(kind, [words(5, 20), B, C, AFTER]))
    found, report = loop(seeing(kind), cache, ids)
    assert torch.equal(found, expected)
    assert report.cached_tokens == report.prompt_tokens - len(BETWEEN) - 1
    cache.commit(found)
    row = [*row, tuple(found[0, ids.shape[1] :].tolist()), AFTER]
    asked(kind, blind(kind, row), prompt(kind, row), cache, **silent)
    assert cache.last_turn.cached_tokens >= found.shape[1] - 1


def test_loops_that_cannot_continue_hold_nothing(kind, cache):
    ids = blind(kind, [BEFORE, A, AFTER])["input_ids"]
    report = cache.begin(seeing(kind), ids)
    assert "begin() is not told which" in report.miss_reason
    assert cache.get_seq_length() == 0
    assert PLACE in ids
