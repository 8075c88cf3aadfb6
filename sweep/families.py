"""What single families need to be made tiny beyond the general way, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LINEAR_THEN_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]
_CONV_THEN_FULL = ["conv", "full_attention", "conv", "full_attention"]
_SLIDING_THEN_FULL = ["sliding_attention", "full_attention"] * 3

_TRAINED = 48  # positions: more than a first prompt, fewer than a second one


@dataclass(frozen=True, slots=True)
class Family:
    """How one family's tiny config differs.

    Attributes:
        why: the reason.
        settings: fields, over those of the general way; a mapping goes into the config of that name.
        without: fields that the general way must not set.
    """

    why: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()


FAMILIES: Mapping[str, Family] = {
    "bamba": Family(
        "no layer attends by default, and state heads must divide twice the width",
        {"num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": "auto"},
    ),
    "blt": Family(
        "half a million hashed embeddings by default",
        {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    ),
    "cohere_compass_text": Family(
        "rotary sections must add up to half a head",
        {
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
                for kind in ("full_attention", "sliding_attention")
            }
        },
    ),
    "dbrx": Family(
        "its attention needs fields that its default config lacks",
        {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    ),
    "deepseek_v2": Family("no count of chosen experts by default", {"num_experts_per_tok": 2}),
    "deepseek_v4": Family(
        "keys are pooled more rarely than a prompt is long",
        {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    ),
    "dots1": Family(
        "no experts by default",
        {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    ),
    "dots3_note_text": Family(
        "sliding layers have sizes of their own, made from these arguments",
        {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 12,
        },
    ),
    "dory": Family(
        "runs of layers: before the loop, in it, after it; of each kind one in the loop and one outside; "
        "by default, a layer changes hardly anything",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
            "n_input_layers": 1,
            "n_recurrent_layers": 2,
            "n_output_layers": 1,
            "n_recurrent_loops": 3,
            "ngpt_alpha_init": 0.5,
        },
    ),
    "falcon_h1": Family(
        "state heads must divide twice the width", {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128}
    ),
    "gemma3n_text": Family(
        "the last layers read K and V of an earlier one of each kind",
        {
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "intermediate_size": 64,
            "layer_types": _SLIDING_THEN_FULL,
            "activation_sparsity_pattern": [0.0] * 6,
        },
    ),
    "gemma4_text": Family(
        "the last layers read K and V of an earlier one of each kind; full layers have larger heads",
        {
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "layer_types": _SLIDING_THEN_FULL,
            "global_head_dim": 24,
        },
    ),
    "gemma4_unified_text": Family("full layers have larger heads, made from this argument", {"global_head_dim": 24}),
    "granitemoehybrid": Family(
        "no layer attends by default, and state heads must divide twice the width",
        {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": "auto",
        },
    ),
    "hrm_text": Family(
        "its layers run in cycles, and each run is counted as a layer",
        {"num_hidden_layers": 2, "H_cycles": 2, "L_cycles": 2},
        without=("num_layers_per_stack",),
    ),
    "inkling2_loop_text": Family(
        "the loop must begin and end with a block of layers; of each kind one in the loop and two outside",
        {
            "num_hidden_layers": 6,
            "layer_types": ["hybrid_sliding", "hybrid"] * 3,
            "n_layers_per_attn_res_block": 2,
            "loop_layer_index_start": 2,
            "loop_layer_index_end": 4,
            "loop_gate_rank": 8,
        },
    ),
    "jamba": Family(
        "which layers attend follows from a period",
        {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "lfm2": Family(
        "no layer convolves by default",
        {"num_hidden_layers": 4, "layer_types": _CONV_THEN_FULL},
        without=("full_attn_idxs",),
    ),
    "lfm2_moe": Family("no kinds of layers by default", {"num_hidden_layers": 4, "layer_types": _CONV_THEN_FULL}),
    "mamba2": Family("heads times their size must be twice the width", {"num_heads": 8, "head_dim": 16, "n_groups": 2}),
    "minimax": Family("linear attention goes through a prompt in blocks", {"block_size": 16}),
    "minimax_m3_vl_text": Family(
        "no layer is sparse by default",
        {"num_hidden_layers": 4, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
        without=("mlp_layer_types",),
    ),
    "moshi": Family("its positions end where its window does", {"sliding_window": 512}),
    "musicgen_decoder": Family("a token is a row of codes; with one codebook it is an id", {"num_codebooks": 1}),
    "musicgen_melody_decoder": Family("a token is a row of codes; with one codebook it is an id", {"num_codebooks": 1}),
    "nemotron_h": Family(
        "heads times their size must be twice the width",
        {
            "num_hidden_layers": 6,
            "layers_block_type": [
                "linear_attention",
                "moe",
                "full_attention",
                "mlp",
                "linear_attention",
                "full_attention",
            ],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
        },
    ),
    "qwen4_exp_text": Family(
        "no sizes of its indexer by default, and millions of n-grams",
        {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
            "ple_embed_dim": 64,
            "hc_lowrank": 8,
            "ngram_vocab_size_base": 128,
            "split_ngram_parts": 1,
        },
    ),
    "recurrent_gemma": Family("which layers attend follows from a pattern of three", {"num_hidden_layers": 3}),
    "reformer": Family(
        "positions must factor, buckets be counted, and hashes be the same each time",
        {"hash_seed": 1, "num_buckets": 4, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]},
    ),
    "xlm": Family("it finds padding by an id, and answers where a mask stands", {"pad_index": 0, "mask_token_id": 1}),
    "xlstm": Family(
        "the width of keys is rounded up to 64", {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 16}
    ),
    "xmod": Family("a language must be chosen", {"default_language": "en_XX"}),
    "zamba": Family(
        "attention is twice as wide as the rest, and the shared block needs two uses",
        {
            "num_hidden_layers": 5,
            "layers_block_type": _LINEAR_THEN_HYBRID,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "num_key_value_heads": 4,
            "mamba_dt_rank": "auto",
        },
    ),
    "zamba2": Family(
        "attention is twice as wide as the rest, and the shared block needs two uses",
        {
            "num_hidden_layers": 5,
            "layers_block_type": _LINEAR_THEN_HYBRID,
            "hybrid_layer_ids": [1, 3],
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "num_key_value_heads": 4,
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
        },
    ),
}

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "doge:beyond_window": {"keep_window_size": 16},  # it chooses among keys as soon as there are more
    "phi3:longrope": {  # a sequence beyond the trained length turns all its keys by other angles
        "original_max_position_embeddings": _TRAINED,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": _TRAINED,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        },
    },
    "dory:last_loop": {"recurrent_kv_cache_mode": "last_loop"},  # by default, each loop keeps K and V of its own
}
"""``model type:name`` → settings, of ways to run a family that keep another kind of cache than its default does."""

NOT_ALONE: Mapping[str, str] = {
    "gemma4_assistant": "drafts for another model: it reads that model's K and V and has none",
    "gemma4_unified_assistant": "drafts for another model: it reads that model's K and V and has none",
}
"""Classes that are listed as causal language models and are not decoders on their own, each with what they are."""
