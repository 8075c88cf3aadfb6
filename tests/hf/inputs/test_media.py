"""Images and sounds enter the chain at their placeholders: equal ones are reused, others never."""

from __future__ import annotations

import pytest
import torch

from kvtier import TieredCache
from kvtier.hf.compat.names import MEDIA_CONTINUE
from tests.support.media import (
    BY_GRID,
    END,
    FAMILIES,
    PLACE,
    START,
    VOCABULARY,
    WITH_STATES,
    Picture,
    answer,
    new_words,
    prompt,
    seeing,
    words,
)
from tests.support.media_families import SEERS, make_seer, seer_prompt
from tests.support.reuse import reuse_off
from tests.support.upstream import CACHE

pytestmark = [
    pytest.mark.skipif(not MEDIA_CONTINUE, reason="such inputs turn reuse off in this transformers"),
    pytest.mark.sample(2),
]

BEFORE, BETWEEN, AFTER = words(12, 1), words(9, 2), words(7, 3)
A, B, C = Picture(10), Picture(11), Picture(12)


def columns(kind, *row):
    """Return the number of columns of a row's parts."""
    return prompt(kind, row)["input_ids"].shape[1]


@pytest.fixture(params=FAMILIES)
def kind(request):
    """A model family with image or audio input."""
    return request.param


@pytest.fixture
def turn(cache):
    """``turn(kind, *rows, on=cache, **settings)`` compares with plain transformers and returns the reused tokens."""

    def run(kind, *rows, on=cache, **settings):
        given, model = prompt(kind, *rows), seeing(kind)
        torch.manual_seed(3)
        expected = answer(model, given, **settings)
        torch.manual_seed(3)
        found = answer(model, given, on, **settings)
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-3), (ours - theirs).abs().max()
        run.said = new_words(given, found)
        return on.last_turn.cached_tokens

    return run


def test_other_media_change_the_logits_of_the_model(kind):
    model = seeing(kind)
    ours, other = (answer(model, prompt(kind, [BEFORE, p, AFTER])).logits[0] for p in (A, B))
    assert (ours - other).abs().max() > 0.1


def test_same_image_is_reused(kind, turn, store):
    row = [BEFORE, A, AFTER]
    known = columns(kind, *row) - 1
    assert turn(kind, row) == 0
    assert turn(kind, row) == known
    with TieredCache(store) as restored:
        assert turn(kind, row, on=restored) == known
        assert restored.last_turn.cached_by_tier["host"] == known


def test_another_image_reuses_only_the_text_before_it(kind, turn):
    turn(kind, [BEFORE, A, AFTER])
    assert turn(kind, [BEFORE, B, AFTER]) == 12 + 1  # the text, and the id that begins an image
    assert turn(kind, [BEFORE, A, AFTER]) == columns(kind, BEFORE, A, AFTER) - 1


def test_same_image_is_reused_before_other_text(kind, turn):
    turn(kind, [BEFORE, A, AFTER])
    # Where positions have a grid, the ids after an image are marked with their positions, too.
    ends = columns(kind, BEFORE, A) - (kind in BY_GRID)
    assert turn(kind, [BEFORE, A, words(9, 8)]) == ends
    assert turn(kind, [BEFORE, A, AFTER[:5], *[words(9, 8)]]) == columns(kind, BEFORE, A, AFTER[:5])
    assert turn(kind, [words(12, 9), A, AFTER]) == 0


@pytest.mark.sample(3)  # of 7
def test_conversation_with_images_is_reused_and_restored(kind, turn, store, tmp_path):
    """Each turn adds an image and also runs on a disk store. The last prompt is restored from both stores."""
    row, known = [BEFORE], 0
    with TieredCache(tmp_path) as disk:
        for picture in (A, B, C):
            row = [*row, picture, BETWEEN]
            assert turn(kind, row) == known
            said = turn.said
            assert turn(kind, row, on=disk) in (known, known + 1)
            known = columns(kind, *row, said) - 1
            row = [*row, said]
        last = [*row, AFTER]
        disk.flush()
    with TieredCache(store) as restored:
        assert turn(kind, last, on=restored) == known
    with TieredCache(tmp_path) as restored:
        assert turn(kind, last, on=restored) == known
        assert restored.last_turn.cached_by_tier["disk"] == known


