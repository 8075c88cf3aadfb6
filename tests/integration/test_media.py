"""Pictures and sounds are part of the chain at the place where they enter: the same are reused, others never."""

from __future__ import annotations

import pytest
import torch
from mediakit import BY_GRID, FAMILIES, PLACE, Picture, answer, new_words, prompt, seeing, words

from kvtier import TieredCache

BEFORE, BETWEEN, AFTER = words(12, 1), words(9, 2), words(7, 3)
A, B, C = Picture(10), Picture(11), Picture(12)


def columns(kind, *row):
    """Return how many columns the parts of a row have."""
    return prompt(kind, row)["input_ids"].shape[1]


@pytest.fixture(params=FAMILIES)
def kind(request):
    """A family that sees or hears."""
    return request.param


@pytest.fixture
def turn(cache):
    """``turn(kind, *rows, on=cache, **settings)``: equal to plain transformers; returns how much was reused."""

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


def test_what_is_seen_decides_the_answer(kind):
    model = seeing(kind)
    ours, other = (answer(model, prompt(kind, [BEFORE, p, AFTER])).logits[0] for p in (A, B))
    assert (ours - other).abs().max() > 0.1


def test_same_picture_is_reused(kind, turn, store):
    row = [BEFORE, A, AFTER]
    known = columns(kind, *row) - 1
    assert turn(kind, row) == 0
    assert turn(kind, row) == known
    with TieredCache(store) as restored:
        assert turn(kind, row, on=restored) == known
        assert restored.last_turn.cached_by_tier["host"] == known


def test_another_picture_reuses_the_words_before_it(kind, turn):
    turn(kind, [BEFORE, A, AFTER])
    assert turn(kind, [BEFORE, B, AFTER]) == 12 + 1  # the words, and the id that begins a picture
    assert turn(kind, [BEFORE, A, AFTER]) == columns(kind, BEFORE, A, AFTER) - 1


def test_same_picture_and_other_words_after_it(kind, turn):
    turn(kind, [BEFORE, A, AFTER])
    # Where positions go on after a picture, they are marked too, in the ids that follow.
    ends = columns(kind, BEFORE, A) - (kind in BY_GRID)
    assert turn(kind, [BEFORE, A, words(9, 8)]) == ends
    assert turn(kind, [BEFORE, A, AFTER[:5], *[words(9, 8)]]) == columns(kind, BEFORE, A, AFTER[:5])
    assert turn(kind, [words(12, 9), A, AFTER]) == 0


def test_a_conversation_about_pictures(kind, turn, store, tmp_path):
    """A picture is added in each turn, and each turn is also restored elsewhere."""
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


def test_second_of_two_pictures_changes(kind, turn):
    turn(kind, [BEFORE, A, BETWEEN, B, AFTER])
    assert turn(kind, [BEFORE, A, BETWEEN, C, AFTER]) == columns(kind, BEFORE, A, BETWEEN) + 1
    assert turn(kind, [BEFORE, B, BETWEEN, A, AFTER]) == 12 + 1
    assert turn(kind, [BEFORE, A, BETWEEN, B, AFTER]) == columns(kind, BEFORE, A, BETWEEN, B, AFTER) - 1


def test_another_conversation_in_between(kind, turn, store):
    """Whatever a model remembers of its last call, such as how far positions are ahead, is of another prompt."""
    turn(kind, [BEFORE, A, AFTER])
    said = turn.said
    with TieredCache(store) as other:
        turn(kind, [words(5, 20), B, words(3, 21), C, AFTER], on=other)
        turn(kind, [words(30, 22)], on=other)
    assert turn(kind, [BEFORE, A, AFTER, said, AFTER]) == columns(kind, BEFORE, A, AFTER, said) - 1
    with TieredCache(store) as other:
        turn(kind, [words(5, 20), B, words(3, 21), C, AFTER], on=other)
    assert turn(kind, [BEFORE, A, AFTER, said, AFTER]) == columns(kind, BEFORE, A, AFTER, said, AFTER) - 1


