"""Models that carry states outside the cache get the right states from kvtier in every kind of call."""

from __future__ import annotations

import pytest
import torch
from transformers import Cache, DynamicCache

import kvtier
from kvtier import ConfigurationError, PrefixStore, TieredCache
from sweep.models import tiny_model
from tests.support.reuse import reuse_off
from tests.support.upstream import CACHE

pytestmark = reuse_off

CARRIERS = ["rwkv", "xlstm", "minimax"]
SETTINGS = {"max_new_tokens": 6, "do_sample": False}
every = pytest.mark.parametrize("name", CARRIERS)


def prompt(columns, seed=0, rows=1):
    return torch.randint(2, 60, (rows, columns), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def built():
    models = {}

    def build(name):
        if name not in models:
            models[name] = tiny_model(name)
        return models[name]

    return build


def ask(model, ids, cache, **settings):
    """Return the sequences of a turn, which must equal those without a cache."""
    settings = {**SETTINGS, "attention_mask": torch.ones_like(ids), **settings}
    found = model.generate(ids, past_key_values=cache, **settings)
    assert torch.equal(found, model.generate(ids, **settings))
    return found


@pytest.mark.parametrize("name", ["xlstm", "minimax"])
def test_batch_rows_with_carried_states_are_reused_together_and_alone(built, store, name):
    model, ids = built(name), prompt(20, rows=2)
    with TieredCache(store) as cache:
        ids = torch.cat([ask(model, ids, cache), prompt(3, 1, rows=2)], 1)
        more = ask(model, ids, cache)
        assert cache.last_turn.cached_tokens == 2 * 25
        ask(model, torch.cat([more.flip(0), prompt(3, 2, rows=2)], 1), cache)
        assert cache.last_turn.cached_tokens == 2 * (more.shape[1] - 1)
        ask(model, torch.cat([more[1:], prompt(5, 3)], 1), cache)
        assert cache.last_turn.cached_tokens == more.shape[1] - 1


def test_rwkv_batches_are_not_reused(built, store):
    """Batches get other tokens than single rows in transformers. If the last line fails, transformers fixed that."""
    model, ids = built("rwkv"), prompt(20, rows=2)
    with TieredCache(store) as cache:
        for _ in range(2):
            ids = ask(model, ids, cache)
            assert cache.last_turn.cached_tokens == 0
            assert "rows" in cache.last_turn.miss_reason
    alone = model.generate(ids[1:, :20], **SETTINGS)
    assert not torch.equal(model.generate(ids[:, :20], **SETTINGS)[1:], alone)


@every
def test_alternating_conversations_on_one_cache_are_reused(built, store, name):
    model, talks = built(name), [prompt(20, 1), prompt(26, 2)]
    with TieredCache(store) as cache:
        for turn in range(3):
            for which, ids in enumerate(talks):
                found = ask(model, ids, cache)
                assert cache.last_turn.cached_tokens == (ids.shape[1] - 4 if turn else 0)
                talks[which] = torch.cat([found, prompt(3, 10 * turn + which)], 1)


@pytest.mark.parametrize("name", [*CARRIERS, "mamba2"])
def test_prompt_of_embeddings_continues_from_the_known_prefix(built, store, name):
    if name == "mamba2" and not hasattr(Cache, "get_conv_state"):
        pytest.skip("this version of transformers does not tell such a cache how many tokens it has seen")
    model = built(name)
    vectors = model.get_input_embeddings()(prompt(36)).detach()
    settings = {**SETTINGS, "return_dict_in_generate": True, "output_logits": True}
    with TieredCache(store) as cache:
        for columns, known in ((24, 0), (30, 0), (36, 24)):  # the last four known tokens are fed again
            found = model.generate(inputs_embeds=vectors[:, :columns], past_key_values=cache, **settings)
            expected = model.generate(inputs_embeds=vectors[:, :columns], **settings)
            assert torch.equal(found.sequences, expected.sequences)
            for ours, theirs in zip(found.logits, expected.logits, strict=True):
                assert torch.allclose(ours, theirs, atol=1e-4)
            assert cache.last_turn.cached_tokens == known


@every
def test_forks_with_carried_states_continue_independently(built, store, name):
    model = built(name)
    with TieredCache(store) as cache:
        ids = ask(model, prompt(20), cache)
        with cache.fork() as twin:
            for seed, used in enumerate([cache, twin, twin, cache]):
                ask(model, torch.cat([ids, prompt(4, seed)], 1), used)
                assert used.last_turn.cached_tokens == 25


@pytest.mark.parametrize(
    ("name", "settings"),
    [("minimax", {"num_beams": 2}), *((name, {"num_return_sequences": 2, "do_sample": True}) for name in CARRIERS)],
)
def test_beams_and_samples_do_not_reuse_carried_states(built, store, name, settings):
    model, ids = built(name), prompt(20)
    with TieredCache(store) as cache:
        ask(model, ids, cache)
        torch.manual_seed(1)
        expected = model.generate(ids, max_new_tokens=4, **settings)
        torch.manual_seed(1)
        assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=4, **settings), expected)
        assert cache.last_turn.cached_tokens == 0
        assert "beams and samples" in cache.last_turn.miss_reason
        ask(model, torch.cat([ids, prompt(3, 1)], 1), cache)
        assert cache.last_turn.cached_by_tier["host"] == 20


