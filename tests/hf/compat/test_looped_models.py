"""Models that read layers before updating them, or append layers: on one cache, and restored from RAM and disk."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvtier import PrefixStore, TieredCache
from kvtier.hf.compat.model_profiles import passed_argument
from sweep.models import architectures, tiny_config, tiny_model
from tests.support.reuse import reuse_off

pytestmark = reuse_off

REUSED = ["dory per_loop", "inkling2_loop_text"]
MODELS = [*REUSED, "dory last_loop"]
VOCABULARY = 32


def prompt(columns, seed=0):
    return torch.randint(4, VOCABULARY, (1, columns), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def build():
    made = {}

    def make(name):
        if name in made:
            return made[name]
        if not hasattr(transformers, "DoryConfig"):
            pytest.skip("this version of transformers does not have it")
        if not name.startswith("dory"):
            if name not in architectures():
                pytest.skip("it has no causal language model")
            config = tiny_config(name)
            config.vocab_size = config.unpadded_vocab_size = VOCABULARY
            config.n_layers_per_attn_res_block, config.initializer_range = 1, 0.1
            config.loop_layer_index_start, config.loop_layer_index_end, config.loop_num_passes = 1, 3, 3
            with torch.random.fork_rng():
                torch.manual_seed(0)
                made[name] = getattr(transformers, architectures()[name])(config).eval()
            made[name].generation_config = transformers.GenerationConfig(pad_token_id=0)
            return made[name]
        config = transformers.DoryConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            n_input_layers=1,
            n_recurrent_layers=2,
            n_output_layers=1,
            n_recurrent_loops=3,
            recurrent_kv_cache_mode=name.split()[1],
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made[name] = transformers.DoryForCausalLM(config).eval()
        return made[name]

    return make


def loop(model, cache, ids, steps=5):
    """Decode greedily in a custom loop; return the sequences, logits and number of known tokens."""
    known = cache.begin(model, ids).cached_tokens if isinstance(cache, TieredCache) else 0
    feed, logits = ids[:, known:], []
    with torch.no_grad():
        for _ in range(steps):
            logits.append(model(feed, use_cache=True, **{passed_argument(model): cache}).logits[:, -1])
            feed = logits[-1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, feed], 1)
    if isinstance(cache, TieredCache):
        cache.commit(ids)
    return ids, torch.cat(logits), known


@pytest.mark.sample(3)  # of 12
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", MODELS)
def test_looped_models_are_correct_in_a_custom_loop(build, tmp_path, name, seed):
    model = build(name)

    def same(cache, ids):
        found, logits, known = loop(model, cache, ids)
        expected, others, _ = loop(model, DynamicCache(config=model.config), ids)
        assert torch.allclose(logits, others, atol=2e-3)  # rounding errors grow with every loop
        assert torch.equal(found, expected)
        return found, known if name in REUSED else None

    with PrefixStore(tmp_path, block_size=8) as store:
        with TieredCache(store) as cache:
            ids, _ = same(cache, prompt(30, seed))
            ids, known = same(cache, torch.cat([ids, prompt(3, seed + 9)], 1))
            assert known in (34, None)
        ids = torch.cat([ids, prompt(3, seed + 20)], 1)
        with TieredCache(store) as cache:
            _, known = same(cache, ids)
            assert known in (42, None)
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store) as cache:
        _, known = same(cache, torch.cat([ids[:, :40], prompt(5, seed + 30)], 1))
        assert known in (40, 34, None)  # the checkpoint lies where the previous turn ended


@pytest.mark.sample(3)  # of 18
@pytest.mark.parametrize("budget", [None, "160KiB"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_looped_models_are_correct_in_generate(build, tmp_path, name, settings, budget):
    model, settings = build(name), {"max_new_tokens": 5, "do_sample": False, **settings}
    ids = prompt(30)
    with PrefixStore(tmp_path, block_size=8) as store:
        for turn in range(3):
            with TieredCache(store, device_budget=budget, spill_dir=tmp_path / "spill") as cache:
                torch.manual_seed(3)
                found = model.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), **settings)
                torch.manual_seed(3)
                expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
                assert torch.equal(found, expected)
                if name in REUSED:
                    assert (cache.last_turn.cached_tokens > 0) == (turn > 0), cache.last_turn.miss_reason
                else:
                    assert "last_loop" in cache.last_turn.miss_reason
                ids = torch.cat([found[:1], prompt(3, turn + 1)], 1)


def test_layers_read_right_after_begin_hold_the_stored_pages(build, tmp_path):
    model = build("dory per_loop")
    with PrefixStore(tmp_path, block_size=8) as store:
        with TieredCache(store) as cache:
            ids, _, _ = loop(model, cache, prompt(30))
            held = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        with TieredCache(store) as cache:
            cache.begin(model, torch.cat([ids, prompt(3)], 1))
            assert len(cache.layers) == len(held)
            for layer, (keys, values) in zip(cache.layers, held, strict=True):
                assert layer.is_initialized
                assert torch.equal(layer.values, values)
                assert torch.equal(layer.keys, keys)


def test_layers_appended_by_an_unknown_model_are_not_kept(store):
    """A future looped model may append layers like this."""
    model = tiny_model("llama")
    with TieredCache(store) as cache:
        for _ in range(2):
            ids = prompt(20)
            assert cache.begin(model, ids).cached_tokens == 0
            with torch.no_grad():
                model(ids, **{passed_argument(model): cache})
            cache.update(torch.ones(1, 2, 20, 4), torch.ones(1, 2, 20, 4), len(cache.layers))
            assert "appends layers" in cache.commit(ids).miss_reason