def test_change_of_the_second_image_keeps_the_first(kind, turn):
    turn(kind, [BEFORE, A, BETWEEN, B, AFTER])
    assert turn(kind, [BEFORE, A, BETWEEN, C, AFTER]) == columns(kind, BEFORE, A, BETWEEN) + 1
    assert turn(kind, [BEFORE, B, BETWEEN, A, AFTER]) == 12 + 1
    assert turn(kind, [BEFORE, A, BETWEEN, B, AFTER]) == columns(kind, BEFORE, A, BETWEEN, B, AFTER) - 1


def test_reuse_survives_another_conversation_in_between(kind, turn, store):
    """The model's memory of its last call, such as its position offset, then belongs to another prompt."""
    turn(kind, [BEFORE, A, AFTER])
    said = turn.said
    with TieredCache(store) as other:
        turn(kind, [words(5, 20), B, words(3, 21), C, AFTER], on=other)
        turn(kind, [words(30, 22)], on=other)
    assert turn(kind, [BEFORE, A, AFTER, said, AFTER]) == columns(kind, BEFORE, A, AFTER, said) - 1
    with TieredCache(store) as other:
        turn(kind, [words(5, 20), B, words(3, 21), C, AFTER], on=other)
    assert turn(kind, [BEFORE, A, AFTER, said, AFTER]) == columns(kind, BEFORE, A, AFTER, said, AFTER) - 1


def test_text_is_reused_after_another_conversation_with_images(kind, turn, store):
    turn(kind, [BEFORE])
    said = turn.said
    with TieredCache(store) as other:
        turn(kind, [words(5, 20), B, AFTER], on=other)
    assert turn(kind, [BEFORE, said, AFTER]) == 12 + len(said) - 1
    assert turn(kind, [BEFORE, said, AFTER, A, BETWEEN]) == 12 + len(said) + 7


def test_rows_with_different_images_are_reused_per_row(kind, turn, cache, store):
    rows = [[BEFORE, A, AFTER], [words(4, 5), B, AFTER]]
    assert turn(kind, *rows) == 0
    shorter = columns(kind, *rows[1])
    assert turn(kind, *rows) == (columns(kind, *rows[0]) - 1) + (shorter - 1)
    changed = [[BEFORE, A, AFTER], [words(4, 5), C, AFTER]]
    turn(kind, *changed)
    assert [row.cached_tokens for row in cache.last_turn.rows] == [13, 5]
    with TieredCache(store) as restored:
        assert turn(kind, *rows, on=restored) > 0
        turn(kind, rows[1], on=restored)
        assert restored.last_turn.cached_tokens == shorter - 1


def test_rows_with_swapped_images_are_reused(kind, turn):
    turn(kind, [BEFORE, A, AFTER], [BEFORE, B, AFTER])
    known = columns(kind, BEFORE, A, AFTER) - 1
    assert turn(kind, [BEFORE, B, AFTER], [BEFORE, A, AFTER]) == 2 * known
    assert turn(kind, [BEFORE, A, AFTER], [BEFORE, A, AFTER]) == 2 * known


def test_rows_with_unequal_image_counts_give_correct_answers(kind, turn):
    rows = [[BEFORE, A, BETWEEN, B, AFTER], [BEFORE, C, AFTER]]
    turn(kind, *rows)
    turn(kind, *rows)
    turn(kind, [BEFORE, A, BETWEEN, C, AFTER], rows[1])


@pytest.mark.parametrize("kind", [k for k in BY_GRID if k in FAMILIES])
def test_images_of_different_sizes_are_reused(turn, kind):
    wide = Picture(13, wide=True)
    row = [BEFORE, A, BETWEEN, wide, AFTER]
    turn(kind, row)
    assert turn(kind, [*row, B, AFTER]) == columns(kind, *row)
    assert turn(kind, [BEFORE, A, BETWEEN, A, AFTER]) == columns(kind, BEFORE, A, BETWEEN) + 1
    assert turn(kind, [BEFORE, wide, BETWEEN, A, AFTER]) == 12 + 1


