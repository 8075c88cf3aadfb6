"""Turns may omit images and sounds that the cache holds, as transformers expects. No answer ignores them."""

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

pytestmark = [
    pytest.mark.skipif(not MEDIA_CONTINUE, reason="such inputs turn reuse off in this transformers"),
    pytest.mark.sample(2),
]

BEFORE, BETWEEN, AFTER = words(12, 1), words(9, 2), words(7, 3)
A, B, C = Picture(10), Picture(11), Picture(12)
TYPES = ("token_type_ids", "mm_token_type_ids")


@pytest.fixture(params=FAMILIES)
def kind(request):
    """A model family with image or audio input."""
    return request.param


@pytest.fixture
def cache():
    """A cache over its own empty store."""
    with PrefixStore() as store, TieredCache(store) as cache:
        yield cache


def blind(kind, *rows, types="none", before=None):
    """Return a prompt without its media. ``types`` are those of the whole prompt, of the rows ``before``, or none."""
    given = prompt(kind, *rows)
    kept = {name: given[name] for name in ("input_ids", "attention_mask")}
    source = given if types == "whole" else prompt(kind, *before) if types == "before" else {}
    return kept | {name: source[name] for name in TYPES if name in source}


def same(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-3), (ours - theirs).abs().max()


def asked(kind, given, against, on, **settings):
    """Ask with ``given``; the answer must equal that on a fresh ``DynamicCache`` with the arguments ``against``."""
    torch.manual_seed(3)
    expected = answer(seeing(kind), against, **settings)
    torch.manual_seed(3)
    found = answer(seeing(kind), given, on, **settings)
    same(found, expected)
    return new_words(given, found)


@pytest.mark.sample(3)  # of 24
@pytest.mark.parametrize("types", ["none", "whole", "before"])
@pytest.mark.parametrize("kind", [*FAMILIES, WITH_STATES])
def test_turns_without_media_continue_like_a_dynamic_cache(kind, cache, types):
    """Only the first of three turns passes the two images."""
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


@pytest.mark.sample(3)  # of 21
@pytest.mark.parametrize("types", ["none", "whole", "before"])
def test_omitted_media_raise_an_error_if_the_cache_lacks_them(kind, cache, types):
    """The store may hold the conversation, but only the cache that computed it knows its media."""
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
    asked(kind, blind(kind, longer), prompt(kind, longer), cache)  # the errors above have no effect on it
    assert cache.last_turn.cached_tokens > len(BEFORE)


def test_grids_and_sizes_may_be_passed_without_their_image(kind, cache):
    """Grids and sizes do not say what an image shows, so they do not replace it."""
    whole = prompt(kind, [BEFORE, A, AFTER])
    row = [BEFORE, A, AFTER, asked(kind, whole, whole, cache), words(6, 8)]
    seen = prompt(kind, row)
    beside = {name: seen[name] for names in KINDS.values() for name in names[1:] if name in seen}
    given = {**blind(kind, row), **beside}
    asked(kind, given, seen, cache)
    assert cache.last_turn.prompt_tokens - cache.last_turn.cached_tokens <= 7
    with TieredCache(cache.store) as other, pytest.raises(PromptError, match="cache holds nothing"):
        answer(seeing(kind), given, other)


def test_text_after_an_omitted_image_may_change(kind, cache):
    asked(kind, prompt(kind, [BEFORE, A, AFTER]), prompt(kind, [BEFORE, A, AFTER]), cache)
    for row in ([BEFORE, A, words(9, 8)], [BEFORE, A, words(4, 9)], [BEFORE, A, AFTER[:3], words(5, 10)]):
        asked(kind, blind(kind, row), prompt(kind, row), cache)
        assert cache.last_turn.cached_tokens > len(BEFORE)


def test_text_directly_after_an_omitted_image_may_change(kind, cache):
    """Where positions have a grid, text positions continue from its far end."""
    bare = Picture(10, bare=True)
    asked(kind, prompt(kind, [BEFORE, bare, AFTER]), prompt(kind, [BEFORE, bare, AFTER]), cache)
    row = [BEFORE, bare, words(9, 8)]
    assert row[2][0] != AFTER[0]
    asked(kind, blind(kind, row), prompt(kind, row), cache)
    asked(kind, prompt(kind, row), prompt(kind, row), cache)
    assert cache.last_turn.cached_tokens == cache.last_turn.prompt_tokens - 1


