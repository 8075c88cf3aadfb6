"""Behaviours of generation that hold for every model and cache: one function per behaviour.

Each takes a ``Subject`` and asserts that a ``TieredCache`` does not change the behaviour.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.support import families
from tests.support.subject import CLOSE, Subject, assert_alike, outcome
from tests.support.upstream import CACHE, given

BEHAVIOURS: dict[str, Callable[[Subject], None]] = {}


def behaviour(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    BEHAVIOURS[function.__name__] = function
    return function


# --- greedy, sampled, beams -------------------------------------------------------------------------------------------


@behaviour
def greedy(subject: Subject) -> None:
    found = subject.check(subject.prompt(), max_new_tokens=8)
    assert found.sequences.shape == (1, 30)
    assert len(found.logits) == len(found.scores) == 8
    assert {step.shape for step in found.scores} == {(1, subject.config.get_text_config().vocab_size)}


@behaviour
def a_batch_of_even_rows(subject: Subject) -> None:
    subject.check(subject.prompt(rows=3))


@behaviour
def a_batch_of_uneven_rows(subject: Subject) -> None:
    subject.check(subject.padded((22, 9, 20)))


@behaviour
def a_single_word(subject: Subject) -> None:
    subject.check(subject.prompt(1))


@behaviour
def a_single_new_word(subject: Subject) -> None:
    subject.check(subject.prompt(), max_new_tokens=1)


@behaviour
def sampling(subject: Subject) -> None:
    subject.check(subject.prompt(), do_sample=True, top_k=0)
    subject.check(subject.prompt(rows=2, seed=1), do_sample=True, top_k=20, top_p=0.9, temperature=0.7)


@behaviour
def many_samples_of_a_prompt(subject: Subject) -> None:
    found = subject.check(subject.prompt(rows=2), do_sample=True, top_k=0, num_return_sequences=3)
    assert len(found.sequences) == 6


@behaviour
def beams(subject: Subject) -> None:
    found = subject.check(subject.prompt(rows=2), num_beams=3, num_return_sequences=2)
    assert len(found.sequences) == len(found.sequences_scores) == 4


@behaviour
def beams_of_uneven_rows_that_end(subject: Subject) -> None:
    subject.check(subject.padded(), num_beams=2, eos_token_id=list(range(1, 20)), early_stopping=True)


@behaviour
def beams_that_are_sampled(subject: Subject) -> None:
    subject.check(subject.prompt(), num_beams=2, do_sample=True, top_k=0)


# --- outputs ----------------------------------------------------------------------------------------------------------


@behaviour
def hidden_states_and_attentions(subject: Subject) -> None:
    """The same tensors with the same shapes at each step; for a cached prefix, only those of the computed tokens."""
    ids, shown = subject.prompt(), {"output_hidden_states": True, "output_attentions": True}
    expected = outcome(lambda: subject.reference(ids, **shown))
    with subject.cache() as cache:
        found = outcome(lambda: subject.ask(ids, cache, **shown))
        assert type(found) is type(expected), f"{type(found)}, not {type(expected)}"
        if isinstance(expected, Exception):
            return
        for name in ("logits", "scores", "hidden_states", "attentions"):
            assert_alike(found[name], expected[name])
        again = subject.ask(ids, cache, **shown)
        subject.compare(again, expected, False)
        for ours, theirs in zip(again.hidden_states, expected.hidden_states, strict=True):
            for mine, reference in zip(ours, theirs, strict=True):
                columns = mine.shape[-2]
                assert mine.shape[-1] == reference.shape[-1]
                if reference.ndim == 3:
                    assert torch.allclose(mine, reference[:, -columns:], rtol=0, atol=10 * CLOSE)


@behaviour
def scores_of_the_transitions(subject: Subject) -> None:
    ids = subject.prompt()
    expected = subject.reference(ids, num_beams=2)
    with subject.cache() as cache:
        for exact in (True, False):
            found = subject.ask(ids, cache, num_beams=2)
            ours, theirs = (
                subject.model.compute_transition_scores(each.sequences, each.scores, each.beam_indices)
                for each in (found, expected)
            )
            assert torch.allclose(ours, theirs, rtol=0, atol=0 if exact else CLOSE)


@behaviour
def the_cache_holds_what_a_dynamic_cache_holds(subject: Subject) -> None:
    """It holds all but the last word; K and V of full layers are the same bytes."""
    ids = subject.prompt()
    reference, kinds = getattr(subject.reference(ids), CACHE), DynamicCache(config=subject.config).layers
    with subject.cache() as cache:
        found = subject.ask(ids, cache)
        assert getattr(found, CACHE) is cache
        assert len(cache.layers) == len(reference.layers) == len(kinds)
        if not subject.family.kinds <= {"linear"}:
            assert cache.get_seq_length() == reference.get_seq_length() == found.sequences.shape[1] - 1
        for ours, theirs in zip(cache.layers, reference.layers, strict=True):
            assert type(ours) is not type(None)
            if type(theirs).__name__ in ("DynamicLayer", "DynamicIndexedLayer"):
                assert torch.equal(ours.keys, theirs.keys)
                assert torch.equal(ours.values, theirs.values)


class Notes(BaseStreamer):
    def __init__(self) -> None:
        self.words: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.words += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


@behaviour
def words_come_out_one_by_one(subject: Subject) -> None:
    with subject.cache() as cache:
        for _ in range(2):
            notes = Notes()
            found = subject.ask(subject.prompt(), cache, streamer=notes)
            assert notes.words == found.sequences[0].tolist()
            assert notes.ended == 1


# --- continuing -------------------------------------------------------------------------------------------------------


@behaviour
def with_and_without_a_cache(subject: Subject) -> None:
    ids = subject.prompt()
    subject.check(ids, against=subject.reference(ids, use_cache=False), exact=False)


@behaviour
def in_two_goes_as_in_one(subject: Subject) -> None:
    for ids in (subject.prompt(), subject.prompt(rows=2, seed=1)):
        whole = subject.reference(ids, max_new_tokens=8)
        with subject.cache() as cache:
            first = subject.ask(ids, cache, max_new_tokens=3)
            second = subject.ask(first.sequences, cache, max_new_tokens=5)
        assert torch.equal(second.sequences, whole.sequences)
        for ours, theirs in zip((*first.logits, *second.logits), whole.logits, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=CLOSE)


@behaviour
def a_conversation_of_uneven_rows(subject: Subject) -> None:
    ids = subject.padded()
    with subject.cache() as cache:
        for turn in range(3):
            expected = subject.reference(ids)
            subject.compare(subject.ask(ids, cache), expected, False)
            ids = torch.cat([expected.sequences, subject.prompt(4, rows=2, seed=turn)], 1)


@behaviour
def a_padded_row_as_alone(subject: Subject) -> None:
    if "pooled" in subject.family.kinds:  # the model pools words together with padding, which changes them
        return
    ids = subject.padded()
    alone = subject.reference(ids[1:, -9:])
    with subject.cache() as cache:
        subject.ask(ids[1:, -9:-2], cache)  # part of it is cached
        found = subject.ask(ids, cache)
    for ours, theirs in zip(found.logits, alone.logits, strict=True):
        assert torch.allclose(ours[1], theirs[0], rtol=0, atol=CLOSE)
    assert torch.equal(found.sequences[1, 22:], alone.sequences[0, 9:])


@behaviour
def prefill_in_chunks(subject: Subject) -> None:
    """The answer equals that of the whole prompt, even if transformers forgets states between chunks."""
    ids, chunks = subject.prompt(), {"prefill_chunk_size": 5}
    refusal = outcome(lambda: subject.reference(ids, **chunks))
    whole = subject.reference(ids)
    subject.check(ids, against=refusal if isinstance(refusal, Exception) else whole, exact=False, **chunks)


@behaviour
def prompts_of_embeddings(subject: Subject) -> None:
    """Two turns have embeddings as prompts; the second continues the first."""
    embed = subject.model.get_input_embeddings()
    ids = subject.prompt()
    with subject.cache() as cache:
        for turn in range(2):
            embeds = embed(ids).detach()
            given = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)}
            expected = outcome(lambda given=given: subject.reference(None, **given))
            found = outcome(lambda given=given: subject.ask(None, cache, **given))
            assert type(found) is type(expected), f"{type(found)}, not {type(expected)}"
            if isinstance(expected, Exception):
                return
            subject.compare(found, expected, False)
            ids = torch.cat([ids, expected.sequences, subject.prompt(3, seed=turn + 1)], 1)


# --- stopping, and banned words ---------------------------------------------------------------------------------------


@behaviour
def rows_that_end(subject: Subject) -> None:
    """Rows end at different steps and are padded; the next turn continues from them."""
    ids, ends = subject.prompt(rows=3), {"eos_token_id": list(range(1, 25)), "max_new_tokens": 8}
    found = subject.check(ids, **ends)
    assert found.sequences.shape[1] > 22
    with subject.cache() as cache:
        subject.ask(ids, cache, **ends)
        longer = torch.cat([found.sequences[:1], subject.prompt(4, seed=3)], 1)
        subject.compare(subject.ask(longer, cache), subject.reference(longer), False)


@behaviour
def at_least_so_many_words(subject: Subject) -> None:
    ends = list(range(1, 40))
    found = subject.check(subject.prompt(), eos_token_id=ends, min_new_tokens=4, max_new_tokens=8)
    assert found.sequences.shape[1] >= 26
    assert not set(found.sequences[0, 22:25].tolist()) & set(ends)


class WhenLong(StoppingCriteria):
    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.columns, dtype=torch.bool)


@behaviour
def a_stop_of_ones_own(subject: Subject) -> None:
    found = subject.check(subject.prompt(rows=2), stopping_criteria=StoppingCriteriaList([WhenLong(25)]))
    assert found.sequences.shape[1] == 25


class NotAgain(LogitsProcessor):
    """Bans every word of the whole prompt so far."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, input_ids, float("-inf"))