@pytest.mark.parametrize("kind", [k for k in FAMILIES if k not in BY_GRID])  # where transformers can separate them
def test_adjacent_images_are_reused_only_together(kind, turn):
    """Images without text between them may attend to each other, so they form one span."""
    left, right = Picture(10, bare=True), Picture(11, bare=True)
    known = columns(kind, BEFORE, left, right)
    turn(kind, [BEFORE, left, right, AFTER])
    assert turn(kind, [BEFORE, left, right, AFTER]) == known + 7 - 1
    assert turn(kind, [BEFORE, left, right, BETWEEN]) == known
    assert turn(kind, [BEFORE, right, left, AFTER]) == 12
    assert turn(kind, [BEFORE, left, AFTER, right]) == 12


def test_run_of_one_token_type_is_reused_only_whole(cache):
    """Token types define a run of text tokens that attend to each other, like an image's placeholders."""
    model, types = seeing("gemma3"), torch.zeros(1, 30, dtype=torch.long)
    types[0, 6:20] = 1
    for changed, known in ((None, 0), (None, 29), (18, 6), (25, 25), (2, 2)):
        ids = torch.tensor([words(30)])
        if changed is not None:
            ids[0, changed] = 3
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}
        expected = answer(model, given)
        found = answer(model, given, cache)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.allclose(found.logits[0], expected.logits[0], rtol=0, atol=1e-3)
        assert cache.last_turn.cached_tokens == known


def test_reuse_of_an_answer_directly_after_an_image_depends_on_family(kind, turn):
    """Where the prompt's last type is repeated, the types of the answer are unknown."""
    row = [BEFORE, Picture(10, bare=True)]
    turn(kind, row)
    known = columns(kind, *row, turn.said) - 1
    if kind == "gemma3":
        known = 12  # the image alone has one id too few to identify it
    elif kind in BY_GRID:
        known = columns(kind, *row)  # the answer has other positions than in a prompt
    assert turn(kind, [*row, turn.said, AFTER]) == known


@pytest.mark.sample(3)  # of 14
@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_and_samples_reuse_media(kind, turn, cache, settings):
    row = [BEFORE, A, AFTER]
    turn(kind, row, **settings)
    assert turn(kind, row, **settings) == columns(kind, *row) - 1
    two = [*row, B, BETWEEN]
    turn(kind, two, **settings)  # the media are fed together, or not at all
    assert cache.last_turn.cached_tokens == (0 if kind == "voxtral" else 13)
    if kind == "voxtral":  # transformers gives a beam the sounds of other beams
        assert "each beam" in cache.last_turn.miss_reason
    assert turn(kind, two, **settings) == (0 if kind == "voxtral" else columns(kind, *two) - 1)
    assert turn(kind, [*two, C, AFTER]) >= columns(kind, *row)


def test_begin_refuses_prompts_with_placeholders(kind, cache):
    model, given = seeing(kind), prompt(kind, [BEFORE, A, AFTER])
    report = cache.begin(model, given["input_ids"])
    assert "placeholders" in report.miss_reason
    assert cache.get_seq_length() == 0
    assert PLACE in given["input_ids"]


def test_recurrent_models_continue_from_checkpoints(turn, cache, store):
    """Checkpoints lie after a prompt and after an answer, never within an image. Only ``generate`` feeds tokens."""
    row = [BEFORE, A, BETWEEN]
    assert turn(WITH_STATES, row) == 0
    known = columns(WITH_STATES, *row)
    row = [*row, turn.said, AFTER]
    assert turn(WITH_STATES, row) == known + 5
    known, row = columns(WITH_STATES, *row), [*row, turn.said, B, AFTER]
    with TieredCache(store) as restored:
        assert turn(WITH_STATES, row, on=restored) == known + 5
        assert turn(WITH_STATES, [BEFORE, words(40, 7)], on=restored) == 0
        assert turn(WITH_STATES, [BEFORE, words(40, 7), AFTER], on=restored) == 12 + 40
    assert turn(WITH_STATES, [*row, C]) == columns(WITH_STATES, *row)
    assert turn(WITH_STATES, [*row, C, AFTER]) == columns(WITH_STATES, *row)  # five ids must identify C
    assert turn(WITH_STATES, [BEFORE, C, BETWEEN]) == 0
    for seed in (8, 9):  # no placeholders are fed to get a checkpoint where these prompts part
        assert turn(WITH_STATES, [BEFORE, A, words(9, seed)]) == 0


