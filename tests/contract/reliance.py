"""Every name and signature of transformers, accelerate and PEFT that kvtier uses, and the file that uses it.

A version of transformers that changes one of these fails a test; the failure names the change and the kvtier file.
``test_generate_contract.py`` tests their behaviour; ``test_upstream_errors.py`` lists their known bugs.
"""

from __future__ import annotations

from dataclasses import dataclass

import transformers

Version = tuple[int, int]


def version_of(text: str) -> Version:
    """Return major and minor version."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


INSTALLED = version_of(transformers.__version__)


@dataclass(frozen=True)
class Reliance:
    """An upstream name that kvtier uses.

    Attributes:
        name: dotted path, starting with a package.
        where: file below ``kvtier/`` that needs it.
        shape: parameters with defaults and without hints, or ``property``; None accepts any.
        since: first minor version with this name and shape.
        until: first minor version without this name and shape.
    """

    name: str
    where: str
    shape: str | None = None
    since: Version = (5, 0)
    until: Version | None = None

    @property
    def holds_here(self) -> bool:
        """Whether the installed version must have it."""
        return self.since <= INSTALLED and (self.until is None or self.until > INSTALLED)


def _of(prefix: str, where: str, shapes: dict[str, str | None]) -> list[Reliance]:
    return [Reliance(f"{prefix}.{name}", where, shape) for name, shape in shapes.items()]


GENERATE = (
    "(self, inputs=None, generation_config=None, logits_processor=None, stopping_criteria=None, "
    "prefix_allowed_tokens_fn=None, synced_gpus=None, assistant_model=None, streamer=None, negative_prompt_ids=None, "
    "negative_prompt_attention_mask=None, custom_generate=None, **kwargs)"
)
APPEND = "(self, key_states, value_states, *args, **kwargs)"

# Names that kvtier imports.
IMPORTS = [
    Reliance("transformers.__version__", "hf/identity/fingerprint.py"),
    Reliance("transformers.GenerationMixin", "hf/generate/hook.py"),
    Reliance("transformers.EncoderDecoderCache", "hf/generate/run.py"),
    Reliance("transformers.DynamicCache", "hf/layers/build.py"),
    Reliance("transformers.GenerationConfig", "hf/inputs/request.py"),
    Reliance("transformers.PreTrainedConfig", "hf/identity/stable_repr.py"),
    Reliance("transformers.PreTrainedModel", "hf/generate/run.py"),
    Reliance("transformers.Cache", "hf/generate/prefill.py"),
    Reliance("transformers.StoppingCriteria", "hf/generate/prefill.py"),
    Reliance("transformers.StoppingCriteriaList", "hf/generate/run.py"),
    Reliance("transformers.cache_utils", "hf/compat/names.py"),
    Reliance("transformers.cache_utils.Cache", "hf/layers/container.py"),
    Reliance("transformers.cache_utils.CacheLayerMixin", "hf/layers/container.py"),
    Reliance("transformers.cache_utils.DynamicLayer", "hf/layers/build.py"),
    Reliance("transformers.cache_utils.DynamicSlidingWindowLayer", "hf/layers/build.py"),
    Reliance("transformers.cache_utils.DynamicIndexedLayer", "hf/layers/build.py"),
    Reliance("transformers.cache_utils.LinearAttentionLayer", "hf/layers/hybrid.py"),
    Reliance("transformers.cache_utils.LinearAttentionAndFullAttentionLayer", "hf/layers/build.py"),
    Reliance("transformers.cache_utils.LinearAttentionAndSlidingWindowAttentionLayer", "hf/layers/build.py"),
    Reliance("transformers.cache_utils.LinearAttentionCacheLayerMixin", "hf/layers/states.py"),
    Reliance("transformers.cache_utils.DummyLayer", "hf/compat/names.py", since=(5, 23)),
    Reliance("transformers.generation.streamers.BaseStreamer", "hf/generate/run.py"),
    Reliance("transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS", "hf/identity/module_walk.py"),
    Reliance("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS", "hf/identity/module_walk.py"),
    Reliance("transformers.AutoConfig", "hf/meta_model.py"),
    Reliance("transformers.AutoModelForCausalLM", "cli/demo/conversation.py"),
    Reliance("transformers.AutoTokenizer", "cli/demo/conversation.py"),
    Reliance("transformers.MODEL_FOR_CAUSAL_LM_MAPPING", "hf/meta_model.py"),
    Reliance("transformers.LlamaConfig", "cli/doctor/scripts.py"),
    Reliance("transformers.LlamaForCausalLM", "cli/doctor/scripts.py"),
    Reliance("transformers.TextStreamer", "cli/demo/conversation.py"),
    Reliance("transformers.TextStreamer.on_finalized_text", "hf/chat/answer.py", "(self, text, stream_end=False)"),
    Reliance("transformers.PreTrainedTokenizerBase.apply_chat_template", "hf/chat/template.py"),
    Reliance("transformers.PreTrainedTokenizerBase.all_special_ids", "hf/chat/template.py"),
    Reliance("transformers.PreTrainedTokenizerBase.decode", "hf/chat/template.py"),
    Reliance("transformers.PreTrainedTokenizerFast.get_added_vocab", "hf/chat/template.py"),
    Reliance("transformers.ProcessorMixin.apply_chat_template", "hf/chat/template.py"),
    Reliance("transformers.utils.logging", "cli/demo/conversation.py"),
]

# Members that kvtier calls, overrides or reads.
MEMBERS = [
    Reliance("transformers.GenerationMixin.generate", "hf/generate/hook.py", GENERATE),
    Reliance("transformers.GenerationMixin._supports_default_dynamic_cache", "hf/compat/model_profiles.py", "(cls)"),
    Reliance("transformers.StoppingCriteria.__call__", "hf/generate/prefill.py", "(self, input_ids, scores, **kwargs)"),
    Reliance(
        "transformers.GenerationMixin._prepare_cache_for_generation",
        "hf/compat/names.py",
        "(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)",
    ),
    Reliance(
        "transformers.GenerationMixin.prepare_inputs_for_generation",
        "hf/compat/names.py",
        "(self, input_ids, next_sequence_length=None, cache=None, attention_mask=None, inputs_embeds=None, "
        "is_first_iteration=False, **kwargs)",
        since=(5, 24),
    ),
    Reliance(
        "transformers.GenerationMixin.prepare_inputs_for_generation",
        "hf/generate/prefill.py",
        "(self, input_ids, next_sequence_length=None, past_key_values=None, attention_mask=None, inputs_embeds=None, "
        "is_first_iteration=False, **kwargs)",
        until=(5, 24),
    ),
    Reliance("transformers.generation.streamers.BaseStreamer.put", "hf/generate/run.py", "(self, value)"),
    Reliance("transformers.generation.streamers.BaseStreamer.end", "hf/generate/run.py", "(self)"),
    Reliance("transformers.PreTrainedConfig.to_dict", "hf/identity/contents.py", "(self)"),
    Reliance(
        "transformers.PreTrainedConfig.get_text_config", "hf/layers/build.py", "(self, decoder=None, encoder=None)"
    ),
    Reliance("transformers.PreTrainedConfig._attn_implementation", "hf/identity/module_walk.py", "property"),
    Reliance("transformers.PreTrainedConfig._experts_implementation", "hf/identity/module_walk.py", "property"),
    Reliance("transformers.PreTrainedModel.get_output_embeddings", "hf/model_sheet.py", "(self)"),
    Reliance("transformers.EncoderDecoderCache.__init__", "hf/generate/run.py", "(self, *caches)"),
    Reliance(
        "transformers.DynamicCache.__init__",
        "hf/layers/build.py",
        "(self, ddp_cache_data=None, config=None, offloading=False, offload_only_non_sliding=False)",
    ),
    Reliance(
        "transformers.cache_utils.DynamicSlidingWindowLayer.__init__",
        "hf/layers/build.py",
        "(self, sliding_window, **kwargs)",
    ),
    *_of(
        "transformers.cache_utils.Cache",
        "hf/cache.py",
        {
            "__init__": (
                "(self, layers=None, layer_class_to_replicate=None, offloading=False, offload_only_non_sliding=True)"
            ),
            "update": "(self, key_states, value_states, layer_idx, *args, **kwargs)",
            "reorder_cache": "(self, beam_idx)",
            "batch_select_indices": "(self, indices)",
            "batch_repeat_interleave": "(self, repeats)",
            "get_seq_length": "(self, layer_idx=0)",
            "update_conv_state": "(self, conv_states, layer_idx, state_idx=0, **kwargs)",
        },
    ),
    Reliance("transformers.cache_utils.Cache.is_linear", "hf/generate/prefill.py", "property"),
    Reliance(
        "transformers.cache_utils.Cache.get_conv_state",
        "hf/cache.py",
        "(self, layer_idx, state_idx=0)",
        since=(5, 21),
    ),
    *_of(
        "transformers.cache_utils.DynamicIndexedLayer",
        "hf/layers/attention.py",
        {"update_indexer": "(self, indexer_key_states)"},
    ),
    *_of(
        "transformers.cache_utils.LinearAttentionLayer",
        "hf/layers/hybrid.py",
        {
            "__init__": "(self, number_of_states=1, **kwargs)",
            "crop": "(self, tokens_to_remove)",
            "reset": "(self)",
            "reorder_cache": "(self, beam_idx)",
        },
    ),
    *_of(
        "transformers.cache_utils.Cache",
        "hf/turn/manager.py",
        {
            "reset": "(self)",
            "crop": "(self, tokens_to_remove)",
            "get_seq_length": "(self, layer_idx=0)",
        },
    ),
    *_of(
        "transformers.cache_utils.CacheLayerMixin",
        "hf/layers/attention.py",
        {
            "lazy_initialization": "(self, key_states, value_states)",
            "update": APPEND,
            "get_mask_sizes": "(self, query_length)",
            "get_seq_length": "(self)",
            "get_max_length": "(self)",
            "reset": "(self)",
            "reorder_cache": "(self, beam_idx)",
            "is_croppable": None,
        },
    ),
    *_of(
        "transformers.cache_utils.DynamicLayer",
        "hf/layers/attention.py",
        {
            "crop": "(self, tokens_to_remove)",
            "batch_select_indices": "(self, indices)",
            "batch_repeat_interleave": "(self, repeats)",
            "is_sliding": None,
        },
    ),
]

# Parameter names under which forward passes of generating models take an argument annotated as a cache. Each has the
# first minor version that uses the name, and the first that no longer does.
CACHE_PARAMETERS: dict[str, tuple[Version, Version | None]] = {
    "cache": ((5, 24), None),
    "past_key_values": ((5, 0), (5, 24)),
    "cache_params": ((5, 0), (5, 24)),  # Mamba and xLSTM
    "encoder_cache": ((5, 24), None),  # Voxtral Realtime's encoder
    "encoder_past_key_values": ((5, 0), (5, 24)),
    "padding_cache": ((5, 0), None),
}

# kvtier does not import these; it finds them by name.
OTHERS = [
    Reliance(
        "transformers.models.minimax.modeling_minimax.MiniMaxCache.get_linear_cache",
        "hf/compat/external_state.py",
        "(self, layer_idx)",
    ),
    Reliance(
        "transformers.models.minimax.modeling_minimax.MiniMaxCache.set_linear_cache",
        "hf/compat/external_state.py",
        "(self, layer_idx, linear_cache)",
    ),
    Reliance(
        "transformers.models.xlstm.modeling_xlstm.xLSTMCache.__init__",
        "hf/compat/external_state.py",
        "(self, config, max_batch_size, dtype=torch.bfloat16, device=None, **kwargs)",
    ),
    Reliance(
        "transformers.models.rwkv.modeling_rwkv.RwkvModel._rescale_layers", "hf/compat/external_state.py", "(self)"
    ),
    Reliance("accelerate.hooks.ModelHook", "hf/identity/eligibility.py"),
    Reliance("accelerate.hooks.SequentialHook", "hf/identity/eligibility.py"),
    Reliance("accelerate.hooks.AlignDevicesHook", "hf/identity/module_walk.py"),
    Reliance("accelerate.utils.offload.PrefixedDataset", "hf/identity/module_walk.py"),
    Reliance("accelerate.utils.offload.OffloadedWeightsLoader", "hf/identity/module_walk.py"),
    Reliance("peft.tuners.tuners_utils.BaseTunerLayer._active_adapter", "hf/identity/fingerprint.py"),
    Reliance("peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters", "hf/identity/fingerprint.py"),
    Reliance("peft.tuners.tuners_utils.BaseTunerLayer.merged_adapters", "hf/identity/fingerprint.py"),
    Reliance("peft.PeftModel.active_peft_config", "hf/identity/eligibility.py", "property"),
]

# Every public member of a class that kvtier replaces, and the code that handles it. A new member may read or change
# cache contents without going through kvtier's methods: find its callers, and add it here.
KNOWN_MEMBERS: dict[str, dict[str, str]] = {
    "transformers.cache_utils.Cache": {
        "update": "hf/cache.py",
        "reset": "hf/cache.py",
        "crop": "hf/cache.py",
        "reorder_cache": "hf/cache.py",
        "batch_select_indices": "hf/cache.py",
        "batch_repeat_interleave": "hf/cache.py",
        "get_seq_length": "hf/cache.py",
        "get_mask_sizes": "asks one layer",
        "get_max_length": "asks the layers",
        "get_query_offset": "is get_seq_length",
        "has_previous_state": "asks one linear layer",
        "get_conv_state": "hf/cache.py",
        "get_recurrent_state": "asks one linear layer",
        "update_conv_state": "hf/cache.py",
        "update_recurrent_state": "of one linear layer",
        "update_indexer": "of one indexed layer",
        "activate_past_recording": "of the layers that have it",
        "is_recording_past": "asks one layer",
        "is_compileable": "asks the layers: windows are not",
        "is_croppable": "asks the layers",
        "is_initialized": "asks the layers",
        "is_sliding": "asks the layers",
        "is_linear": "asks the classes of the layers",
        "is_dummy": "is told by the classes of the layers",
        "batch_size": "asks the layers",
        "prefetch": "for transformers' own offloading, which is off",
        "offload": "for transformers' own offloading, which is off",
        "early_initialization": "for export, which has no turns",
        "get_max_cache_shape": "asks the layers; gone in 5.20",
        "max_batch_size": "asks the layers; gone in 5.20",
        "max_cache_len": "asks the layers; gone in 5.20",
    },
    "transformers.cache_utils.CacheLayerMixin": {
        "lazy_initialization": "hf/layers/attention.py",
        "update": "hf/layers/attention.py",
        "get_mask_sizes": "hf/layers/attention.py",
        "get_seq_length": "hf/layers/attention.py",
        "get_max_length": "hf/layers/attention.py",
        "reset": "hf/layers/attention.py",
        "reorder_cache": "hf/layers/attention.py",
        "is_croppable": "hf/layers/attention.py",
        "is_compileable": "stays False",
        "supports_early_init": "for export",
        "prefetch": "for transformers' own offloading",
        "offload": "for transformers' own offloading",
        "get_max_cache_shape": "is get_max_length; gone in 5.20",
    },
    "transformers.cache_utils.DynamicLayer": {
        "crop": "hf/layers/attention.py",
        "batch_select_indices": "hf/layers/attention.py",
        "batch_repeat_interleave": "hf/layers/attention.py",
        "is_sliding": "hf/layers/attention.py",
    },
    "transformers.cache_utils.DynamicSlidingWindowLayer": {
        "activate_past_recording": "windows keep every column: nothing to record",
    },
    "transformers.cache_utils.DynamicIndexedLayer": {
        "update_indexer": "hf/layers/attention.py",
        "lazy_initialization_indexer": "is done by update_indexer",
    },
    "transformers.cache_utils.LinearAttentionLayer": {
        "update_conv_state": "is transformers' own",
        "update_recurrent_state": "is transformers' own",
        "lazy_initialization": "is transformers' own",
        "activate_past_recording": "is transformers' own",
        "get_max_length": "is transformers' own",
        "is_compileable": "is transformers' own",
        "is_croppable": "is transformers' own",
        "supports_early_init": "for export",
        "prefetch": "for transformers' own offloading",
        "offload": "for transformers' own offloading",
        "crop": "hf/layers/hybrid.py",
        "reset": "hf/layers/hybrid.py",
        "reorder_cache": "hf/layers/hybrid.py",
    },
    "transformers.EncoderDecoderCache": {"check_dynamic_cache": "asks for DynamicCache, which TieredCache is"},
}

# Every attribute of a linear attention or convolution layer, and whether kvtier stores it with the states. A new
# attribute may be a state too.
STATES = {
    "conv_states": True,
    "recurrent_states": True,
    "is_conv_states_initialized": True,
    "is_recurrent_states_initialized": True,
    "has_previous_state": True,
    "conv_kernel_size": True,
    "dtype": True,
    "device": False,  # the device that holds them
    "number_of_states": False,  # follows from the config
    "record_past": False,  # valid for a single generate()
}

# Layer types that a config can request, including those that models register themselves. A new type needs a decision in
# hf/layers/build.py: a buffer, states, or no reuse.
LAYER_TYPES = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "indexed_attention",
    "conv",
    "linear_attention",
    "hybrid",
    "hybrid_sliding",
    "dummy",
    "moe",  # until 5.22
    "mlp",  # until 5.22
    "deepseek_sparse_attention",  # 5.17
    "qwen_sparse_attention",  # 5.17
    "compressed_sparse_attention",  # DeepSeek V4
    "heavily_compressed_attention",  # DeepSeek V4
    "minimax_m3_sparse",  # MiniMax M3
    "reference_sliding_attention",  # Unlimited OCR
}

# Layer types that kvtier does not store: reuse is off.
NOT_KEPT = {"reference_sliding_attention"}

# Types of rotary position embedding. hf/identity/eligibility.py names those that depend on the sequence length.
ROPE_TYPES_BY_LENGTH = {"dynamic", "longrope"}
ROPE_TYPES = ROPE_TYPES_BY_LENGTH | {"linear", "yarn", "llama3", "proportional"}

# Settings of generate(). hf/inputs/request.py names the settings that affect K and V; it assumes that the others only
# affect the choice of tokens. A new setting may decide which tokens are fed, how often, or in which form.
_SETTINGS = """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind bad_words_ids
    begin_suppress_tokens bos_token_id cache_config cache_implementation compile_config constraints
    continuous_batching_config decoder_start_token_id disable_compile diversity_penalty do_sample dola_layers
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_eos_token_id guidance_scale
    is_assistant length_penalty low_memory max_cache_len max_length max_matching_ngram_size max_new_tokens max_time
    min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_logits output_scores
    pad_token_id penalty_alpha prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits
    repetition_penalty return_dict_in_generate sequence_bias speculation_type stop_strings suppress_tokens
    target_lookbehind temperature token_healing top_h top_k top_p transformers_version typical_p use_cache use_mtp
    watermarking_config
"""
SETTINGS = frozenset(_SETTINGS.split())
