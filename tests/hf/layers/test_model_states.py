"""Models with states continue from checkpoints: at the ends of prompts and turns, and where prompts branch."""

from __future__ import annotations

import pytest
import torch
from transformers import Cache, DynamicCache

from kvtier import PrefixStore, TieredCache
from sweep.models import tiny_model
from tests.support import families
from tests.support.upstream import CACHE, given

# A model for each way to keep states. mamba and jamba can continue only token by token, nemotron_h only from prompts.
pytestmark = pytest.mark.sample(2)

FREE = ["qwen3_next", "falcon_h1", "lfm2", "mamba2", "deepseek_v4"]
TOKEN_BY_TOKEN = ["mamba", "jamba"]
FROM_PROMPTS = ["nemotron_h", "zamba2"]
CARRIED = ["rwkv", "xlstm", "minimax"]  # states outside any cache
EVERY = [*FREE, *TOKEN_BY_TOKEN, *FROM_PROMPTS, *CARRIED]


def prompt(columns, seed=0):
    return torch.randint(1, 60, (1, columns), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def built():
    models = {}

    def build(name):
        if name.startswith("mamba") and not hasattr(Cache, "get_conv_state"):
            pytest.skip("this version of transformers does not tell such a cache how many tokens it has seen")
        if name not in models:
            models[name] = tiny_model(name) if name in CARRIED else families.build(name)
        return models[name]

    return build


@pytest.fixture
def ask():
    """``ask(model, ids, cache)``: the sequences, compared with a fresh cache."""

    def run(model, ids, cache, **settings):
        settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), **settings}
        found = model.generate(ids, past_key_values=cache, **settings)
        assert torch.equal(found, model.generate(ids, **settings))
        return found

    return run


@pytest.mark.sample(4)  # of 12
@pytest.mark.parametrize("name", EVERY)
def test_conversation_continues_on_the_same_cache_from_ram_and_from_disk(built, ask, tmp_path, name):
    """Each turn continues from the end of the answer, or of the prompt if decoding has another formula than prefill."""
    model = built(name)
    kept = 5 if name not in FROM_PROMPTS else 0
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store) as cache:
        ids = prompt(30)
        for turn in range(3):
            known = 0 if not turn else ids.shape[1] - 4 - 6 + kept
            sequences = ask(model, ids, cache)
            assert cache.last_turn.cached_tokens == known
            last, ids = ids, torch.cat([sequences, prompt(4, turn + 1)], 1)
        with TieredCache(store) as other:
            ask(model, ids, other)
            assert other.last_turn.cached_tokens == last.shape[1] + kept
            assert other.last_turn.restored_bytes > 0
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store) as cache:
        ask(model, ids, cache)
        assert cache.last_turn.cached_tokens == last.shape[1] + kept
        assert sum(cache.last_turn.cached_by_tier.values()) == cache.last_turn.cached_tokens


@pytest.mark.parametrize("name", EVERY)
def test_first_answer_has_the_logits_of_a_run_without_kvtier(built, store, name):
    model, ids = built(name), prompt(30)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with TieredCache(store) as cache:
        found = model.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), **settings)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert all(map(torch.equal, found.logits, expected.logits))


@pytest.mark.parametrize("argument", ["cache", "past_key_values", "cache_params"])
def test_every_argument_name_continues_from_states(built, store, argument):
    model, ids = built("mamba2"), prompt(30)
    settings = {"max_new_tokens": 6, "do_sample": False}
    with TieredCache(store) as cache:
        for known in (0, 35):
            found = model.generate(ids, attention_mask=torch.ones_like(ids), **{argument: cache}, **settings)
            assert torch.equal(found, model.generate(ids, attention_mask=torch.ones_like(ids), **settings))
            assert cache.last_turn.cached_tokens == known
            ids = torch.cat([found, prompt(3, 1)], 1)
        edited = ids.clone()
        edited[0, 3] = edited[0, 3] % 50 + 1
        found = model.generate(edited, attention_mask=torch.ones_like(ids), **{argument: cache}, **settings)
        assert torch.equal(found, model.generate(edited, attention_mask=torch.ones_like(ids), **settings))


@pytest.mark.parametrize("name", [*FREE, *CARRIED])
def test_third_prompt_continues_where_two_earlier_prompts_branched(built, ask, store, name):
    model, system = built(name), prompt(24)
    with TieredCache(store) as cache:
        for turn, known in enumerate([0, 0, 24, 24]):
            ask(model, torch.cat([system, prompt(9, turn + 1)], 1), cache)
            assert cache.last_turn.cached_tokens == known
            if turn == 1:
                assert "states" in cache.last_turn.miss_reason