def test_words_alone_are_reused_whatever_was_seen_before(kind, turn, store):
    turn(kind, [BEFORE])
    said = turn.said
    with TieredCache(store) as other:
        turn(kind, [words(5, 20), B, AFTER], on=other)
    assert turn(kind, [BEFORE, said, AFTER]) == 12 + len(said) - 1
    assert turn(kind, [BEFORE, said, AFTER, A, BETWEEN]) == 12 + len(said) + 7


def test_rows_see_different_pictures(kind, turn, cache, store):
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


def test_rows_swap_their_pictures(kind, turn):
    turn(kind, [BEFORE, A, AFTER], [BEFORE, B, AFTER])
    known = columns(kind, BEFORE, A, AFTER) - 1
    assert turn(kind, [BEFORE, B, AFTER], [BEFORE, A, AFTER]) == 2 * known
    assert turn(kind, [BEFORE, A, AFTER], [BEFORE, A, AFTER]) == 2 * known


def test_rows_with_and_without_pictures(kind, turn):
    rows = [[BEFORE, A, BETWEEN, B, AFTER], [BEFORE, C, AFTER]]
    turn(kind, *rows)
    turn(kind, *rows)
    turn(kind, [BEFORE, A, BETWEEN, C, AFTER], rows[1])


@pytest.mark.parametrize("kind", BY_GRID)
def test_pictures_of_different_sizes(turn, kind):
    wide = Picture(13, wide=True)
    row = [BEFORE, A, BETWEEN, wide, AFTER]
    turn(kind, row)
    assert turn(kind, [*row, B, AFTER]) == columns(kind, *row)
    assert turn(kind, [BEFORE, A, BETWEEN, A, AFTER]) == columns(kind, BEFORE, A, BETWEEN) + 1
    assert turn(kind, [BEFORE, wide, BETWEEN, A, AFTER]) == 12 + 1


@pytest.mark.parametrize("kind", [k for k in FAMILIES if k not in BY_GRID])  # where transformers can tell them apart
def test_pictures_side_by_side(kind, turn):
    """No word between them: they may attend to each other, and are one."""
    left, right = Picture(10, bare=True), Picture(11, bare=True)
    known = columns(kind, BEFORE, left, right)
    turn(kind, [BEFORE, left, right, AFTER])
    assert turn(kind, [BEFORE, left, right, AFTER]) == known + 7 - 1
    assert turn(kind, [BEFORE, left, right, BETWEEN]) == known
    assert turn(kind, [BEFORE, right, left, AFTER]) == 12
    assert turn(kind, [BEFORE, left, AFTER, right]) == 12


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_and_samples(kind, turn, cache, settings):
    row = [BEFORE, A, AFTER]
    turn(kind, row, **settings)
    assert turn(kind, row, **settings) == columns(kind, *row) - 1
    two = [*row, B, BETWEEN]
    turn(kind, two, **settings)  # fed together, or not at all
    assert cache.last_turn.cached_tokens == (0 if kind == "voxtral" else 13)
    if kind == "voxtral":  # transformers gives beams each other's sounds
        assert "each beam" in cache.last_turn.miss_reason
    assert turn(kind, two, **settings) == (0 if kind == "voxtral" else columns(kind, *two) - 1)
    assert turn(kind, [*two, C, AFTER]) >= columns(kind, *row)


def test_placeholders_without_pictures_are_words(kind, turn):
    """Their ids are what they are; the same ids with pictures are others."""
    model = seeing(kind)
    seen = prompt(kind, [BEFORE, A, AFTER])
    unseen = {name: seen[name] for name in ("input_ids", "attention_mask")}
    with TieredCache() as cache:
        answer(model, seen, cache)
        expected = answer(model, unseen)
        assert torch.equal(answer(model, unseen, cache).sequences, expected.sequences)
        assert cache.last_turn.cached_tokens == 13
        assert torch.equal(answer(model, seen, cache).sequences, answer(model, seen).sequences)


def test_loops_are_not_told_of_pictures(kind, cache):
    model, given = seeing(kind), prompt(kind, [BEFORE, A, AFTER])
    report = cache.begin(model, given["input_ids"])
    assert "placeholders" in report.miss_reason
    assert cache.get_seq_length() == 0
    assert PLACE in given["input_ids"]
