"""Tiny models with unusual inputs or outputs: bytes in patches, and audio frames instead of words."""

from __future__ import annotations

import functools

import torch
from transformers import BltConfig, BltForCausalLM, CsmConfig, CsmForConditionalGeneration, PreTrainedModel


@functools.cache
def blt() -> PreTrainedModel:
    """A byte latent transformer, which divides its bytes into patches by their entropy."""
    part = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
    local = {**part, "vocab_size": 260, "cross_attn_k": 2, "hidden_size_global": 64, "hidden_size": 32}
    config = BltConfig(
        vocab_size=260,
        patch_in_forward=True,
        patching_mode="entropy",
        patching_threshold=1.3,
        patch_size=4,
        cross_attn_k=2,
        encoder_hash_byte_group_size=[2, 3],
        encoder_hash_byte_group_vocab=64,
        encoder_hash_byte_group_nb_functions=1,
        patcher_config={**part, "vocab_size": 260, "hidden_size": 32},
        encoder_config=local,
        decoder_config=local,
        global_config={**part, "hidden_size": 64},
        tie_word_embeddings=False,
    )
    config.num_hidden_layers = 2  # generate() reads it
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = BltForCausalLM(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


@functools.cache
def csm() -> PreTrainedModel:
    """A model that answers words with frames of four codes each."""
    part = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    part |= {"num_key_value_heads": 2, "head_dim": 16}
    codes = {**part, "vocab_size": 60, "num_codebooks": 4}
    codec = {**part, "model_type": "mimi", "num_filters": 8, "upsampling_ratios": [2, 2], "num_quantizers": 4}
    codec |= {
        "codebook_size": 32,
        "codebook_dim": 32,
        "vector_quantization_hidden_dimension": 32,
        "upsample_groups": 32,
    }
    config = CsmConfig(
        **codes,
        text_vocab_size=60,
        codebook_pad_token_id=0,
        codebook_eos_token_id=1,
        depth_decoder_config={**codes, "backbone_hidden_size": 32, "max_position_embeddings": 5},
        codec_config=codec,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        audio_token_id=50,
        audio_eos_token_id=51,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = CsmForConditionalGeneration(config).eval()
    return model
