"""Encoder-decoder models give the same answers with a TieredCache, bare or wrapped, as without one."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache

from kvtier import TieredCache
from tests.support.reuse import reuse_off
from tests.support.upstream import CACHE

pytestmark = [pytest.mark.filterwarnings("ignore:.*`max_length`.*:UserWarning"), reuse_off]

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
BART = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "init_std": 0.4,
}
GEMMA = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
    "vocab_size": 60,
    "initializer_range": 0.4,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", {**T5, "initializer_factor": 4.0}),
    "bart": ("BartConfig", "BartForConditionalGeneration", {**BART, "forced_eos_token_id": None}),
    "marian": ("MarianConfig", "MarianMTModel", {**BART, "forced_eos_token_id": None}),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", {**BART, "forced_eos_token_id": None}),
    "t5gemma": (
        "T5GemmaConfig",
        "T5GemmaForConditionalGeneration",
        {"encoder": GEMMA, "decoder": GEMMA, "tie_word_embeddings": False},
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {**BART, "max_source_positions": 20, "max_target_positions": 64, "num_mel_bins": 8}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
    ),
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "no-cache-asked": {"use_cache": False},
}
OFF = "encoder-decoder models are not reused"


def make(name: str) -> Any:
    config_class, model_class, shape = MODELS[name]
    config = getattr(transformers, config_class)(vocab_size=60, **IDS, **shape)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if name == "whisper":
        model.generation_config.eos_token_id = 2
    return model


def inputs(name: str, seed: int, rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if name == "whisper":
        return {"input_features": torch.randn(rows, 8, 40, generator=generator)}
    ids = torch.randint(3, 60, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def answer(model: Any, given: dict[str, Any], cache: Any = None, **settings: Any) -> torch.Tensor:
    torch.manual_seed(7)
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    if cache is not None:
        settings["past_key_values"] = cache
    return model.generate(**given, **settings)


def assert_turns(name: str, model: Any, cache: TieredCache, past: Any, **settings: Any) -> None:
    """Run the same input twice, another input, and an input with more rows."""
    answers = []
    for given in (inputs(name, 0), inputs(name, 0), inputs(name, 1), inputs(name, 2, rows=3)):
        # With a cache and use_cache=False, transformers feeds tokens twice, so its answer is no reference.
        expected = answer(model, given, **{**settings, "use_cache": True})
        assert torch.equal(answer(model, given, past, **settings), expected)
        assert cache.last_turn.cached_tokens == 0
        assert ("use_cache=False was passed" if "use_cache" in settings else OFF) in cache.last_turn.miss_reason
        answers.append(expected.tolist())
    assert answers[0] == answers[1] != answers[2]  # the input decides


@pytest.mark.sample(6)  # of 15
@pytest.mark.parametrize(
    ("name", "mode"),
    [*product(MODELS, ("greedy", "beams")), ("t5", "samples"), ("whisper", "samples"), ("t5", "no-cache-asked")],
)
def test_encoder_decoder_is_correct_and_stores_nothing_on_a_bare_cache(name, mode, cache, store):
    assert_turns(name, make(name), cache, cache, **MODES[mode])
    assert store.stats().tiers[0].blocks == 0  # nothing is kept


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "greedy") for name in MODELS), ("t5", "beams"), ("bart", "no-cache-asked")]
)
def test_encoder_decoder_is_correct_and_stores_nothing_on_a_wrapped_cache(name, mode, cache, store):
    model = make(name)
    both = EncoderDecoderCache(cache, DynamicCache(config=model.config))
    assert_turns(name, model, cache, both, **MODES[mode])
    assert both.self_attention_cache is cache
    assert store.stats().tiers[0].blocks == 0


@pytest.mark.parametrize("argument", ["cache", "past_key_values"])
def test_encoder_decoder_accepts_either_name_of_the_cache_argument(store, argument):
    model = make("t5")
    for wrap in (False, True):
        with TieredCache(store) as cache:
            past = EncoderDecoderCache(cache, DynamicCache(config=model.config)) if wrap else cache
            for seed in (0, 1):
                given, settings = inputs("t5", seed), {"max_new_tokens": 6, "do_sample": False}
                found = model.generate(**given, **{argument: past}, **settings)
                assert torch.equal(found, model.generate(**given, **settings))
                assert "encoder-decoder" in cache.last_turn.miss_reason


def test_decoder_writes_its_self_attention_into_the_cache(cache):
    model = make("t5")
    given = inputs("t5", 0)
    found = model.generate(
        **given, past_key_values=cache, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    assert isinstance(getattr(found, CACHE), EncoderDecoderCache)
    assert getattr(found, CACHE).self_attention_cache is cache
    assert cache.get_seq_length() == 5  # the start token and four more
    assert cache.layers[0].keys.shape == (2, 4, 5, 8)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=str)
def test_longer_decoder_prompt_gives_correct_answers(cache, settings):
    """The decoder's answer is its prompt in the next turn, also with another input."""
    model, given = make("bart"), inputs("bart", 0)
    said = answer(model, given)
    for seed in (0, 1):
        given = {**inputs("bart", seed), "decoder_input_ids": said}
        assert torch.equal(answer(model, given, cache, **settings), answer(model, given, **settings))
        assert OFF in cache.last_turn.miss_reason


