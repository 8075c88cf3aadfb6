"""Prompts of embeddings are matched by their values and those of all earlier vectors."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvtier import TieredCache
from tests.support.media import answer, seeing, words
from tests.support.upstream import CACHE

PROOF = 4  # last columns of a match: they only prove the columns before them


@pytest.fixture
def turn(model, cache):
    """``turn(embeds, on=cache, **settings)`` compares with plain transformers and returns the reused tokens."""

    def run(embeds, on=cache, seer=model, **settings):
        settings = {"max_new_tokens": 6, "do_sample": False, **settings}
        torch.manual_seed(5)
        reference = DynamicCache(config=seer.config)
        expected = seer.generate(inputs_embeds=embeds, **{CACHE: reference}, **settings)
        torch.manual_seed(5)
        assert torch.equal(seer.generate(inputs_embeds=embeds, past_key_values=on, **settings), expected)
        return on.last_turn.cached_tokens

    return run


@pytest.fixture
def vectors():
    """``vectors(columns, rows, seed)`` returns vectors that are no token's embedding."""

    def make(columns, rows=1, seed=0):
        return torch.randn(rows, columns, 64, generator=torch.Generator().manual_seed(seed))

    return make


def test_equal_embeddings_are_reused(turn, vectors, store, tmp_path):
    embeds = vectors(30)
    assert turn(embeds) == 0
    assert turn(embeds) == 30 - 1 - PROOF
    longer = torch.cat([embeds, vectors(9, seed=1)], 1)
    assert turn(longer) == 30 - PROOF
    with TieredCache(store) as restored:
        assert turn(longer, on=restored) == 39 - 1 - PROOF
    with TieredCache(tmp_path) as disk:
        turn(embeds, on=disk)
        disk.flush()
    with TieredCache(tmp_path) as disk:
        assert turn(longer, on=disk) == 30 - PROOF


@pytest.mark.parametrize("changed", [0, 3, 4, 5, 17, 29])
def test_change_of_one_vector_limits_reuse_to_earlier_vectors(turn, vectors, changed):
    embeds = vectors(30)
    turn(embeds)
    other = embeds.clone()
    other[0, changed, 7] += 1e-3
    assert turn(other) == max(0, changed - PROOF)
    assert turn(embeds) == 29 - PROOF


def test_padded_embeddings_are_reused_without_their_padding(turn, vectors, cache):
    embeds, mask = vectors(30, rows=2), torch.ones(2, 30, dtype=torch.long)
    mask[1, :11] = 0
    turn(embeds, attention_mask=mask)
    other = embeds.clone()
    other[1, :11] = 7.0  # values in padding do not count
    assert turn(other, attention_mask=mask) == (29 - PROOF) + (29 - PROOF - 11)
    other[1, 20] = 7.0
    assert turn(other, attention_mask=mask) == (20 - PROOF) + (20 - PROOF - 11)
    alone = embeds[1:, 11:]
    assert turn(alone) == 18 - PROOF
    assert [row.prompt_tokens for row in cache.last_turn.rows] == [19]


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_and_samples_reuse_embeddings(turn, vectors, settings):
    embeds = vectors(30)
    turn(embeds, **settings)
    assert turn(embeds, **settings) == 29 - PROOF


def test_answers_to_embeddings_are_kept_as_token_ids(turn, vectors, model, cache):
    """The answer is fed as ids. Embeddings of the same tokens do not match these ids and are computed again."""
    embeds = vectors(30)
    said = model.generate(inputs_embeds=embeds, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert cache.last_turn.generated_tokens == 6
    assert cache.get_seq_length() == 35
    again = torch.cat([embeds, model.get_input_embeddings()(said).detach()], 1)
    assert turn(again) == 30 - PROOF


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_multimodal_models_reuse_embeddings(turn, vectors, store, kind):
    model = seeing(kind)
    embeds = vectors(30)
    turn(embeds, seer=model)
    with TieredCache(store) as other:
        words_alone = {"input_ids": torch.tensor([words(20)])}
        expected = answer(model, words_alone).sequences
        assert torch.equal(answer(model, words_alone, other).sequences, expected)
    assert turn(embeds, seer=model) == 29 - PROOF


def test_embeddings_with_pixel_values_turn_reuse_off(vectors, cache):
    model = seeing("llava")
    given = {"inputs_embeds": vectors(8), "pixel_values": torch.randn(1, 3, 8, 8)}
    with pytest.raises(ValueError, match="tokens"):  # transformers looks for placeholders among the vectors
        answer(model, given, cache)
    assert "embeddings and other inputs at once" in cache.last_turn.miss_reason


def test_embeddings_beside_ids_of_another_length_turn_reuse_off(vectors, tokens, model, cache):
    given = {"inputs_embeds": vectors(8), "input_ids": tokens(5), "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    for _ in range(2):
        expected = answer(model, given).sequences
        assert torch.equal(answer(model, given, cache).sequences, expected)
        assert cache.last_turn.cached_tokens == 0
    assert "different lengths" in cache.last_turn.miss_reason
