"""Known bugs of transformers that kvtier works around. A failing test here means that transformers fixed one.

The workaround is then unnecessary from that version on; the failure names its file. ``tests/hf`` tests kvtier's own
behaviour in each case.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from reliance import INSTALLED
from transformers import DynamicCache, EncoderDecoderCache

from kvtier import TieredCache
from kvtier.hf.compat.names import CHUNKS_CONTINUE
from sweep.models import tiny_model
from tests.support import oddities
from tests.support.reuse import states_alone_off
from tests.support.upstream import CACHE, given

GREEDY = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [0]}


def still_wrong(wrong, error, where):
    """Fail if transformers has fixed ``error``."""
    if not wrong:
        pytest.fail(f"transformers {transformers.__version__} has mended: {error}; see kvtier/{where}")


def differs(model, ids, cache, **settings):
    """Whether generate() returns other tokens with ``cache`` than without, or fails."""
    expected = model.generate(ids, **{**GREEDY, **settings, "use_cache": True})
    try:
        found = model.generate(ids, **{CACHE: cache}, **{**GREEDY, **settings})
    except (RuntimeError, ValueError, IndexError):
        return True
    return not torch.equal(found, expected)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def prefilled(make_model, tokens):
    """A model in double precision, a prompt, and a cache that holds all but the last three tokens."""
    model, ids = make_model("llama", torch.float64), tokens(30)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :27], **{CACHE: cache})
    assert not differs(model, ids, copy.deepcopy(cache))  # a cached prefix alone does no harm
    return model, ids, cache


def test_generate_is_wrong_with_the_cache_of_another_prompt(prefilled, tokens):
    model, _, cache = prefilled
    wrong = differs(model, tokens(30, seed=1), cache)
    still_wrong(wrong, "generate() does not compare the prompt with what the cache holds", "hf/generate/run.py")


def test_generate_is_wrong_when_the_cache_holds_the_whole_prompt(prefilled):
    model, ids, cache = prefilled
    model(input_ids=ids[:, 27:], **{CACHE: cache})
    still_wrong(
        differs(model, ids, cache), "a cache that holds the whole prompt makes it be fed again", "hf/turn/plan.py"
    )


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_expanding_rows_fails_because_the_cache_is_not_expanded(prefilled, settings):
    model, ids, cache = prefilled
    with pytest.raises(RuntimeError):
        model.generate(ids, **{CACHE: cache}, **{**GREEDY, **settings})


def test_assisted_decoding_is_wrong_on_a_cached_prefix(prefilled):
    model, ids, cache = prefilled
    wrong = differs(model, ids, cache, prompt_lookup_num_tokens=3)
    still_wrong(wrong, "assisted decoding feeds a known prefix again", "hf/inputs/request.py: why_cold")


def test_assisted_decoding_is_right_without_a_cached_prefix(prefilled):
    """The cached prefix causes the error."""
    model, ids, _ = prefilled
    assert not differs(model, ids, DynamicCache(config=model.config), prompt_lookup_num_tokens=3)


def test_generate_is_wrong_with_a_callers_cache_and_use_cache_false(make_model, tokens):
    model, ids = make_model("llama", torch.float64), tokens(30)
    wrong = differs(model, ids, DynamicCache(config=model.config), use_cache=False)
    still_wrong(
        wrong, "use_cache=False feeds all tokens at every step into the caller's cache", "hf/generate/request.py"
    )


def test_chunked_prefill_is_wrong_on_a_cached_prefix_in_older_versions(prefilled):
    model, ids, cache = prefilled
    wrong = differs(model, ids, cache, prefill_chunk_size=2)
    assert wrong != CHUNKS_CONTINUE, "see kvtier/hf/compat/names.py: CHUNKS_CONTINUE"


def test_encoder_decoder_cache_cannot_be_used_for_a_second_input():
    """The second input gets the cross-attention of the first."""
    model = tiny("T5Config", "T5ForConditionalGeneration")
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    ids = torch.randint(1, 50, (2, 10), generator=torch.Generator().manual_seed(0))
    model.generate(ids[:1], **{CACHE: cache}, **GREEDY)
    still_wrong(
        differs(model, ids[1:], cache),
        "an EncoderDecoderCache keeps the cross-attention of an earlier input",
        "hf/generate/run.py: _run_encoder_decoder",
    )


def test_layers_cropped_to_zero_keep_their_batch_size(prefilled):
    model, ids, cache = prefilled
    cache.crop(-27)
    assert cache.get_seq_length() == 0
    wrong = differs(model, ids.repeat(2, 1), cache)
    still_wrong(wrong, "a cache that was cropped to nothing keeps its batch size", "hf/turn/manager.py")


# --- layers with states -----------------------------------------------------------------------------------------------

_TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_ATTENTION = {"intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}


def tiny(config_name, model_name, **settings):
    config_class = getattr(transformers, config_name)
    shape = {**_TINY, **(_T5 if config_name == "T5Config" else {}), **settings}
    if config_name == "T5Config":
        shape.pop("hidden_size")
        shape.pop("num_hidden_layers")
        shape.pop("initializer_range")
        shape["initializer_factor"] = 5.0
    config = config_class(**shape)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, model_name)(config).eval().double()


STATEFUL = {
    "mamba": ("MambaConfig", "MambaForCausalLM", {"state_size": 4, "expand": 2}),
    "falcon_mamba": ("FalconMambaConfig", "FalconMambaForCausalLM", {"state_size": 4, "expand": 2}),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {**_ATTENTION, "attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 1},
    ),
    "zamba": (
        "ZambaConfig",
        "ZambaForCausalLM",
        {**_ATTENTION, "attn_layer_offset": 1, "attn_layer_period": 2, "n_mamba_heads": 2, "num_hidden_layers": 10},
    ),
}


@pytest.mark.parametrize("stateful", STATEFUL)
def test_recurrent_state_is_lost_when_several_tokens_are_fed(stateful, tokens):
    config, kind, settings = STATEFUL[stateful]
    model = tiny(config, kind, **settings)
    ids = tokens(12) % 49 + 1

    def last_logits(*pieces):
        cache = given(model, DynamicCache(config=model.config))
        for piece in pieces:
            logits = model(input_ids=piece, use_cache=True, **cache).logits
        return logits[:, -1]

    whole = last_logits(ids)
    one_by_one = last_logits(ids[:, :6], *ids[:, 6:].split(1, 1))
    at_once = last_logits(ids[:, :6], ids[:, 6:])
    near = {"rtol": 1e-3, "atol": 1e-3}  # parts of the model compute in single precision
    assert torch.allclose(whole, one_by_one, **near)
    still_wrong(
        not torch.allclose(whole, at_once, **near),
        f"{stateful} forgets its state when several tokens are fed on top of it",
        "hf/compat/model_profiles.py: token_by_token",
    )


def test_blt_is_wrong_on_a_cached_prefix():
    model, generator = oddities.blt(), torch.Generator().manual_seed(0)
    ids, cache = torch.randint(4, 200, (1, 24), generator=generator), DynamicCache()
    model(ids[:, :12], **given(model, cache))
    still_wrong(differs(model, ids, cache), "BLT cannot go on from a cache", "hf/compat/model_profiles.py")


@pytest.mark.parametrize("name", ["git", "minimax_m3_vl_text"])
def test_padded_rows_continued_from_a_cache_differ_from_a_full_pass(name):
    if name == "git" and INSTALLED < (5, 23):
        pytest.skip("right in 5.17")
    model, generator = tiny_model(name), torch.Generator().manual_seed(3)
    ids = torch.randint(2, 60, (2, 24), generator=generator)
    ids[1, :13] = 0
    longer = torch.cat([ids, torch.randint(2, 60, (2, 3), generator=generator)], 1)
    positions = ((longer != 0).cumsum(-1) - 1).clamp(min=0)
    wrong = {}
    for rows in (slice(0, 1), slice(0, 2)):
        mask, cache = (longer[rows] != 0).long(), DynamicCache(config=model.config)
        model(ids[rows], attention_mask=mask[:, :24], position_ids=positions[rows, :24], **{CACHE: cache})
        new, place = longer[rows, 24:], positions[rows, 24:]
        known = model(new, attention_mask=mask, position_ids=place, **{CACHE: cache}).logits[:, -1]
        at_once = model(longer[rows], attention_mask=mask, position_ids=positions[rows]).logits[:, -1]
        wrong[len(mask)] = bool((known - at_once).abs().max() > 1e-3)
    assert not wrong[1]
    still_wrong(wrong[2], f"padded rows of {name} go on otherwise", "hf/compat/model_profiles.py: not_padded")


def test_mamba_feeds_its_whole_prompt_again(tokens):
    model = tiny(*STATEFUL["mamba"][:2], **STATEFUL["mamba"][2])
    ids, cache, fed = tokens(12) % 49 + 1, DynamicCache(config=model.config), []
    model(input_ids=ids[:, :9], **given(model, cache))
    model.register_forward_pre_hook(lambda model, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    model.generate(ids, **given(model, cache), **GREEDY)
    still_wrong(
        fed[0].shape[1] == 12,
        "mamba feeds its whole prompt on top of a known state",
        "hf/generate/prefill.py: patch_prepare_inputs",
    )


def test_rows_of_hybrid_layers_cannot_be_repeated(tokens):
    model = tiny(*STATEFUL["jamba"][:2], **STATEFUL["jamba"][2])
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens(6) % 49 + 1, **{CACHE: cache})
    try:
        cache.batch_repeat_interleave(2)
        wrong = False
    except (AttributeError, NotImplementedError):
        wrong = True
    still_wrong(wrong, "rows of layers with states cannot be repeated", "hf/layers/container.py: move_rows")


@states_alone_off
def test_state_models_are_exact_with_tiered_cache_in_every_version(tokens, store):
    """From 5.21 on, ``Cache.get_conv_state`` lets kvtier tell how many tokens such a model has seen."""
    model, ids = tiny(*STATEFUL["mamba"][:2], **STATEFUL["mamba"][2]), tokens(12) % 49 + 1
    expected = model.generate(ids, **GREEDY)
    for _ in range(3):
        with TieredCache(store) as cache:
            assert torch.equal(model.generate(ids, **{CACHE: cache}, **GREEDY), expected)
            off = "has seen" in (cache.last_turn.miss_reason or "")
    assert off == (not hasattr(DynamicCache, "get_conv_state")), "see kvtier/hf/compat/model_profiles.py: why_off"
