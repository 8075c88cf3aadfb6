"""generate() returns its answer even if kvtier does not know its form, or fails while keeping it."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from kvtier import TieredCache
from kvtier.hf.turn.turn import Turn
from tests.support import oddities
from tests.support.reuse import reuse_off
from tests.support.upstream import CACHE

pytestmark = reuse_off

SETTINGS = {"max_new_tokens": 4, "do_sample": False}
UNREAD = "returned no ids [rows, columns] that go on from the prompt"


KNOWN = {"plain-dict": lambda ids: {"sequences": ids}}
FORMS = {
    "tuple": lambda ids: (ids, None),
    "dict": lambda ids: {"audio": ids.float()},
    "text": lambda ids: "a song",
    "nothing": lambda ids: None,
    "frames": lambda ids: ids[..., None].repeat(1, 1, 4),
    "wave": lambda ids: torch.randn(len(ids), 4000),
    "waves": lambda ids: torch.randn(len(ids), 1, 4000),
    "truths": lambda ids: ids > 3,
    "new-alone": lambda ids: ids[:, -4:],
    "other-rows": lambda ids: torch.cat([ids, ids[:1]]),
    "dict-of-frames": lambda ids: {"sequences": ids[..., None]},
    "dict-without": lambda ids: {"sequences": None},
}


def answering(model, form):
    """The model with a ``_sample`` that returns its sequences in another form."""

    class Odd(LlamaForCausalLM):
        def _sample(self, *args, **kwargs):
            return (FORMS | KNOWN)[form](super()._sample(*args, **kwargs))

    model.__class__ = Odd
    return model


def equal(found, expected):
    if isinstance(found, torch.Tensor):
        return found.shape == expected.shape and torch.equal(found, expected)
    if isinstance(found, (tuple, list)):
        return all(equal(a, b) for a, b in zip(found, expected, strict=True))
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(equal(found[name], expected[name]) for name in found)
    return found == expected


@pytest.mark.parametrize("form", FORMS)
def test_answer_in_an_unknown_form_is_returned_and_not_kept(model, tokens, cache, caplog, form):
    odd, ids = answering(model, form), tokens(12, rows=2)
    for _ in range(2):
        torch.manual_seed(0)
        expected = odd.generate(ids, **{CACHE: DynamicCache(config=odd.config)}, **SETTINGS)
        torch.manual_seed(0)
        assert equal(odd.generate(ids, past_key_values=cache, **SETTINGS), expected)
        assert cache.last_turn.cached_tokens == 0
        assert UNREAD in cache.last_turn.miss_reason
    assert not caplog.records


def test_sequences_in_a_plain_dict_are_kept(model, tokens, cache):
    odd, ids = answering(model, "plain-dict"), tokens(12)
    odd.generate(ids, past_key_values=cache, **SETTINGS)
    odd.generate(ids, past_key_values=cache, **SETTINGS)
    assert cache.last_turn.cached_tokens == 11


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("x"), RuntimeError("shape"), AssertionError("never")])
@pytest.mark.parametrize("where", ["reads", "generated", "named"])
def test_error_while_keeping_an_answer_still_returns_the_answer(
    model, generate, tokens, cache, monkeypatch, caplog, error, where
):
    """One warning says what happened. The next turn works as usual."""

    def fail(*args, **kwargs):
        raise error

    ids = tokens(20)
    generate(model, tokens(20, seed=1), cache)
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING, logger="kvtier"):
        broken.setattr(Turn, where, fail)
        found = generate(model, ids, cache)
    assert torch.equal(found.sequences, generate(model, ids).sequences)
    (record,) = caplog.records
    assert "this turn is not kept" in record.getMessage()
    assert type(error).__name__ in record.getMessage()
    assert cache.turns.resident() is None
    for known in (0, 27):
        again = generate(model, found.sequences, cache)
        assert torch.equal(again.sequences, generate(model, found.sequences).sequences)
        assert cache.last_turn.cached_tokens == known


def test_interrupt_while_keeping_an_answer_is_raised(model, generate, tokens, cache, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(Turn, "named", stop)
        with pytest.raises(KeyboardInterrupt):
            generate(model, tokens(20), cache)
    found = generate(model, tokens(20), cache)
    assert torch.equal(found.sequences, generate(model, tokens(20)).sequences)


@pytest.mark.parametrize("by", ["ids", "embeddings", "both"])
def test_csm_audio_frames_are_returned_unchanged(store, by):
    """CSM answers text with audio frames: [rows, frames, codes]."""
    model = oddities.csm()
    ids = torch.randint(3, 49, (1, 12), generator=torch.Generator().manual_seed(0))
    embeds = model.embed_text_tokens(ids)
    given = {"ids": {"input_ids": ids}, "embeddings": {"inputs_embeds": embeds}}
    given["both"] = given["ids"] | given["embeddings"]
    torch.manual_seed(0)
    expected = model.generate(**given[by], **SETTINGS)
    with TieredCache(store) as cache:
        for _ in range(2):
            torch.manual_seed(0)
            assert torch.equal(model.generate(**given[by], past_key_values=cache, **SETTINGS), expected)
            assert UNREAD in cache.last_turn.miss_reason


def test_blt_is_answered_without_reuse(store):
    """BLT forms other patches when it continues from a cache than when it computes all at once."""
    model = oddities.blt()
    ids = torch.randint(4, 200, (1, 24), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, **SETTINGS)
    with TieredCache(store) as cache:
        for _ in range(3):
            assert torch.equal(model.generate(ids, past_key_values=cache, **SETTINGS), expected)
            assert "other patches" in cache.last_turn.miss_reason
        longer = torch.cat([expected, ids[:, :5]], 1)
        assert torch.equal(
            model.generate(longer, past_key_values=cache, **SETTINGS), model.generate(longer, **SETTINGS)
        )
