"""Model sheets: shapes, bytes and operations from a config alone, against models that were really made."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, MixtralConfig, Qwen3Config, T5Config

from kvtier.errors import ConfigurationError
from kvtier.hf import model_sheet as sheets
from kvtier.hf.compat.model_profiles import passed_argument
from kvtier.hf.meta_model import read_config
from kvtier.hf.model_sheet import model_sheet
from tests.support import families


def llama_8b():
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        dtype="bfloat16",
    )


def qwen3_4b():
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def gemma3_12b():
    return Gemma3TextConfig(
        vocab_size=262208,
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        sliding_window=1024,
        dtype="bfloat16",
    )


def test_llama_8b_takes_128_kib_a_token():
    sheet = model_sheet(llama_8b())
    assert sheet.footprint.token_bytes == 128 * 1024
    assert sheet.footprint.window_token_bytes == sheet.footprint.state_bytes == 0
    assert sheet.parameters == pytest.approx(8.03e9, rel=0.001)
    assert sheet.token_parameters == pytest.approx(6.98e9, rel=0.001)  # less the tables of tokens
    assert sheet.longest_tokens == 131072
    assert sheet.not_reusable is None


def test_qwen3_4b_takes_144_kib_a_token():
    sheet = model_sheet(qwen3_4b())
    assert sheet.footprint.token_bytes == 144 * 1024
    assert sheet.parameters == pytest.approx(4.02e9, rel=0.005)


def test_gemma3_12b_takes_64_kib_a_token_and_335_mb_of_windows():
    sheet = model_sheet(gemma3_12b())
    assert sheet.footprint.token_bytes == 64 * 1024
    assert sheet.sliding_layers == 40
    assert sheet.footprint.nbytes(8192) - 8192 * 64 * 1024 == pytest.approx(335e6, rel=0.002)
    assert [visible for visible, _ in sheet.window_pair_operations] == [1024]


def test_of_a_mixture_of_experts_the_chosen_ones_compute_a_token():
    sheet = model_sheet(MixtralConfig())
    assert sheet.experts == (2, 8)
    assert sheet.parameters == pytest.approx(46.7e9, rel=0.001)
    assert sheet.token_parameters == pytest.approx(12.6e9, rel=0.01)


def test_of_experts_whose_choice_is_not_told_all_count(monkeypatch):
    config = MixtralConfig(num_hidden_layers=1)
    told = model_sheet(config)
    monkeypatch.setattr(sheets, "_ACTIVE_EXPERTS", ("another_name",))
    untold = model_sheet(config)
    assert untold.experts is None
    assert untold.has_experts
    assert untold.token_parameters > told.token_parameters


@pytest.mark.sample(10, of="families whose sheets are compared with real caches")
@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_bytes_are_those_of_a_real_cache(name):
    model = families.build(name)
    sheet = model_sheet(model.config, torch.float32)
    assert sheet.parameters == sum(each.numel() for each in model.parameters())
    layers = (cache := DynamicCache(config=model.config)).layers
    with torch.no_grad():
        model(torch.randint(1, 60, (1, 40)), use_cache=True, **{passed_argument(model): cache})
    per_token = sum(
        value.nbytes // value.shape[-2]
        for layer in layers
        for value in vars(layer).values()
        if isinstance(value, torch.Tensor) and value.ndim > 2
    )
    assert sheet.footprint.token_bytes + sheet.footprint.window_token_bytes == per_token
    if sheet.unknown_layers == 0:
        states = [s for layer in layers for s in _states(layer)]
        assert sheet.footprint.state_bytes == sum(state.nbytes for state in states)


def _states(layer):
    kinds = (getattr(layer, name, None) or {} for name in ("conv_states", "recurrent_states"))
    return [state for states in kinds for state in states.values() if isinstance(state, torch.Tensor)]


def test_a_config_that_forbids_reuse_says_so():
    config = gemma3_12b()
    config.use_bidirectional_attention = True
    assert "later tokens" in model_sheet(config).not_reusable


def test_weights_in_fewer_bits_are_noted_and_their_library_is_not_needed():
    config = llama_8b()
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    sheet = model_sheet(config)
    assert sheet.is_quantised
    assert sheet.footprint.token_bytes == 128 * 1024


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ConfigurationError, match="encoder-decoder"):
        model_sheet(T5Config())


def test_a_config_that_no_model_can_be_made_of_is_refused():
    with pytest.raises(ConfigurationError, match="cannot make a decoder"):
        model_sheet(LlamaConfig(vocab_size=-1, num_hidden_layers=1))


def test_a_config_is_read_from_a_folder_and_errors_name_the_model(tmp_path):
    llama_8b().save_pretrained(tmp_path)
    assert read_config(str(tmp_path)).num_hidden_layers == 32
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ConfigurationError, match=f"model='{tmp_path}'.*config"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ConfigurationError, match="no_such_model"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigurationError, match=r"has no config\.json"):
        read_config(str(tmp_path))
