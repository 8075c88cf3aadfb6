"""A tiny config out of any model's default one: few layers, at least one of each kind, and small sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from sweep.families import FAMILIES

VOCABULARY = 100
WINDOW = 16  # prompts are longer, so that sliding layers drop columns
PAD = 0
WEIGHT_SPREAD = 0.2  # far from zero: what is attended to must decide which token comes next
_SPREADS = ("initializer_range", "init_std", "initializer_factor")

_LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "num_blocks",
    "encoder_layers", "num_encoder_layers", "num_layers_per_stack",
)  # fmt: skip
# Fields by their tiny value. They are set where the default is a larger integer.
_BY_SIZE: Sequence[tuple[int, str]] = (
    (
        512,
        """max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions
        original_max_position_embeddings context_length""",
    ),
    (VOCABULARY, "vocab_size_per_layer_input unpadded_vocab_size"),
    (
        64,
        """hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size output_embedding_size
        word_embed_proj_dim lru_width intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner dff dim_ff
        feed_forward_size pronunciation_embed_dim shape_embed_dim""",
    ),
    (
        32,
        """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size ffn_hidden_size
        shared_experts_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size
        dense_intermediate_size intermediate_size_mlp""",
    ),
    (24, "index_topk"),  # fewer than a prompt has tokens
    (
        16,
        """head_dim swa_head_dim kv_channels dim_head d_head attention_head_size kv_lora_rank q_lora_rank o_lora_rank
        qk_head_dim index_head_dim router_hidden_size
        index_n_heads""",
    ),  # few heads of an indexer would leave scores of exactly zero, and draws between keys
    (
        WINDOW,
        """sliding_window attention_chunk_size sliding_window_size window_size local_attention
        local_attention_window_len attention_window_size rel_extent""",
    ),
    (12, "v_head_dim"),  # unlike the keys' 16
    (
        8,
        """qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state
        state_size ssm_state_size mamba_chunk_size chunk_size hidden_size_per_layer_input laurel_rank rotary_dim d_rel
        time_step_rank mamba_dt_rank adapter_rank index_block_size""",
    ),
    (
        4,
        """num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads
        num_query_groups num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_experts
        n_routed_experts num_local_experts moe_num_experts""",
    ),
    (3, "index_topk_blocks"),
    (
        2,
        """num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk
        moe_k zero_expert_num linear_num_key_heads linear_num_value_heads linear_num_heads type_vocab_size o_groups""",
    ),
    (
        1,
        """n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts
        first_k_dense_replace""",
    ),
)
SIZES = {name: size for size, names in _BY_SIZE for name in names.split()}


def shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the arguments that make ``type(config)`` tiny: only fields that ``config`` has."""
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    tiny: dict[str, Any] = {}
    count = next((fields[name] for name in _LAYER_COUNTS if isinstance(fields.get(name), int)), 0)
    lists = {name: value for name, value in fields.items() if _is_list(value) and count > 1 and len(value) == count}
    layers = picked_layers(lists, count)
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            tiny[name] = shrink(value)
        elif name in _LAYER_COUNTS and isinstance(value, int):
            tiny[name] = min(len(layers), value) if value == count else min(2, value)
        elif name in lists:
            tiny[name] = [SIZES.get(name, value[index]) for index in layers]
        elif name == "bos_token_id":
            tiny[name] = 1
        elif name == "eos_token_id":
            tiny[name] = None
        elif name == "pad_token_id":
            tiny[name] = PAD
        elif name == "vocab_size":
            tiny[name] = VOCABULARY
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            tiny[name] = min(value, SIZES[name])
        elif name in ("head_dim", "num_key_value_heads", "n_routed_experts") and value is None:
            tiny[name] = SIZES[name]  # where nothing is worked out from the others, None fails
        elif name in _SPREADS and isinstance(value, float) and value < WEIGHT_SPREAD:
            tiny[name] = WEIGHT_SPREAD
        elif name == "is_decoder":
            tiny[name] = True
        elif isinstance(value, float) and "drop" in name:
            tiny[name] = 0.0
    if "qk_rope_head_dim" in fields:  # latent attention: one key head for each query head, and only a part is rotated
        tiny |= {"num_key_value_heads": SIZES["num_attention_heads"]} if "num_key_value_heads" in fields else {}
        tiny |= {"head_dim": SIZES["qk_rope_head_dim"]} if "head_dim" in fields else {}
    family = FAMILIES.get(config.model_type)
    if family is None:
        return tiny
    return _over({name: value for name, value in tiny.items() if name not in family.without}, family.settings)


def picked_layers(lists: Mapping[str, Sequence[Any]], count: int) -> list[int]:
    """Return which of ``count`` layers to keep: of each kind that ``lists`` tell apart one, of attention kinds two."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for index in range(count):
        for name, values in lists.items():
            if isinstance(values[index], str):
                kinds.setdefault((name, values[index]), []).append(index)
    picked = {index for (name, _), where in kinds.items() for index in where[: 2 if name == "layer_types" else 1]}
    picked |= set(range(min(2, count))) if len(picked) < 2 else set()
    return sorted(picked)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``below`` with ``above`` written over it, mapping by mapping."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _over(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return merged
