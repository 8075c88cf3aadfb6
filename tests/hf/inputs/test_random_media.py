"""Random edits of text and images in a prompt: each turn answers as on a fresh ``DynamicCache``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier import PrefixStore, PromptError, TieredCache
from kvtier.hf.compat.names import MEDIA_CONTINUE
from tests.support.media import BY_GRID, PLACE, Picture, answer, new_words, prompt, seeing
from tests.support.tiny import assert_same_answer

words = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)
seeds, sizes = st.integers(1, 3), st.booleans()
# Where positions have a grid, transformers cannot separate images without text between them.
PARTS = {
    True: st.one_of(words, words, st.builds(Picture, seed=seeds, wide=sizes, bare=st.just(False))),
    False: st.one_of(words, words, st.builds(Picture, seed=seeds, wide=st.just(False), bare=st.booleans())),
}
modes = st.sampled_from([{}, {}, {}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])


@st.composite
def edited(draw, row, parts):
    """Return a row after an edit: extended, shortened, unchanged, or with parts changed, inserted or swapped."""
    row = list(row)
    kind = draw(st.sampled_from(["extend", "cut", "change", "insert", "swap", "same"]))
    at = draw(st.integers(1, max(1, len(row) - 1)))
    if kind == "extend":
        row += [draw(parts), draw(words)]
    elif kind == "cut" and len(row) > 1:
        row = row[: at + 1]
    elif kind == "change" and len(row) > 1:
        row[at] = draw(parts)
    elif kind == "insert":
        row.insert(at, draw(parts))
    elif kind == "swap" and len(row) > 2:
        other = draw(st.integers(1, len(row) - 1))
        row[at], row[other] = row[other], row[at]
    return row


@pytest.mark.skipif(not MEDIA_CONTINUE, reason="such inputs turn reuse off in this transformers")
@pytest.mark.parametrize("seer", ["qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "idefics3"])
@settings(max_examples=max(1, settings.default.max_examples // 10))
@given(data=st.data())
def test_random_edits_of_text_and_images_give_correct_answers(seer, data):
    model, parts = seeing(seer), PARTS[seer in BY_GRID]
    rows = st.lists(parts, min_size=1, max_size=4).map(lambda found: [(1, 2), *found])
    with PrefixStore(block_size=4) as store, TieredCache(store) as one, TieredCache(store) as other:
        talk = [data.draw(rows)]
        for _ in range(data.draw(st.integers(2, 5))):
            given_now, mode = prompt(seer, *talk), data.draw(modes)
            cache = data.draw(st.sampled_from([one, other]))
            torch.manual_seed(1)
            expected = answer(model, given_now, max_new_tokens=3, **mode)
            torch.manual_seed(1)
            found = answer(model, given_now, cache, max_new_tokens=3, **mode)
            assert_same_answer(found, expected, exact=False)
            said = new_words(given_now, found)
            talk = [data.draw(edited([*row, said] if data.draw(st.booleans()) else row, parts)) for row in talk]
            if data.draw(st.integers(0, 3)) == 0:  # add a row, or keep only the last one
                talk = [talk[-1]] if len(talk) > 1 else [*talk, data.draw(st.one_of(rows, edited(talk[0], parts)))]


@settings(max_examples=max(1, settings.default.max_examples // 10))
@given(data=st.data())
def test_random_embeddings_give_correct_answers(data):
    model = seeing(BY_GRID[1])
    table = model.get_input_embeddings().weight.detach()
    vectors = st.lists(st.integers(1, 3), min_size=1, max_size=14)
    with PrefixStore(block_size=4) as store, TieredCache(store) as cache:
        for row in data.draw(st.lists(vectors, min_size=2, max_size=5)):
            embeds = table[torch.tensor([[9, 8, 7, 6, 5, *row]])]
            settings_ = {"inputs_embeds": embeds}
            expected = answer(model, settings_, max_new_tokens=3)
            assert_same_answer(answer(model, settings_, cache, max_new_tokens=3), expected, exact=False)


MASKS = st.sampled_from([torch.bool, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float32])


def left_out(given_now):
    """Return the arguments of a turn without its media."""
    kept = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return {name: given_now[name] for name in kept if name in given_now}


@pytest.mark.skipif(not MEDIA_CONTINUE, reason="such inputs turn reuse off in this transformers")
@pytest.mark.parametrize("seer", ["qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "idefics3"])
@settings(max_examples=max(1, settings.default.max_examples // 10))
@given(data=st.data())
def test_random_turns_may_omit_hide_or_chunk_images(seer, data):
    """Omitted images come from the cache, or an error says that they cannot. A turn that only continues never fails."""
    model, parts = seeing(seer), PARTS[seer in BY_GRID]
    row = data.draw(st.lists(parts, min_size=1, max_size=3).map(lambda found: [(1, 2), *found, (3,)]))
    with PrefixStore(block_size=4) as store, TieredCache(store) as cache:
        holds, held_columns = False, 0  # whether the cache holds the last turn's whole row; its columns
        for _ in range(data.draw(st.integers(2, 5))):
            given_now, mode = prompt(seer, row), {}
            columns = given_now["input_ids"].shape[1]
            kind = data.draw(st.sampled_from(["seen", "blind", "blind", "hidden", "chunks"]))
            if kind == "chunks":
                mode = {"prefill_chunk_size": data.draw(st.integers(2, columns + 1))}
            if kind == "hidden" and (seer not in BY_GRID or PLACE not in given_now["input_ids"]):
                given_now["attention_mask"][0, : data.draw(st.integers(1, columns - 1))] = 0
            given_now["attention_mask"] = given_now["attention_mask"].to(data.draw(MASKS))
            expected = answer(model, given_now, max_new_tokens=3, **mode)
            asked = left_out(given_now) if kind == "blind" else given_now
            if kind == "blind" and data.draw(st.booleans()):  # as processors returned them for the previous prompt
                for name in ("token_type_ids", "mm_token_type_ids"):
                    if name in asked and holds and not asked[name][0, -1:].any():
                        asked[name] = asked[name][:, : data.draw(st.integers(held_columns, columns))]
            try:
                found = answer(model, asked, cache, max_new_tokens=3, **mode)
            except PromptError:
                assert kind == "blind"
                assert not holds
                assert PLACE in asked["input_ids"]
                continue
            assert_same_answer(found, expected, exact=False)
            said, held_columns = new_words(given_now, found), columns
            holds = "attend to each other" not in (cache.last_turn.miss_reason or "") and kind != "hidden"
            grows = data.draw(st.booleans())
            edit = [*row, said, data.draw(words)] if grows else data.draw(edited([*row, said], parts))
            row, holds = [*edit, (2,)], holds and grows