@pytest.mark.sample(7)  # of 12
@pytest.mark.parametrize("name", EVERY)
def test_same_prompt_is_reused_from_the_third_time_on(built, ask, store, name):
    """The second time, all tokens except the last are fed first, so that there are states to continue from."""
    model, ids = built(name), prompt(30)
    with TieredCache(store) as cache:
        for known in (0, 0, 29, 29):
            ask(model, ids, cache)
            assert cache.last_turn.cached_tokens == known


@pytest.mark.parametrize("name", [*FREE, *CARRIED])
def test_edited_history_continues_from_the_checkpoint_before_the_edit(built, ask, store, name):
    model = built(name)
    with TieredCache(store) as cache:
        first = ask(model, prompt(30), cache)
        second = ask(model, torch.cat([first, prompt(8, 1)], 1), cache)
        edited = second.clone()
        edited[0, 38] = edited[0, 38] % 50 + 1
        ask(model, edited, cache)
        assert cache.last_turn.cached_tokens == 35
        edited[0, 10] = edited[0, 10] % 50 + 1
        ask(model, edited, cache)
        assert cache.last_turn.cached_tokens == 0


@pytest.mark.parametrize("name", TOKEN_BY_TOKEN)
def test_token_by_token_models_reuse_a_prefix_only_if_it_pays(built, ask, store, name):
    model = built(name)
    with TieredCache(store) as cache:
        first = ask(model, prompt(30), cache)
        ask(model, torch.cat([first, prompt(8, 1)], 1), cache)
        assert cache.last_turn.cached_tokens == 35
    with TieredCache(store) as cache:
        ask(model, torch.cat([first, prompt(28, 2)], 1), cache)
        assert cache.last_turn.cached_tokens == 0
        assert "token by token" in cache.last_turn.miss_reason


@pytest.mark.parametrize("name", [*FREE, "jamba"])
@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=["beams", "samples"]
)
def test_beams_and_samples_continue_one_prompt_exactly(built, store, name, settings):
    model = built(name)
    ids = torch.cat([prompt(30), prompt(4, 1)], 1)
    settings = {"max_new_tokens": 5, "attention_mask": torch.ones_like(ids), **settings}
    torch.manual_seed(3)
    expected = model.generate(ids, **settings)
    with TieredCache(store) as cache:
        model.generate(ids[:, :30], past_key_values=cache, max_new_tokens=1)
        for used in (cache, TieredCache(store)):
            torch.manual_seed(3)
            assert torch.equal(model.generate(ids, past_key_values=used, **settings), expected)
            assert used.last_turn.cached_tokens == (30 if name != "jamba" else 0)


def test_rows_of_a_batch_continue_from_their_states(built, ask, store):
    model = built("qwen3_next")
    ids = torch.cat([prompt(20), prompt(20, 1)])
    with TieredCache(store) as cache:
        ids = torch.cat([ask(model, ids, cache), torch.cat([prompt(3, 2), prompt(3, 3)])], 1)
        more = ask(model, ids, cache)
        assert cache.last_turn.cached_tokens == 2 * 25
        swapped = torch.cat([more, prompt(3, 4).expand(2, 3)], 1).flip(0)
        ask(model, swapped, cache)
        assert cache.last_turn.cached_by_tier["host"] == 0  # the buffers hold K and V; the states come from the store
        assert cache.last_turn.cached_tokens == 2 * (more.shape[1] - 1)


@pytest.mark.parametrize("name", [*FREE[:3], "deepseek_v4"])
def test_padded_batch_of_a_model_with_states_is_not_reused(built, store, name):
    model = built(name)
    ids = torch.cat([prompt(20), prompt(20, 1)])
    ids[1, :5] = families.PADDING
    with TieredCache(store) as cache:
        for _ in range(2):
            settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": (ids != 0).long()}
            found = model.generate(ids, past_key_values=cache, **settings)
            assert torch.equal(found, model.generate(ids, **settings))
            assert cache.last_turn.cached_tokens == 0
            assert "padding" in cache.last_turn.miss_reason
            ids = torch.cat([found, prompt(3, 2).expand(2, 3)], 1)


