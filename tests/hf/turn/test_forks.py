"""``fork``: one load serves many continuations, and nothing is copied before the first write."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from kvtier import ClosedError, TieredCache
from tests.support.upstream import CACHE

pytestmark = pytest.mark.sample(2)


def addresses(cache):
    return [(layer.memory.k.data_ptr(), layer.memory.v.data_ptr()) for layer in cache.layers]


@pytest.fixture
def held(model, generate, tokens, cache):
    """A cache that holds a turn, and the next prompt."""
    sequences = generate(model, tokens(30), cache).sequences
    return cache, torch.cat([sequences, tokens(4, seed=1)], 1)


@pytest.mark.parametrize("fork", [TieredCache.fork, copy.deepcopy], ids=["fork", "deepcopy"])
def test_new_fork_shares_the_buffers_of_its_origin(held, fork):
    cache, _ = held
    twin = fork(cache)
    assert addresses(twin) == addresses(cache)
    assert twin.store is cache.store
    assert twin.get_seq_length() == cache.get_seq_length() == 37


def test_first_write_after_a_fork_copies_only_the_written_layer(held):
    cache, _ = held
    twin, before = cache.fork(), addresses(cache)
    k, v = (part[:, :, :1].clone() for part in (cache.layers[0].keys, cache.layers[0].values))
    for one in (cache, twin):
        one.update(k, v, 0)
    assert addresses(cache) == before
    assert addresses(twin)[0][0] != before[0][0]
    assert addresses(twin)[0][1] != before[0][1]
    assert addresses(twin)[1:] == before[1:]


def test_forks_of_a_restored_prefix_sample_without_another_load(model, generate, tokens, store, held):
    _, ids = held
    with TieredCache(store) as first:
        generate(model, ids, first, max_new_tokens=1)
        assert first.last_turn.cached_by_tier["host"] == 37
        forks = [first.fork() for _ in range(4)]
        for seed, fork in enumerate(forks):
            settings = {"do_sample": True, "top_k": 20}
            torch.manual_seed(seed)
            expected = generate(model, ids, **settings).sequences
            torch.manual_seed(seed)
            assert torch.equal(generate(model, ids, fork, **settings).sequences, expected)
            assert fork.last_turn.cached_by_tier["device"] == ids.shape[1] - 1
            assert fork.last_turn.restored_bytes == 0
            longer = torch.cat([expected, tokens(3, seed=seed)], 1)
            assert torch.equal(generate(model, longer, fork).sequences, generate(model, longer).sequences)
            assert fork.last_turn.cached_tokens == expected.shape[1] - 1
            fork.close()
        assert torch.equal(generate(model, ids, first).sequences, generate(model, ids).sequences)
        assert first.last_turn.cached_by_tier["device"] == ids.shape[1] - 1


def test_fork_stays_usable_after_its_origin_is_closed(model, generate, tokens, tmp_path):
    with TieredCache(tmp_path / "store") as cache:
        ids = generate(model, tokens(30), cache).sequences
        fork = cache.fork()
    with fork:
        assert torch.equal(generate(model, ids, fork).sequences, generate(model, ids).sequences)
        assert fork.last_turn.cached_by_tier["device"] == 37
    with pytest.raises(ClosedError):
        fork.fork()


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_beams_and_samples_on_a_fork_leave_its_origin_unchanged(model, generate, held, settings):
    cache, ids = held
    fork, kept = cache.fork(), [layer.keys.clone() for layer in cache.layers]
    torch.manual_seed(3)
    expected = generate(model, ids, **settings).sequences
    torch.manual_seed(3)
    assert torch.equal(generate(model, ids, fork, **settings).sequences, expected)
    assert fork.last_turn.cached_tokens == 37
    assert all(torch.equal(layer.keys, before) for layer, before in zip(cache.layers, kept, strict=True))


def sample(model, cache, sequences, steps, seed):
    """Sample by hand in a turn that has begun."""
    feed, generator = sequences[:, cache.get_seq_length() :], torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(steps):
            probabilities = model(feed, **{CACHE: cache}).logits[:, -1].softmax(-1)
            feed = torch.multinomial(probabilities, 1, generator=generator)
            sequences = torch.cat([sequences, feed], 1)
    return sequences


@pytest.mark.parametrize("known", [False, True], ids=["cold", "restored"])
@pytest.mark.parametrize("prefilled", [False, True], ids=["before-prefill", "after-prefill"])
def test_turn_begun_before_a_fork_continues_in_each_fork(model, generate, tokens, store, known, prefilled):
    """A custom loop begins once, computes the prompt once and continues many times. Each continuation is kept."""
    ids = tokens(30)
    if known:
        with TieredCache(store) as before:
            generate(model, ids[:, :25], before, max_new_tokens=1)
    with TieredCache(store) as cache:
        cache.begin(model, ids)
        if prefilled:
            with torch.no_grad():
                model(ids[:, cache.get_seq_length() : -1], **{CACHE: cache})
        caches = [cache, cache.fork(), cache.fork()]
        for seed, one in enumerate(caches):
            with TieredCache(store) as fresh:
                fresh.begin(model, tokens(2, seed=9))
                fresh.reset()
                expected = sample(model, fresh, ids, 6, seed)
                fresh.reset()
            found = sample(model, one, ids, 6, seed)
            assert torch.equal(found, expected)
            report = one.commit(found)
            assert report.generated_tokens == 6
            assert report.cached_tokens == (25 if known else 0)
            longer = torch.cat([found, tokens(3, seed=seed + 1)], 1)
            assert torch.equal(generate(model, longer, one).sequences, generate(model, longer).sequences)
            assert one.last_turn.cached_by_tier["device"] == 35
        for one in caches[1:]:
            one.close()


def test_forks_under_a_device_budget_continue_independently(make_model, generate, tokens, store, tmp_path):
    model, ids = make_model("llama", num_hidden_layers=6), tokens(60)
    settings = {"device_budget": 100_000, "spill_dir": tmp_path}
    with TieredCache(store, **settings) as cache:
        ids = torch.cat([generate(model, ids, cache).sequences, tokens(3, seed=1)], 1)
        assert cache.last_turn.cold_layers > 0
        with cache.fork() as fork:
            other = torch.cat([ids[:, :-5], tokens(4, seed=2)], 1)
            assert torch.equal(generate(model, other, fork).sequences, generate(model, other).sequences)
            assert fork.last_turn.cached_by_tier["device"] >= 60
            assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)
            assert cache.last_turn.cached_by_tier["device"] >= 60


_HYBRID = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def falcon_h1():
    config = transformers.FalconH1Config(
        **_HYBRID,
        num_hidden_layers=6,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_state=16,
        mamba_chunk_size=16,
    )
    return transformers.FalconH1ForCausalLM(config)


def lfm2():
    kinds = ["conv", "full_attention"] * 3
    return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**_HYBRID, num_hidden_layers=6, layer_types=kinds))


@pytest.mark.parametrize("budgeted", [False, True], ids=["hot", "cold"])
@pytest.mark.parametrize(("build", "budget"), [(falcon_h1, 75_000), (lfm2, 39_500)], ids=["falcon_h1", "lfm2"])
def test_forks_of_models_with_states_continue_independently(build, generate, tokens, store, tmp_path, budget, budgeted):
    """Each fork has its own states. A turn on one leaves the states of the other unchanged."""
    torch.manual_seed(0)
    model = build().eval()
    with TieredCache(store, device_budget=budget if budgeted else None, spill_dir=tmp_path) as cache:
        ids = generate(model, tokens(40), cache).sequences
        assert bool(cache.last_turn.cold_layers) is budgeted
        with cache.fork() as fork:
            for seed, one in enumerate((fork, cache, fork)):
                longer = torch.cat([ids, tokens(5, seed=seed)], 1)
                assert torch.equal(generate(model, longer, one).sequences, generate(model, longer).sequences)
                assert one.last_turn.cached_by_tier["device"] >= (47 if seed < 2 else 0)