def test_omitted_image_with_fewer_placeholders_raises_an_error(kind, cache):
    asked(kind, prompt(kind, [BEFORE, A, AFTER]), prompt(kind, [BEFORE, A, AFTER]), cache)
    given = blind(kind, [BEFORE, A, AFTER])
    first = given["input_ids"][0].tolist().index(PLACE)
    given["input_ids"][0, first + 2 : first + 4] = 7
    given["input_ids"][given["input_ids"] == PLACE] = torch.tensor(7)
    given["input_ids"][0, first : first + 2] = PLACE
    with pytest.raises(PromptError, match="no row that begins like row 0"):
        answer(seeing(kind), given, cache)
    asked(kind, blind(kind, [BEFORE, A, BETWEEN]), prompt(kind, [BEFORE, A, BETWEEN]), cache)


def test_changed_text_before_an_omitted_image_raises_an_error(kind, cache):
    asked(kind, prompt(kind, [BEFORE, A, AFTER]), prompt(kind, [BEFORE, A, AFTER]), cache)
    for row in ([words(12, 8), A, AFTER], [BEFORE[:11], A, AFTER], [BEFORE, AFTER, A, AFTER], [BEFORE, A, AFTER, B]):
        with pytest.raises(PromptError, match="no row that begins like row 0 up to its last placeholder"):
            answer(seeing(kind), blind(kind, row), cache)
        asked(kind, blind(kind, [BEFORE, A, BETWEEN]), prompt(kind, [BEFORE, A, BETWEEN]), cache)  # cache still holds A


@pytest.mark.sample(3)  # of 7
def test_text_may_replace_a_later_image(kind, cache):
    """Positions after the first image differ from those after both."""
    row = [BEFORE, A, BETWEEN, B, AFTER]
    asked(kind, prompt(kind, row), prompt(kind, row), cache)
    for other in ([BEFORE, A, BETWEEN, words(20, 8)], [BEFORE, A, words(20, 9)]):
        asked(kind, blind(kind, other), prompt(kind, other), cache)
        row = [*other, words(5, 12)]
        asked(kind, blind(kind, row), prompt(kind, row), cache)
        asked(kind, prompt(kind, row), prompt(kind, row), cache)  # the kept prefix is that of the whole prompt
        assert cache.last_turn.cached_tokens == cache.last_turn.prompt_tokens - 1


def test_turn_with_omitted_media_stores_the_same_prefix(kind, cache):
    row = [BEFORE, A, AFTER]
    said = asked(kind, prompt(kind, row), prompt(kind, row), cache)
    row = [*row, said, BETWEEN]
    said = asked(kind, blind(kind, row), prompt(kind, row), cache)
    row = [*row, said, AFTER]
    with TieredCache(cache.store) as restored:
        asked(kind, prompt(kind, row), prompt(kind, row), restored)
        assert restored.last_turn.cached_tokens >= restored.last_turn.prompt_tokens - len(AFTER) - 1


def test_new_image_is_added_by_passing_all_images_again(kind, cache):
    row = [BEFORE, A, AFTER]
    said = asked(kind, prompt(kind, row), prompt(kind, row), cache)
    row = [*row, said, BETWEEN]
    said = asked(kind, blind(kind, row), prompt(kind, row), cache)
    row = [*row, said, B, AFTER]
    asked(kind, prompt(kind, row), prompt(kind, row), cache)
    assert cache.last_turn.cached_tokens > 12 + 6 + 7
    asked(kind, blind(kind, [*row, BETWEEN]), prompt(kind, [*row, BETWEEN]), cache)


def test_batch_rows_may_omit_media_unless_another_row_is_new(kind, cache):
    rows = [[BEFORE, A, AFTER], [words(4, 5), B, AFTER]]
    asked(kind, prompt(kind, *rows), prompt(kind, *rows), cache)
    for turn in ([rows[1], rows[0]], [rows[0], [words(30, 6)]], [rows[0]]):
        longer = [[*row, BETWEEN] for row in turn]
        # A row of other text has no known prefix, and a batch is cut where its least known row ends.
        if len(turn) > 1 and len(turn[1]) == 1:
            with pytest.raises(PromptError, match="cannot be taken from this cache"):
                answer(seeing(kind), blind(kind, *longer), cache)
            asked(kind, prompt(kind, *rows), prompt(kind, *rows), cache)
            continue
        asked(kind, blind(kind, *longer), prompt(kind, *longer), cache)
        assert cache.last_turn.cached_tokens > 0


