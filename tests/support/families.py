"""Tiny models of many families, with one config per family: together they have every kind of cache layer.

All are seeded, have no end-of-sequence token, and use 0 for padding. Weights are large and vocabularies small, so that
earlier tokens decide the next word. Sliding windows and chunks have at most 16 tokens, so that prompts overflow them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

PADDING = 0
_SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # far from zero: attention must decide the next token
    "pad_token_id": PADDING,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SLIDING_THEN_FULL = ["sliding_attention", "sliding_attention", "full_attention"]
_LINEAR_THEN_FULL = ["linear_attention", "full_attention", "linear_attention"]
# All experts are used: the choice between two nearly equal experts is chance, independent of any cache.
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "head_dim": 8,
}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
# Many small indexer heads: with few heads, whole keys score exactly zero, and the choice among them is chance.
_INDEXER = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 8}
# These models clamp the time step at this value in a prompt, but not in a single step. A limit that is never reached
# makes both agree.
_UNCLAMPED = {"time_step_min": 1e-6}
_DELTA = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


@dataclass(frozen=True, slots=True)
class Family:
    """Recipe for a tiny model.

    Attributes:
        config: name of the config class in transformers.
        model: name of the model class.
        kinds: contents of its layers: ``full``, ``sliding`` or ``chunked`` K and V; ``latent``: K and V of different
            sizes; ``indexed``: keys of an indexer; ``linear`` and ``conv`` states; ``hybrid``: K and V and states in
            one layer; ``pooled``: K and V of several tokens together; ``mixed``: states and K and V in different
            layers; ``shared``: K and V that later layers read.
        different: settings that differ from the common shape.
        sdpa: whether SDPA computes its attention.
    """

    config: str
    model: str
    kinds: frozenset[str]
    different: dict[str, Any] = field(default_factory=dict)
    sdpa: bool = True

    @property
    def has_states(self) -> bool:
        """Whether a layer keeps states that are valid at one position only."""
        return bool(self.kinds & {"linear", "conv", "hybrid", "pooled"})


def _family(name: str, kinds: str, *, text: str = "", model: str = "", sdpa: bool = True, **different: Any) -> Family:
    return Family(f"{name}{text}Config", model or f"{name}ForCausalLM", frozenset(kinds.split()), different, sdpa)


FAMILIES: dict[str, Family] = {
    # --- K and V of every token ---------------------------------------------------------------------------------------
    "llama": _family("Llama", "full"),
    "qwen2": _family("Qwen2", "full"),
    "qwen3": _family("Qwen3", "full", head_dim=16),
    "phi3": _family("Phi3", "full"),
    "olmo2": _family("Olmo2", "full"),
    "granite": _family("Granite", "full"),
    "gpt2": _family("GPT2", "full", model="GPT2LMHeadModel", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": _family("GPTNeoX", "full"),
    "opt": _family("OPT", "full", ffn_dim=64, init_std=0.2, dropout=0.0, word_embed_proj_dim=64),
    "bloom": _family("Bloom", "full"),
    "falcon": _family("Falcon", "full", new_decoder_architecture=True, num_kv_heads=2),
    "mixtral": _family("Mixtral", "full", **_EXPERTS),
    "qwen3_moe": _family("Qwen3Moe", "full", head_dim=16, **_EXPERTS),
    "deepseek_v3": _family("DeepseekV3", "full latent", **_LATENT, **_ROUTED),
    # --- sliding windows and chunks -----------------------------------------------------------------------------------
    "mistral": _family("Mistral", "sliding", sliding_window=16, head_dim=16),
    "starcoder2": _family("Starcoder2", "sliding", sliding_window=12),
    "phi3_mini": _family("Phi3", "sliding", sliding_window=10, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0),
    "olmo3": _family("Olmo3", "full sliding", sliding_window=7, layer_types=_SLIDING_THEN_FULL),
    # SDPA does not compute soft caps and attention sinks.
    "gemma2": _family("Gemma2", "full sliding", sliding_window=16, head_dim=16, sdpa=False, tie_word_embeddings=False),
    "gemma3": _family(
        "Gemma3",
        "full sliding",
        text="Text",
        sliding_window=16,
        head_dim=16,
        layer_types=_SLIDING_THEN_FULL,
        tie_word_embeddings=False,
    ),
    "cohere2": _family("Cohere2", "full sliding", sliding_window=6, layer_types=_SLIDING_THEN_FULL, logit_scale=1.0),
    "gpt_oss": _family(
        "GptOss",
        "full sliding",
        sliding_window=16,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=4,
        sdpa=False,
    ),
    "llama4": _family(
        "Llama4",
        "full chunked",
        text="Text",
        head_dim=16,
        intermediate_size_mlp=64,
        num_local_experts=4,
        num_experts_per_tok=4,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "chunked_attention", "full_attention"],
    ),
    # --- layers that read the K and V of others -----------------------------------------------------------------------
    "gemma3n": _family(
        "Gemma3n",
        "full sliding shared",
        text="Text",
        num_hidden_layers=4,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=60,
        hidden_size_per_layer_input=8,
        tie_word_embeddings=False,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4": _family(
        "Gemma4",
        "full sliding shared",
        text="Text",
        num_hidden_layers=4,
        head_dim=16,
        global_head_dim=32,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=60,
        hidden_size_per_layer_input=8,
        tie_word_embeddings=False,
    ),
    # --- an indexer selects the tokens for attention ------------------------------------------------------------------
    "deepseek_v32": _family("DeepseekV32", "indexed latent", **_LATENT, **_ROUTED, **_INDEXER),
    "glm_moe_dsa": _family("GlmMoeDsa", "indexed latent", **_LATENT, **_ROUTED, **_INDEXER),
    # --- keys and values pooled over several tokens -------------------------------------------------------------------
    "deepseek_v4": _family(
        "DeepseekV4",
        "sliding pooled",
        num_key_value_heads=1,
        head_dim=16,
        q_lora_rank=16,
        o_lora_rank=16,
        o_groups=2,
        sliding_window=8,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        compress_rates={"heavily_compressed_attention": 8, "compressed_sparse_attention": 4},
        tie_word_embeddings=False,
        **_INDEXER,
        **_ROUTED,
    ),
    # --- states that are valid at one position ------------------------------------------------------------------------
    "mamba": _family("Mamba", "linear", state_size=8),
    "mamba2": _family("Mamba2", "linear", state_size=16, num_heads=8, head_dim=16, n_groups=2, chunk_size=8),
    "falcon_h1": _family("FalconH1", "hybrid", mamba_d_ssm=128, **_MAMBA),
    "zamba2": _family(
        "Zamba2",
        "linear hybrid",
        num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=16,
        n_mamba_heads=8,
        chunk_size=8,
        adapter_rank=8,
        **_UNCLAMPED,
    ),
    "jamba": _family(
        "Jamba",
        "full linear mixed",
        attn_layer_period=3,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=8,
        num_experts=4,
        num_experts_per_tok=4,
    ),
    "bamba": _family("Bamba", "full linear mixed", attn_layer_indices=[1], **_MAMBA),
    "granitemoehybrid": _family(
        "GraniteMoeHybrid",
        "full linear mixed",
        layer_types=_LINEAR_THEN_FULL,
        num_local_experts=4,
        num_experts_per_tok=4,
        shared_intermediate_size=32,
        **_MAMBA,
    ),
    "nemotron_h": _family(
        "NemotronH",
        "full linear mixed",
        num_hidden_layers=4,
        layers_block_type=["mamba", "attention", "mlp", "mamba"],
        head_dim=16,
        ssm_state_size=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=8,
        **_UNCLAMPED,
    ),
    "qwen3_next": _family(
        "Qwen3Next",
        "full linear mixed",
        head_dim=16,
        layer_types=_LINEAR_THEN_FULL,
        shared_expert_intermediate_size=32,
        **_DELTA,
        **_EXPERTS,
    ),
    "olmo_hybrid": _family("OlmoHybrid", "full linear mixed", layer_types=_LINEAR_THEN_FULL, **_DELTA),
    "lfm2": _family(
        "Lfm2",
        "full conv mixed",
        layer_types=["conv", "full_attention", "conv"],
        block_multiple_of=16,
        block_auto_adjust_ff_dim=False,
    ),
}


def build(
    name: str, *, dtype: torch.dtype = torch.float32, attention: str = "eager", seed: int = 0, **config: Any
) -> PreTrainedModel:
    """Return a new tiny model; the same arguments give the same weights."""
    family = FAMILIES[name]
    # Copied: tests edit lists of a config in place, and all families share these.
    values = copy.deepcopy({**_SHAPE, **family.different, **config})
    settings = getattr(transformers, family.config)(**values)
    settings._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, family.model)(settings).eval()
    model.generation_config.pad_token_id = PADDING
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def with_kinds(*kinds: str) -> list[str]:
    """Return the families that have one of ``kinds``."""
    return [name for name, family in FAMILIES.items() if family.kinds & set(kinds)]