def test_k_and_v_of_a_padded_batch_are_not_kept_with_pooled_k_and_v(built, ask, store):
    """Pools of K and V begin with the padding, so the values read from them differ in all layers above."""
    model, text = built("deepseek_v4"), torch.ones(1, 12, dtype=torch.long)
    words = torch.tensor([[2, 5, 1]])
    with TieredCache(store) as cache:
        ask(model, text, cache)
        batch = torch.cat([torch.cat([words.new_zeros(1, 2), text, words[:, :1]], 1), torch.cat([text, words], 1)])
        ask(model, batch, cache, attention_mask=(batch != 0).long())
        settings = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        found = model.generate(batch[1:], past_key_values=cache, **settings)
        expected = model.generate(batch[1:], **settings)
        assert cache.last_turn.cached_tokens == 12
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("name", [*FREE, *TOKEN_BY_TOKEN])
def test_custom_loop_on_a_model_with_states_matches_generate(built, store, name):
    model = built(name)

    def loop(cache, ids):
        known = cache.begin(model, ids).cached_tokens
        assert known == cache.get_seq_length()
        feed, sequences = ids[:, known:], ids
        with torch.no_grad():
            for _ in range(5):
                positions = torch.arange(sequences.shape[1] - feed.shape[1], sequences.shape[1])[None]
                more = {} if "mamba" in name else {"position_ids": positions}
                logits = model(feed, use_cache=True, **given(model, cache), **more).logits[:, -1]
                feed = logits.argmax(-1, keepdim=True)
                sequences = torch.cat([sequences, feed], 1)
        cache.commit(sequences)
        return sequences, known

    with TieredCache(store) as cache, TieredCache(store) as other:
        first, _ = loop(cache, prompt(20))
        longer = torch.cat([first, prompt(3, 1)], 1)
        for used in (cache, other):
            found, known = loop(used, longer)
            assert known == (24 if name in FREE else 0)  # a loop may feed all new tokens at once
            expected = model.generate(longer, max_new_tokens=5, do_sample=False)
            assert torch.equal(found, expected)


def test_states_after_the_end_of_a_row_are_not_kept(built, store):
    """One row ends early. The tokens that the model is fed for it afterwards are not part of its sequence."""
    model = built("qwen3_next")
    ids = torch.cat([prompt(20), prompt(20, 1)])
    free = model.generate(ids, max_new_tokens=8, do_sample=False)
    end = int(free[0, 22])
    with TieredCache(store) as cache:
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": end}
        sequences = model.generate(ids, past_key_values=cache, **settings)
        for row in range(2):
            text = sequences[row : row + 1, : 23 if row == 0 else 28]
            longer = torch.cat([text, prompt(3, 5)], 1)
            with TieredCache(store) as other:
                found = model.generate(longer, past_key_values=other, max_new_tokens=4, do_sample=False)
                assert torch.equal(found, model.generate(longer, max_new_tokens=4, do_sample=False))
                assert other.last_turn.cached_tokens == (20 if row == 0 else 27)


@pytest.mark.parametrize("recording", [False, True])
def test_turns_after_a_crop_are_exact_on_a_model_with_states(built, ask, store, recording):
    model = built("qwen3_next")
    with TieredCache(store) as cache:
        ids = ask(model, prompt(20), cache)
        if recording:
            cache.activate_past_recording()
            cache.crop(-2)
        else:
            with pytest.raises(RuntimeError, match="does not track past states"):
                cache.crop(-2)
        ids = ask(model, torch.cat([ids, prompt(3, 1)], 1), cache)
        assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
        ask(model, torch.cat([ids, prompt(3, 2)], 1), cache)
        assert cache.last_turn.cached_tokens == 34


def test_device_budget_offloads_layers_of_a_hybrid_model(built, ask, tmp_path):
    model = built("qwen3_next")
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store, device_budget="23KiB") as cache:
        ids = prompt(60)
        for turn in range(2):
            ids = torch.cat([ask(model, ids, cache), prompt(4, turn)], 1)
            assert cache.last_turn.cold_layers > 0
        assert cache.last_turn.cached_tokens == 65


def test_states_equal_those_of_a_dynamic_cache(built, store):
    model, ids = built("falcon_h1"), prompt(30)
    reference = DynamicCache(config=model.config)
    settings = {"max_new_tokens": 4, "do_sample": False}
    with TieredCache(store) as cache:
        model.generate(ids, past_key_values=cache, **settings)
        model.generate(ids, **{CACHE: reference}, **settings)
        for ours, theirs in zip(cache.layers, reference.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.recurrent_states[0], theirs.recurrent_states[0])
            assert torch.equal(ours.conv_states[0], theirs.conv_states[0])