def test_text_row_continues_beside_a_row_with_an_omitted_image(kind, cache):
    rows = [[BEFORE, A, AFTER], [words(9, 5)]]
    asked(kind, prompt(kind, *rows), prompt(kind, *rows), cache)
    longer = [[*row, BETWEEN] for row in rows]
    asked(kind, blind(kind, *longer), prompt(kind, *longer), cache)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_and_samples_continue_without_media(kind, cache, settings):
    row = [BEFORE, A, AFTER]
    asked(kind, prompt(kind, row), prompt(kind, row), cache)
    longer = [*row, BETWEEN]
    asked(kind, blind(kind, longer), prompt(kind, longer), cache, **settings)
    asked(kind, blind(kind, [*longer, AFTER]), prompt(kind, [*longer, AFTER]), cache)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_forks_and_crops_continue_until_a_crop_cuts_the_image(kind, cache):
    row = [BEFORE, A, AFTER]
    asked(kind, prompt(kind, row), prompt(kind, row), cache)
    asked(kind, prompt(kind, row), prompt(kind, row), TieredCache(cache.store))
    longer = [*row, BETWEEN]
    with cache.fork() as twin:
        asked(kind, prompt(kind, [BEFORE, B]), prompt(kind, [BEFORE, B]), cache)
        asked(kind, blind(kind, longer), prompt(kind, longer), twin)
        twin.crop(-4)
        asked(kind, blind(kind, longer), prompt(kind, longer), twin)
        twin.crop(-(twin.get_seq_length() - len(BEFORE) - 3))  # inside the image
        with pytest.raises(PromptError, match="no row that begins"):
            answer(seeing(kind), blind(kind, longer), twin)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_omitted_media_raise_an_error_if_the_turn_cannot_reuse(kind, cache):
    """With another model, or decoding that starts cold, the held image cannot be used, and it cannot be fed."""
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


def test_precomputed_features_are_accepted_instead_of_media(cache):
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


def test_images_do_not_satisfy_video_placeholders(cache):
    """An image is passed, a video is not."""
    given = prompt("qwen2_5_vl", [BEFORE, A, AFTER])
    given["input_ids"][0, 2:6] = 198
    with pytest.raises(PromptError, match="placeholders of kind video, but no pixel_values_videos were passed"):
        answer(seeing("qwen2_5_vl"), given, cache)


@pytest.mark.parametrize("kind", [k for k in BY_GRID if k != WITH_STATES])
def test_token_types_of_a_shorter_prompt_are_extended_with_text(kind, cache):
    """Processors return types for text, too. The prompt of the next turn is longer than these types."""
    first = prompt(kind, [BEFORE])
    said = new_words(first, answer(seeing(kind), first, cache))
    longer = {**prompt(kind, [BEFORE, said, AFTER]), "mm_token_type_ids": first["mm_token_type_ids"]}
    with_all = prompt(kind, [BEFORE, said, AFTER])
    same(answer(seeing(kind), longer, cache), answer(seeing(kind), with_all))
    assert cache.last_turn.cached_tokens == 12 + 5


def loop(model, cache, ids, steps=5):
    """Greedy decoding by hand, of text tokens only."""
    report = cache.begin(model, ids)
    sequences, feed = ids, ids[:, cache.get_seq_length() :]
    with torch.no_grad():
        for _ in range(steps):
            feed = model(feed, **{CACHE: cache}).logits[:, -1, 1:VOCABULARY].argmax(-1, keepdim=True) + 1
            sequences = torch.cat([sequences, feed], 1)
    return sequences, report


def test_custom_loop_continues_a_conversation_with_media(kind, cache):
    row, silent = [BEFORE, A, AFTER], {"suppress_tokens": [0, *range(VOCABULARY, 200)]}
    said = asked(kind, prompt(kind, row), prompt(kind, row), cache, **silent)
    row = [*row, said, BETWEEN]
    answer(seeing(kind), prompt(kind, [words(5, 20), B, C, AFTER]))  # the model remembers another prompt
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


def test_begin_holds_nothing_if_the_media_are_unknown(kind, cache):
    ids = blind(kind, [BEFORE, A, AFTER])["input_ids"]
    report = cache.begin(seeing(kind), ids)
    assert "begin() is not told which" in report.miss_reason
    assert cache.get_seq_length() == 0
    assert PLACE in ids