def test_beams_do_not_continue_from_checkpoints_between_images(turn, cache, store):
    turn(WITH_STATES, [BEFORE, A, BETWEEN])
    row = [BEFORE, A, BETWEEN, turn.said, B, AFTER]
    with TieredCache(store) as other:
        turn(WITH_STATES, row, on=other)
        assert turn(WITH_STATES, row, on=other, num_beams=2) == 0  # the checkpoint lies between the images
    assert cache.get_seq_length() == columns(WITH_STATES, *row[:4]) - 1
    assert turn(WITH_STATES, row, num_beams=2) == 0  # the states in the layers lie there, too


def loop(model, cache, ids, steps=5):
    """Greedy decoding by hand."""
    cache.begin(model, ids)
    sequences, feed = ids, ids[:, cache.get_seq_length() :]
    with torch.no_grad():
        for _ in range(steps):
            feed = model(feed, **{CACHE: cache}).logits[:, -1, :VOCABULARY].argmax(-1, keepdim=True)
            sequences = torch.cat([sequences, feed], 1)
    return sequences, cache.commit(sequences)


@reuse_off
def test_begin_refuses_models_without_a_config(cache, tokens):
    report = cache.begin(torch.nn.Linear(2, 2), tokens(5))
    assert report.miss_reason == "the model has no config"


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_custom_loop_ignores_positions_of_an_earlier_generate(turn, kind, store):
    """The model remembers the position offset of a prompt with images. The next loop has no images."""
    model, ids = seeing(kind), torch.tensor([words(14)])
    said = list(range(VOCABULARY, 200))
    expected = model.generate(ids, max_new_tokens=10, do_sample=False, suppress_tokens=said)
    with TieredCache(store) as cache:
        for known, end in ((0, 14), (18, 19)):
            turn(kind, [BEFORE, A, BETWEEN, B, AFTER])
            found, report = loop(model, cache, expected[:, :end])
            assert torch.equal(found, expected[:, : end + 5])
            assert report.cached_tokens == known


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_are_reused_only_if_all_their_tensors_are_equal(cache, kind):
    """A video is hashed with all tensors that belong to it, and split by its grid."""
    model, ids = seeing(kind), [*words(9), START, *[198] * 4, *words(3), *[198] * 4, END, *words(5, 1)]
    table = torch.tensor([ids])
    given = {
        "input_ids": table,
        "mm_token_type_ids": (table == 198).long() * 2,
        "pixel_values_videos": torch.randn(32, 12, generator=torch.Generator().manual_seed(1)),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    if kind == "qwen2_5_vl":  # its videos have no text inside, but a pace
        table = torch.tensor([[*words(9), START, *[198] * 8, END, *words(8, 1)]])
        given |= {"input_ids": table, "mm_token_type_ids": (table == 198).long() * 2}
        given["second_per_grid_ts"] = torch.tensor([1.0])
    other = {**given, "pixel_values_videos": given["pixel_values_videos"] + 1}
    turns = [(given, 0), (given, table.shape[1] - 1), (other, 10), (given, table.shape[1] - 1)]
    if kind == "qwen2_5_vl":
        turns.append(({**given, "second_per_grid_ts": torch.tensor([2.0])}, 10))
    for arguments, known in turns:
        expected = answer(model, arguments)
        assert torch.equal(answer(model, arguments, cache).sequences, expected.sequences)
        assert cache.last_turn.cached_tokens == known


def test_images_are_reused_with_cold_layers(turn, store):
    row = [BEFORE, A, BETWEEN]
    with TieredCache(store, device_budget=80_000) as cache:
        turn("llava", row, on=cache)
        row = [*row, turn.said, B, AFTER, words(40, 7)]
        assert turn("llava", row, on=cache) == columns("llava", *row[:4]) - 1
        assert cache.last_turn.cold_layers > 0
        assert turn("llava", [*row, C, AFTER], on=cache) == columns("llava", *row)


def test_older_transformers_turn_reuse_of_images_off(turn, cache, monkeypatch):
    monkeypatch.setattr("kvtier.hf.inputs.chain_inputs.MEDIA_CONTINUE", False)
    turn("llava", [BEFORE, A, AFTER])
    assert turn("llava", [BEFORE, A, AFTER]) == 0
    assert "this version of transformers cannot continue with pixel_values" in cache.last_turn.miss_reason


@pytest.mark.parametrize("chunk", [3, 8])
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "idefics3"])
def test_images_are_reused_with_chunked_prefill(turn, kind, chunk):
    row = [BEFORE, A, BETWEEN]
    turn(kind, row, prefill_chunk_size=chunk)
    known = columns(kind, *row) - 1
    assert turn(kind, row, prefill_chunk_size=chunk) == known
    assert turn(kind, [*row, B, AFTER], prefill_chunk_size=chunk) == known + 1
    assert turn(kind, [*row, B, AFTER]) == columns(kind, *row, B, AFTER) - 1