def test_precomputed_encoder_outputs_give_correct_answers(cache):
    model, given = make("t5"), inputs("t5", 0)
    expected = answer(model, given)
    said = model.get_encoder()(**given)
    for _ in range(2):
        again = {"encoder_outputs": said, "attention_mask": given["attention_mask"]}
        assert torch.equal(answer(model, again, cache), expected)


def test_prompt_lookup_decoding_gives_correct_answers(cache):
    model, given = make("t5gemma"), inputs("t5gemma", 0, rows=1)
    for _ in range(2):
        expected = answer(model, given, prompt_lookup_num_tokens=3)
        assert torch.equal(answer(model, given, cache, prompt_lookup_num_tokens=3), expected)


def test_whisper_handles_speech_longer_than_its_encoder(cache):
    """Whisper then calls generate() for one part after another."""
    model = make("whisper")
    model.generation_config.no_timestamps_token_id = 49
    features = torch.randn(1, 8, 100, generator=torch.Generator().manual_seed(0))
    settings = {"return_timestamps": True, "attention_mask": torch.ones(1, 100, dtype=torch.long)}
    given = {"input_features": features}
    for _ in range(2):
        assert torch.equal(answer(model, given, cache, **settings), answer(model, given, **settings))
        assert OFF in cache.last_turn.miss_reason


def test_custom_loop_of_an_encoder_decoder_starts_from_nothing(cache):
    """Decoder tokens do not show the input of the encoder."""
    model = make("bart")
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11, 12]])
    for _ in range(2):
        report = cache.begin(model, ids)
        assert OFF in report.miss_reason
        assert cache.get_seq_length() == 0
        both = EncoderDecoderCache(cache, DynamicCache(config=model.config))
        with torch.no_grad():
            model(**inputs("bart", 0, rows=1), decoder_input_ids=ids, **{CACHE: both})
        cache.commit(ids)


def test_encoder_decoder_is_correct_with_cold_layers(store):
    """The decoder has cold layers. Its cross-attention offloads nothing."""
    model, given = make("t5"), inputs("t5", 0)
    with TieredCache(store, device_budget="64KiB") as cache:
        for _ in range(2):
            assert torch.equal(answer(model, given, cache, max_new_tokens=50), answer(model, given, max_new_tokens=50))
        assert cache.last_turn.cold_layers > 0


def test_cache_works_after_an_interrupted_forward_pass(cache):
    model, given = make("t5"), inputs("t5", 0)
    calls = []

    def stop(module, inputs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = model.decoder.block[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        answer(model, given, cache)
    handle.remove()
    assert torch.equal(answer(model, given, cache), answer(model, given))


def test_decoder_without_an_encoder_is_reused(cache, generate, tokens):
    """Without an encoder, a decoder is a language model like others."""
    shape = {**BART, "vocab_size": 200, **IDS, "encoder_layers": 2}
    config = transformers.BartConfig(**shape, is_encoder_decoder=False, max_position_embeddings=128)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.BartForCausalLM(config).eval()
    ids = tokens(20)
    for cached in (0, 19):
        found = generate(model, ids, cache).sequences
        assert torch.equal(found, generate(model, ids).sequences)
        assert cache.last_turn.cached_tokens == cached