@behaviour
def a_processor_of_ones_own(subject: Subject) -> None:
    ids = subject.prompt()
    found = subject.check(ids, logits_processor=LogitsProcessorList([NotAgain()]))
    assert not set(found.sequences[0, 22:].tolist()) & set(ids[0].tolist())


@behaviour
def processors_that_read_the_prompt(subject: Subject) -> None:
    ids = subject.prompt()
    subject.check(ids, repetition_penalty=1.5, no_repeat_ngram_size=2, bad_words_ids=[[3], [5, 6]])
    subject.check(ids, prefix_allowed_tokens_fn=lambda row, said: [1 + len(said) % 50, 5, 7])


@behaviour
def guidance(subject: Subject) -> None:
    """Each step has a second, unconditional pass with its own cache."""
    subject.check(subject.prompt(), guidance_scale=1.5)


# --- other ways -------------------------------------------------------------------------------------------------------


@behaviour
def prompt_lookup(subject: Subject) -> None:
    ids = subject.prompt(12).repeat(1, 2)
    _as_greedy(subject, ids, prompt_lookup_num_tokens=3)


@behaviour
def assisted(subject: Subject) -> None:
    _as_greedy(subject, subject.prompt(), assistant_model=families.build(subject.name, seed=1))


def _as_greedy(subject: Subject, ids: torch.Tensor, **settings: Any) -> None:
    """Guessing ahead gives the words of greedy decoding; models with states may refuse it."""
    refused = isinstance(outcome(lambda: subject.reference(ids, **settings)), Exception)
    greedy = subject.reference(ids)
    with subject.cache() as cache:
        for _ in range(2):
            found = outcome(lambda: subject.ask(ids, cache, **settings))
            if not refused or not isinstance(found, Exception):
                assert torch.equal(found.sequences, greedy.sequences)
            subject.compare(subject.ask(ids, cache), greedy, False)