@pytest.mark.sample(3)  # of 13
@pytest.mark.parametrize("name", SEERS)
def test_reuse_is_exact_for_other_model_families(name, cache, store):
    """A conversation about images, a change of its first image, and another conversation on the same model."""
    model = make_seer(name)

    def ask(on, *row):
        given = seer_prompt(name, row)
        expected, found = answer(model, given), answer(model, given, on)
        assert torch.equal(found.sequences, expected.sequences)
        return new_words(given, found), on.last_turn.cached_tokens, given["input_ids"].shape[1]

    said, known, asked = ask(cache, BEFORE, A, BETWEEN)
    assert known == 0
    row = [BEFORE, A, BETWEEN, said, AFTER]
    said, known, asked = ask(cache, *row)
    assert known == asked - 7 - 1
    with TieredCache(store) as other:
        ask(other, words(30, 7))
        ask(other, words(30, 7), C, BETWEEN)
        _, known, more = ask(other, *row, said, B, AFTER)
        assert known == asked + 5
    states = name == "lfm2_vl"
    _, known, _ = ask(cache, BEFORE, B, BETWEEN)
    assert known == (0 if states else 13)
    _, known, _ = ask(cache, *row, said, B, AFTER, BETWEEN)
    assert known >= more
    assert cache.last_turn.miss_reason is None


@pytest.mark.sample(3)  # of 14
@pytest.mark.parametrize("hidden", ["whole", "part"])
def test_images_hidden_by_the_mask_give_correct_answers(kind, cache, hidden):
    """Models fill all placeholders, hidden ones too, so each image keeps its own placeholders."""
    row = [words(3, 4), A, BEFORE, B, AFTER]
    columns_hidden = columns(kind, *row[:2]) if hidden == "whole" else 6
    seen = columns(kind, *row[:4]) - columns_hidden
    for pictures, known in (
        (row, 0),
        (row, None),
        ([row[0], C, *row[2:]], 0),
        ([*row[:3], C, AFTER], None),
        (row, None),
    ):
        given = prompt(kind, pictures)
        given["attention_mask"][0, :columns_hidden] = 0
        try:
            expected = answer(seeing(kind), given)
        except RuntimeError:
            assert hidden == "part" and kind in BY_GRID  # noqa: PT018 - positions of part of an image
            with pytest.raises(RuntimeError):
                answer(seeing(kind), given, cache)
            return
        found = answer(seeing(kind), given, cache)
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-3)
        if known is not None and (hidden == "part" or pictures is row):
            assert cache.last_turn.cached_tokens == known
        elif known is None:
            assert 0 < cache.last_turn.cached_tokens <= seen + len(AFTER) - 1


@pytest.mark.sample(3)  # of 8
@pytest.mark.parametrize("chunk", [3, 5, 8, 13])
@pytest.mark.parametrize("what", ["words", "picture"])
def test_chunks_that_split_a_bidirectional_run_are_not_reused(cache, what, chunk):
    """Split tokens get other K and V, so no other turn reuses the result of such a turn."""
    model, types = seeing("gemma3"), torch.zeros(1, 30, dtype=torch.long)
    given = prompt("gemma3", [BEFORE, A, BETWEEN])
    if what == "words":
        types[0, 6:20] = 1
        ids = torch.tensor([words(30)])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}
    for settings in ({"prefill_chunk_size": chunk}, {}, {"prefill_chunk_size": chunk}, {}, {"prefill_chunk_size": 64}):
        found, expected = answer(model, given, cache, **settings), answer(model, given, **settings)
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-3)
        if settings == {"prefill_chunk_size": chunk}:
            assert "attend to each other both ways" in cache.last_turn.miss_reason
    assert cache.last_turn.cached_tokens == given["input_ids"].shape[1] - 1
    ids = torch.tensor([words(30, 5)])  # plain text attends only to earlier tokens
    for known in (0, 29):
        answer(model, {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}, cache, prefill_chunk_size=chunk)
        assert cache.last_turn.cached_tokens == known
