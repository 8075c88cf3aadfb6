"""Arguments of a generate() call that forbid reuse, or a start from a stored prefix."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from kvtier.hf.compat.names import CHUNKS_CONTINUE, POSITIONAL
from kvtier.hf.inputs.chain_inputs import CHAINED
from kvtier.hf.not_reusable import NotReusable

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def why_cold(arguments: Mapping[str, Any], setting: Any) -> str | None:
    """Return why this call cannot start from a stored prefix; None when it can.

    Args:
        arguments: arguments of the call, by name.
        setting: ``setting(name)`` resolves a generation setting as ``generate`` will.
    """
    if any(setting(name) for name in _ASSISTED):
        return "assisted decoding starts cold"
    if setting("prefill_chunk_size") and not CHUNKS_CONTINUE:
        return "prefill in chunks starts cold in this version of transformers"
    if is_custom(arguments, setting):  # contrastive search, for example, needs the hidden states of every token
        return "a custom generate may want what the model says of the whole prompt"
    return None


DROPPED = frozenset({"labels", "next_sequence_length"})
"""Arguments that ``generate`` accepts, but passes to no forward pass."""


# The above, arguments that generate() keeps for itself, and model arguments that do not change K and V.
_HARMLESS = (
    frozenset(POSITIONAL)
    | DROPPED
    | {
        "input_ids",
        "tokenizer",
        "assistant_tokenizer",
        "trust_remote_code",
        "attention_mask",
        "use_cache",
        "logits_to_keep",
        "num_items_in_batch",
        "output_router_logits",
        "return_dict",
        "debug_io",
    }
)


_SETTINGS = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))


def why_unsound_call(arguments: Mapping[str, Any], setting: Any) -> NotReusable | None:
    """Return why the arguments of a ``generate`` call forbid reuse, besides the reasons that ``read_inputs`` finds.

    Args:
        arguments: all arguments of the call, by name.
        setting: ``setting(name)`` resolves a generation setting as ``generate`` will.
    """
    others = unknown_arguments(arguments)
    if others:
        return NotReusable(f"inputs besides tokens may decide K and V: {', '.join(others)}")
    if setting("token_healing"):
        return NotReusable("token healing rewrites the prompt")
    return None


def unknown_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Return the names of ``arguments`` of a ``generate`` call that may affect K and V in an unknown way."""
    told = _HARMLESS | _SETTINGS | CHAINED | _own_arguments(arguments.get("custom_generate"))
    return sorted(name for name, value in arguments.items() if value is not None and name not in told)


def _own_arguments(function: Any) -> frozenset[str]:
    """Return the arguments that ``generate`` passes to a custom function instead of the model."""
    return frozenset(inspect.signature(function).parameters) if callable(function) else frozenset()


def is_custom(arguments: Mapping[str, Any], setting: Any) -> bool:
    """Whether code other than transformers' own decides which tokens are fed: a function, or code from the hub."""
    moved = ("custom_generate", "penalty_alpha", "dola_layers", "constraints", "force_words_ids")
    return any(setting(name) for name in moved) or (setting("num_beam_groups") or 1) > 1