@behaviour
def a_loop_of_ones_own(subject: Subject) -> None:
    """The loop calls ``begin``, forward passes and ``commit``."""
    ids = subject.prompt()
    expected = subject.reference(ids).sequences
    with subject.cache() as cache, torch.no_grad():
        for _ in range(2):
            known = cache.begin(subject.model, ids).cached_tokens
            sequence, fed = ids, ids[:, known:]
            for _ in range(5):
                logits = _forward(subject, fed, cache, known).logits[:, -1, 1:]
                known += fed.shape[1]
                fed = logits.argmax(-1, keepdim=True) + 1
                sequence = torch.cat([sequence, fed], 1)
            assert torch.equal(sequence, expected)
            cache.commit(sequence)


def _forward(subject: Subject, fed: torch.Tensor, cache: Any, begin: int, **settings: Any) -> Any:
    """Run one forward pass over the columns from ``begin`` on; some models count from 0 unless they get positions."""
    accepted = inspect.signature(subject.model.forward).parameters
    settings |= given(subject.model, cache)
    if "position_ids" in accepted:
        settings["position_ids"] = torch.arange(begin, begin + fed.shape[1])[None].expand(len(fed), -1)
    return subject.model(fed, use_cache=True, **settings)


@behaviour
def logits_of_the_last_words_only(subject: Subject) -> None:
    if "logits_to_keep" not in inspect.signature(subject.model.forward).parameters:
        return
    ids = subject.prompt()
    with subject.cache() as cache, torch.no_grad():
        whole = subject.model(ids, use_cache=False).logits
        known = cache.begin(subject.model, ids).cached_tokens
        kept = _forward(subject, ids[:, known:], cache, known, logits_to_keep=2).logits
        cache.commit(ids)
    assert kept.shape[1] == 2
    assert torch.allclose(kept, whole[:, -2:], rtol=0, atol=CLOSE)


@behaviour
def rows_that_change_places(subject: Subject) -> None:
    """Rows change places as beams do between steps: the next step sees the rows at their new places."""
    ids, order = subject.prompt(rows=3), torch.tensor([2, 0, 0])
    steps = []
    with subject.cache() as cache, torch.no_grad():
        reference = DynamicCache(config=subject.config)
        cache.begin(subject.model, ids)
        for each in (cache, reference):
            _forward(subject, ids, each, 0)
            each.reorder_cache(order)
            steps.append(_forward(subject, ids[:, :1], each, ids.shape[1]).logits)
    assert torch.equal(*steps)
