"""Names in transformers, by version: the module to change when a release renames something."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import transformers
from transformers import Cache, EncoderDecoderCache, GenerationMixin, cache_utils

_log = logging.getLogger(__name__)
Version = tuple[int, int]

OLDEST_TESTED: Version = (5, 17)
NEWEST_TESTED: Version = (5, 24)
"""Versions of transformers that pass the whole test suite. A newer version is tried out first (``compat.canary``)."""


def version_of(text: str) -> Version:
    """Return the major and the minor version that ``text`` begins with."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


INSTALLED: Version = version_of(transformers.__version__)

CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
"""Names of a cache argument: since 5.24 ``cache`` in every model, before that ``cache_params`` in Mamba models."""

CARRIED_ARGUMENTS = ("state",)
"""Names under which models take states that they carry outside of any cache (RWKV)."""


def _cache_argument() -> str | None:
    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), None)


CACHE_ARGUMENT = _cache_argument()
"""Name of the cache argument of attention models in the installed version; None if kvtier does not know it."""


def passed(cache: Any) -> dict[str, Any]:
    """Return ``cache``, of any class, as an argument of ``generate`` and of attention models' forward passes."""
    return {CACHE_ARGUMENT or CACHE_ARGUMENTS[0]: cache}


def forward_argument(model: Any) -> str | None:
    """Return the name under which ``model.forward`` takes a cache; None when it takes none."""
    parameters = inspect.signature(model.forward).parameters
    # Before 5.24, XLM's ``cache`` argument is its own dict.
    new = CACHE_ARGUMENTS[0]
    return next(
        (name for name in CACHE_ARGUMENTS if name in parameters and (name != new or name == CACHE_ARGUMENT)), None
    )


def generate_argument(model: Any) -> str | None:
    """Return the name under which transformers' ``generate`` takes a cache for ``model``; None when it takes none.

    From 5.24 on, all models have one name. Before, it is the name in the model's forward pass.
    """
    name = forward_argument(model)
    return CACHE_ARGUMENT if name is not None and CACHE_ARGUMENTS[0] == CACHE_ARGUMENT else name


def decoder_cache(value: Any) -> Any:
    """Return the cache of the decoder's own K and V: ``value`` itself, or the cache inside or behind it."""
    if isinstance(value, EncoderDecoderCache):
        return value.self_attention_cache
    return value.stands_for if isinstance(getattr(type(value), "stands_for", None), property) else value


def parsed_answer(tokenizer: Any, text: str, prompt: str) -> dict[str, Any] | None:
    """Return the parts of an answer ``text`` (content, reasoning, tool calls), where the tokenizer can tell them apart.

    A tokenizer with ``response_template`` can. None where it cannot, or where the answer is cut off.
    """
    if getattr(tokenizer, "response_template", None) is None:
        return None
    try:
        message = tokenizer.parse_response(text, prefix=prompt)
    except Exception as error:  # whatever a template of a stranger raises; the text itself is kept
        _log.debug("an answer cannot be parsed: %s", error)
        return None
    return message if isinstance(message, dict) and isinstance(message.get("content"), str) else None


# Positional arguments of generate(), in order.
POSITIONAL = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "custom_generate",
)

PREPARE_CACHE = "_prepare_cache_for_generation"
"""The method by which ``generate`` inspects the passed cache; looked up on the model in every call."""

DummyLayer: Any = getattr(cache_utils, "DummyLayer", None)
"""Placeholder class for layers that keep nothing, since 5.23; older versions leave such layers out."""

CHUNKS_CONTINUE = INSTALLED >= (5, 21)
"""Whether ``prefill_chunk_size`` continues a cache. Before, the prompt was computed again on top of it."""

MEDIA_CONTINUE = INSTALLED >= (5, 23)
"""Whether a prompt with images or sounds continues a cache. Before, types, positions or features were miscounted."""

STATES_ARE_COUNTED = hasattr(Cache, "get_conv_state")
"""Whether a cache of states alone learns how many tokens it has seen: since 5.21 layers ask it for their states."""