@every
def test_padded_rows_do_not_reuse_carried_states(built, store, name):
    model, ids = built(name), prompt(20, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with TieredCache(store) as cache:
        ids = ask(model, ids, cache, attention_mask=mask)
        mask = torch.cat([mask, mask.new_ones(2, 6)], 1)
        ask(model, ids, cache, attention_mask=mask)
        assert cache.last_turn.cached_tokens == 0


@every
def test_custom_loop_with_carried_states_gets_a_miss_reason(built, store, name):
    with TieredCache(store) as cache:
        report = cache.begin(built(name), prompt(20))
    assert "past a cache" in report.miss_reason


@pytest.mark.sample(6)  # of 9
@every
@pytest.mark.parametrize("at", [0, 1, 4])
def test_cache_works_after_an_interrupted_forward_pass(built, store, name, at):
    """At that point the model has overwritten some of its states."""
    model = built(name)
    last = [part for part in model.modules() if isinstance(part, torch.nn.Linear)][-2]
    passes = []

    def interrupt(*_):
        passes.append(1)
        if len(passes) > at:
            raise KeyboardInterrupt

    with TieredCache(store) as cache:
        ids = torch.cat([ask(model, prompt(20), cache), prompt(5, 1)], 1)
        hook = last.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, past_key_values=cache, **SETTINGS)
        hook.remove()
        ask(model, ids, cache)
        ask(model, torch.cat([ids, prompt(2, 2)], 1), cache)


def test_state_passed_by_the_caller_is_not_replaced(built, store):
    """The state belongs to another prompt, which this prompt continues."""
    model, ids = built("rwkv"), prompt(20)
    state = model(prompt(12, 1), use_cache=True).state
    copies = [[tensor.clone() for tensor in state] for _ in range(2)]
    with TieredCache(store) as cache:
        ask(model, ids, cache)
        expected = model.generate(ids, state=copies[0], **SETTINGS)
        assert torch.equal(model.generate(ids, state=copies[1], past_key_values=cache, **SETTINGS), expected)
        assert "besides tokens" in cache.last_turn.miss_reason
        ask(model, torch.cat([ids, prompt(3, 2)], 1), cache)
        assert cache.last_turn.cached_by_tier["host"] == 20


def test_passing_two_caches_raises_configuration_error(store):
    model, ids = tiny_model("mamba2"), prompt(20)
    own = DynamicCache(config=model.config)
    with TieredCache(store) as cache, pytest.raises(ConfigurationError, match="cache_params, past_key_values; pass"):
        model.generate(ids, cache_params=own, past_key_values=cache, **SETTINGS)


def test_rwkv_rescaling_of_weights_does_not_prevent_reuse(store):
    """RWKV divides weights in its first forward pass (``rescale_every``). All turns of a process have one root."""
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=4, rescale_every=2, context_length=128)
    model = RwkvForCausalLM(config).eval()
    with TieredCache(store) as cache:
        ids = torch.cat([model.generate(prompt(20), past_key_values=cache, **SETTINGS), prompt(3, 1)], 1)
        ask(model, ids, cache)
        assert cache.last_turn.cached_tokens == 25


def test_uninstall_restores_the_model_class(built, tmp_path):
    model = built("rwkv")
    with PrefixStore() as store, TieredCache(store) as cache:
        ask(model, prompt(20), cache)
    assert "prepare_inputs_for_generation" in vars(type(model))
    kvtier.uninstall()
    assert "prepare_inputs_for_generation" not in vars(type(model))


def test_moshi_is_reused_only_within_its_window(store):
    """With a cache, Moshi sees only its window. Without a cache, it has no window."""
    model = tiny_model("moshi")
    window = model.config.sliding_window
    with TieredCache(store) as cache:
        first = ask(model, prompt(20), cache)
        ask(model, torch.cat([first, prompt(4, 1)], 1), cache)
        assert cache.last_turn.cached_tokens == 25
        for settings in ({"max_new_tokens": window - 20}, {"max_new_tokens": None, "max_length": 40}):
            short = {**settings, "stop_strings": None}
            model.generate(first, past_key_values=cache, do_sample=False, eos_token_id=list(range(100)), **short)
            assert cache.last_turn.cached_tokens == 0
            assert f"{window} tokens" in cache.last_turn.miss_reason


def test_cache_returned_by_minimax_may_be_passed_again(built, store):
    model, ids = built("minimax"), prompt(20)
    with TieredCache(store) as cache:
        said = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **SETTINGS)
        returned = getattr(said, CACHE)
        longer = torch.cat([said.sequences, prompt(3, 1)], 1)
        edited = longer.clone()
        edited[0, 7] = edited[0, 7] % 60 + 1
        for then, known in ((longer, 25), (edited, 0)):
            found = model.generate(then, **{CACHE: returned}, **SETTINGS)
            assert torch.equal(found, model.generate(then, **SETTINGS))
            assert cache.last_turn.cached_tokens == known
