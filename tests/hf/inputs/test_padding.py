"""A stored prefix is reused beside other padding only where its K and V do not depend on the padding."""

from __future__ import annotations

import pytest
import torch

from kvtier import TieredCache
from kvtier.hf.compat.model_profiles import why_off
from sweep.models import tiny_model
from sweep.turns import padded

SETTINGS = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def prompt(columns, seed=0):
    return torch.randint(2, 60, (1, columns), generator=torch.Generator().manual_seed(seed))


def ask(model, ids, mask, cache):
    """Check that the answer equals the one without a cache; return the number of reused tokens of each row."""
    settings = {**SETTINGS, "attention_mask": mask, "suppress_tokens": [0]}
    found, expected = model.generate(ids, past_key_values=cache, **settings), model.generate(ids, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-3)
    return [row.cached_tokens for row in cache.last_turn.rows]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "mpt", "biogpt", "xglm", "falcon"])
def test_prompt_is_reused_beside_other_padding(store, name):
    model, texts = tiny_model(name), [prompt(20), prompt(29, 2)]
    with TieredCache(store) as cache:
        for text in texts:
            assert ask(model, *padded(text), cache) == [0]
        longer = [torch.cat([text, prompt(3, 1)], 1) for text in texts]
        short, long = ask(model, *padded(*longer), cache)
        assert short >= 20
        assert long >= 29
        assert ask(model, *padded(longer[0]), cache) == [22]


@pytest.mark.parametrize("name", ["bart", "marian", "roformer", "whisper", "trocr"])
def test_only_unpadded_prompts_are_reused_if_positions_count_padding(store, name):
    model, text = tiny_model(name), prompt(20)
    if why_off(model) is not None:
        pytest.skip("this transformers continues it wrongly")
    with TieredCache(store) as cache:
        assert ask(model, *padded(text), cache) == [0]
        longer = torch.cat([text, prompt(3, 1)], 1)
        assert ask(model, *padded(longer, prompt(29, 2)), cache) == []
        assert "count padding" in cache.last_turn.miss_reason
        assert ask(model, *padded(longer), cache)[0] >= 20


@pytest.mark.parametrize("name", ["git", "minimax_m3_vl_text"])
def test_padded_rows_are_not_reused_if_they_continue_differently(store, name):
    model, text = tiny_model(name), prompt(20)
    if why_off(model) is not None:
        pytest.skip("this transformers continues it wrongly")
    with TieredCache(store) as cache:
        for _ in range(2):
            assert ask(model, *padded(text, prompt(9, 1)), cache) == []
            assert "padded rows" in cache.last_turn.miss_reason
        ask(model, *padded(text), cache)
        assert ask(model, *padded(text), cache) == [19]
