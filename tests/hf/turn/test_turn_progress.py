"""``TieredCache(progress=…)``: prompts, loads, commits and rebuilds tell how far they are, and nothing else changes."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import StoppingCriteria

from kvtier import ConfigurationError, PrefixStore, TieredCache
from tests.support import families
from tests.support.upstream import CACHE


class Events:
    """A callback that keeps its events."""

    def __init__(self):
        self.all = []

    def __call__(self, event):
        self.all.append(event)

    def of(self, kind):
        return [event for event in self.all if event.kind == kind]

    def take(self):
        found, self.all = self.all, []
        return found


@pytest.fixture
def events():
    return Events()


def assert_whole(events, total):
    """The events of one piece of work: from nothing to everything, the last one says so."""
    assert events, "nothing was told"
    done = [event.done for event in events]
    assert done == sorted(done)
    assert (done[0], done[-1], events[-1].total) == (0, total, total)
    assert [event.ended for event in events] == [False] * (len(events) - 1) + [True]


def test_prefill_is_told_layer_by_layer(model, generate, tokens, store, events):
    with TieredCache(store, progress=events) as cache:
        generate(model, tokens(40), cache)
        found, layers = events.of("prefill"), len(cache.layers)
        assert_whole(found, 40)
        assert {event.unit for event in found} == {"tokens"}
        if model.device.type == "cpu":
            assert [event.done for event in found[:layers]] == [40 * layer // layers for layer in range(layers)]
        events.take()
        generate(model, tokens(40), cache)
        assert_whole(events.of("prefill"), 1)


def test_chunks_of_a_prompt_and_rows_of_a_batch_are_counted(model, generate, tokens, store, events):
    with TieredCache(store, progress=events) as cache:
        generate(model, tokens(40, rows=2), cache, prefill_chunk_size=16)
    found = events.of("prefill")
    assert_whole(found, 80)
    assert {32, 64} <= {event.done for event in found}


def test_answer_of_one_token_ends_the_prefill(model, generate, tokens, store, events):
    with TieredCache(store, progress=events) as cache:
        generate(model, tokens(40), cache, max_new_tokens=1)
    assert_whole(events.of("prefill"), 40)


def test_decoding_tells_nothing(model, generate, tokens, store, events):
    class Count(StoppingCriteria):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores, **kwargs):
            self.seen.append(len(events.all))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    count = Count()
    with TieredCache(store, progress=events) as cache:
        generate(model, tokens(40), cache, stopping_criteria=[count])
        assert cache.turns.turn is None
    assert len(set(count.seen[1:])) == 1, "the first decoding pass ends the prefill"


@pytest.mark.parametrize("reuse", ["always", "auto"])
def test_load_and_commit_are_told(model, generate, tokens, tmp_path, events, reuse):
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store) as cache:
        generate(model, tokens(64), cache)
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store, progress=events, reuse=reuse) as cache:
        answer = generate(model, tokens(64), cache)
        assert torch.equal(answer.sequences, generate(model, tokens(64)).sequences)
        report = cache.last_turn
        if report.decision == "load":
            assert_whole(events.of("load"), report.restored_bytes)
            assert {event.unit for event in events.of("load")} == {"bytes"}
        assert events.of("commit")[-1].done == report.kept_tokens
        assert_whole(events.of("commit"), report.kept_tokens)


def test_commit_of_a_batch_counts_the_tokens_of_all_rows(model, generate, tokens, store, events):
    with TieredCache(store, progress=events) as cache:
        generate(model, tokens(40, rows=2), cache)
        found = events.of("commit")
        assert_whole(found, cache.last_turn.kept_tokens)
        assert len(found) > 8, "block by block"


def test_load_of_a_custom_loop_is_told(model, generate, tokens, store, events):
    with TieredCache(store) as cache:
        generate(model, tokens(64), cache)
    with TieredCache(store, progress=events) as cache:
        report = cache.begin(model, tokens(64))
        assert_whole(events.of("load"), report.restored_bytes)
        with torch.no_grad():
            model(tokens(64)[:, 63:], **{CACHE: cache})
        cache.commit(tokens(64))
    assert_whole(events.of("prefill"), 1)


def test_loop_that_feeds_less_than_the_prompt_does_not_claim_the_rest(model, tokens, store, events):
    with TieredCache(store, progress=events) as cache:
        cache.begin(model, tokens(40))
        with torch.no_grad():
            model(tokens(40)[:, :30], **{CACHE: cache})
        cache.commit(tokens(40))
    last = events.of("prefill")[-1]
    assert (last.done, last.total, last.ended) == (30, 40, True)


@pytest.mark.parametrize("name", ["mamba", "jamba", "gemma3"])
def test_models_with_states_and_windows_tell_their_prompts(tokens, store, events, name):
    model = families.build(name)
    ids = tokens(40) % model.config.get_text_config().vocab_size
    with TieredCache(store, progress=events) as cache:
        for _ in range(2):
            model.generate(ids, **{CACHE: cache}, max_new_tokens=4, do_sample=False)
            assert_whole(events.of("prefill"), cache.last_turn.computed_tokens)
            events.take()


def test_cold_layers_load_with_progress(model, generate, tokens, tmp_path, events):
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store) as cache:
        generate(model, tokens(200), cache)
    with PrefixStore(tmp_path, block_size=8) as store:
        with TieredCache(store, progress=events, device_budget="200KB", spill_dir=tmp_path / "spill") as cache:
            generate(model, tokens(200), cache)
            assert cache.last_turn.cached_tokens == 199
        found = events.of("load")
        assert found[-1].ended
        assert found[-1].done == found[-1].total > 0


def test_prompt_that_is_computed_while_it_loads_tells_both(model, generate, tokens, store, events):
    """The total of the prefill shrinks when both meet."""
    from kvtier.hf.turn.reporting.turn_progress import TurnProgress
    from kvtier.progress import Progress

    told = TurnProgress(Progress(events), columns=100, begin=10, rows=1, layers=4, by_layer=True)
    told.loading(900)
    assert told.appending(0, 10, 20, 1)
    told.arrived(0.5)
    told.joined()
    assert told.appending(0, 99, 1, 2), "the rest has come"
    assert not told.appending(0, 100, 1, 3)
    assert_whole(events.of("prefill"), 21)
    load = events.of("load")[-1]
    assert (load.done, load.total, load.ended) == (450, 450, True)


def test_interrupted_turn_ends_its_work(model, generate, tokens, store, events):
    class StopError(Exception):
        pass

    def fail(*_):
        raise StopError

    with TieredCache(store, progress=events) as cache:
        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        cache.turns.trusted_hooks = type(cache.turns.trusted_hooks)([fail])
        with pytest.raises(StopError):
            generate(model, tokens(40), cache)
        handle.remove()
        last = events.of("prefill")[-1]
        assert last.ended
        assert last.done < last.total
        events.take()
        generate(model, tokens(40), cache)
        assert_whole(events.of("prefill"), 40)


def test_progress_changes_no_pass_and_no_bit(model, generate, tokens, store, events):
    fed = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    hooks = {"trusted_hooks": list(model._forward_pre_hooks.values())}
    found = []
    for progress in (False, events):
        fed.clear()
        with PrefixStore(block_size=8) as own, TieredCache(own, progress=progress, **hooks) as cache:
            answers = [generate(model, tokens(n), cache) for n in (40, 60)]
            found.append((list(fed), [answer.logits for answer in answers]))
    handle.remove()
    (plain_fed, plain), (told_fed, told) = found
    assert plain_fed == told_fed
    pairs = itertools.chain(*(zip(a, b, strict=True) for a, b in zip(plain, told, strict=True)))
    assert all(torch.equal(a, b) for a, b in pairs)


def test_callback_that_raises_does_not_end_generate(model, generate, tokens, store, warned):
    def fail(event):
        raise ValueError("no such window")

    with TieredCache(store, progress=fail) as cache:
        answer = generate(model, tokens(40), cache)
        assert torch.equal(answer.sequences, generate(model, tokens(40)).sequences)
        generate(model, tokens(40), cache)
        assert cache.last_turn.cached_tokens == 39
    assert len(warned()) == 1


def test_callback_that_uses_the_cache_is_refused_and_the_answer_is_right(model, generate, tokens, store, warned):
    with TieredCache(store, progress=lambda event: cache.reset()) as cache:
        answer = generate(model, tokens(40), cache)
    assert torch.equal(answer.sequences, generate(model, tokens(40)).sequences)
    assert "BusyError" in warned()[0]


def test_fork_tells_too(model, generate, tokens, store, events):
    with TieredCache(store, progress=events) as cache, cache.fork() as fork:
        generate(model, tokens(40), fork)
    assert_whole(events.of("prefill"), 40)


def test_rebuilt_catalog_tells_its_blocks(model, generate, tokens, tmp_path, events):
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store) as cache:
        generate(model, tokens(40), cache)
    for each in tmp_path.glob("catalog.sqlite*"):
        each.unlink()
    with TieredCache(tmp_path, progress=events):
        pass
    blocks = len(list(tmp_path.rglob("*.safetensors")))
    assert_whole(events.of("rebuild"), blocks)
    events.take()
    with PrefixStore(tmp_path, block_size=8, progress=events):
        assert events.all == [], "nothing is rebuilt"


@pytest.mark.parametrize("make", [TieredCache, PrefixStore])
def test_progress_of_another_type_raises(make):
    with pytest.raises(ConfigurationError, match="progress=3 is unknown"):
        make(progress=3)


def test_flush_tells_what_the_cache_was_told_unless_it_is_told_otherwise(model, generate, tokens, tmp_path, events):
    other = Events()
    with PrefixStore(tmp_path, block_size=4) as store, TieredCache(store, progress=events) as cache:
        generate(model, tokens(10), cache)  # its tail waits
        cache.flush()
        assert events.of("flush")[-1].ended
        assert events.of("flush")[-1].done > 0
        generate(model, tokens(23), cache)
        events.take()
        cache.flush(progress=False)
        assert events.of("flush") == []
        generate(model, tokens(34), cache)
        cache.flush(progress=other)
        assert events.of("flush") == []
        assert other.of("flush")[-1].ended
