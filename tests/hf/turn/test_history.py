"""``cache.history``, ``cache.totals``, and how caches, stores, statistics and names are shown."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria

from kvtier import PrefixStore, TieredCache
from tests.support.upstream import CACHE


def test_history_has_the_report_of_each_ended_turn(model, generate, tokens, cache):
    assert cache.history == ()
    reports = []
    for seed in (1, 1, 2):
        generate(model, tokens(20, seed=seed), cache)
        reports.append(cache.last_turn)
    assert cache.history == tuple(reports)
    assert cache.totals.turns == 3
    assert cache.totals.prompt_tokens == 60
    assert cache.totals.cached_tokens == cache.totals.cached_by_tier["device"] == 19
    assert cache.totals.generated_tokens == 24
    cache.reset()
    assert len(cache.history) == 3


def test_running_turn_is_not_in_the_history(model, tokens, cache):
    ids = tokens(20)
    cache.begin(model, ids)
    assert cache.history == ()
    model(ids, **{CACHE: cache})
    ended = cache.commit(ids)
    assert cache.history == (ended,)


def test_interrupted_turn_that_keeps_its_prompt_is_in_the_history(model, generate, tokens, cache):
    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tokens(20), cache, stopping_criteria=[Stop()])
    assert [report.prompt_tokens for report in cache.history] == [20]
    assert cache.history[0].kept_tokens == 20


def test_fork_begins_with_an_empty_history(model, generate, tokens, cache):
    generate(model, tokens(20), cache)
    with cache.fork() as fork:
        assert (fork.history, fork.totals.turns) == ((), 0)
        assert fork.last_turn == cache.last_turn
        generate(model, tokens(20), fork)
        assert (len(fork.history), len(cache.history)) == (1, 1)


def test_turn_without_reuse_is_counted_as_such(model, generate, tokens, cache):
    generate(model, tokens(20), cache, use_cache=False)
    assert (cache.totals.turns, cache.totals.turns_without_reuse) == (1, 1)


def test_kept_tokens_are_those_of_prompt_and_answer_whose_k_and_v_exist(model, generate, tokens, cache):
    generate(model, tokens(20, rows=2), cache, max_new_tokens=5)
    assert cache.last_turn.kept_tokens == 2 * (20 + 4)
    usage = cache.last_turn.usage
    assert (usage["cache_creation_input_tokens"], usage["input_tokens"]) == (40, 0)


def test_cold_seconds_are_estimated_once_a_pass_was_measured(model, generate, tokens, store):
    with TieredCache(store, reuse="auto") as cache:
        generate(model, tokens(40), cache)
        generate(model, tokens(40), cache)
        assert cache.last_turn.cached_by_tier["device"] == 39
        assert cache.last_turn.cold_seconds > 0
        assert "cold would take about" in str(cache.last_turn)
        assert cache.totals.estimated_turns == 1


def test_report_keeps_ids_around_the_difference(model, generate, tokens, cache):
    """Of the known ids, those in the block in which the prompt differs."""
    ids = tokens(30)
    changed = ids.clone()
    changed[0, 12] = 199 - ids[0, 12]
    generate(model, ids, cache)
    generate(model, changed, cache)
    found = cache.last_turn.divergence
    assert found.before == tuple(ids[0, 4:12].tolist())
    assert found.seen_after == tuple(changed[0, 12:28].tolist())
    assert found.known_after == tuple(ids[0, 12:16].tolist())


def test_caches_stores_statistics_and_names_are_shown_in_one_short_line(model, generate, tokens, tmp_path):
    with PrefixStore(tmp_path / "store", block_size=8, namespace="mine") as store, TieredCache(store) as cache:
        assert f"{cache!r}".endswith("0 tokens, 0 layers, 0 turns>")
        generate(model, tokens(20, rows=2), cache)
        cache.name("greeting", pin=True)
        store.flush()
        shown = [repr(each) for each in (cache, store, store.stats(), store.names()[0])]
        layers = len(cache.layers)
        assert shown[0].endswith(f"27 tokens in 2 rows, {layers} layers, 1 turn>")
        assert "block_size=8, namespace='mine'" in shown[1]
        assert "of 40 tokens found" in shown[2]
        assert "'greeting': 27 of 27 tokens" in shown[3]
        assert shown[3].endswith("pinned>")
    shown += [repr(cache), repr(store)]
    assert all("closed" in each for each in shown[-2:])
    assert not [each for each in shown if "\n" in each or len(each) > 200 + 2 * len(str(tmp_path))]
    with PrefixStore() as in_ram:
        assert "in RAM" in repr(in_ram)
        assert "<StoreStats of RAM: host 0 B in 0 blocks" in repr(in_ram.stats())


def test_repr_of_a_cache_does_not_wait_or_change_anything(model, tokens, cache):
    ids = tokens(20)
    cache.begin(model, ids)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
    before = cache.get_seq_length()
    assert "20 tokens" in repr(cache)
    assert cache.get_seq_length() == before
    cache.commit(ids)
