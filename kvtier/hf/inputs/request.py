"""GenerateRequest: the request of one call to a turn; and the arguments of calls that forbid reuse or a warm start."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import GenerationConfig

from kvtier.hf.compat.names import CHUNKS_CONTINUE, POSITIONAL
from kvtier.hf.inputs.chain_inputs import CHAINED, Inputs
from kvtier.hf.inputs.prompt import Prompt
from kvtier.hf.not_reusable import NotReusable


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """A call of ``generate``, or of ``begin``, as a turn sees it.

    Attributes:
        off: why the turn must neither reuse nor be kept.
        cold: why the turn must not start from a stored prefix, though its tokens may be kept.
        lasts: whether ``off`` lies in the model or the set-up, so that it holds for later calls too.
        bypass: why the call runs without a turn that feeds the cache; implies ``off``.
        past: the cache argument: a ``TieredCache``, or an ``EncoderDecoderCache`` of one.
        arguments: arguments of the call besides the cache, by name, as passed to transformers.
        ids: ``[batch, columns]``, as passed.
        mask: ``[batch, columns]``.
        inputs: all inputs, ids included; None where ``off``, and in custom loops.
        prompt: the inputs as rows of ids.
        eos_ids: ids that end a sequence.
        longest_answer: the most new tokens; 0 if not known.
        new_columns: for how many columns after the prompt memory is reserved; 0 if not known.
        repeats: how many rows of the cache continue each row of the prompt.
        feeds: whether the prompt can be fed in pieces.
        watched: whether to record fed tokens, because returned sequences do not tell which row holds which tokens.
        custom: whether code other than transformers' own decides which tokens are fed.
        missing: kinds of media with placeholders, but without tensors.
    """

    off: str | None = None
    cold: str | None = None
    bypass: str | None = None
    past: Any = None
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    inputs: Inputs | None = None
    prompt: Prompt | None = None
    eos_ids: tuple[int, ...] = ()
    longest_answer: int = 0
    new_columns: int = 0
    repeats: int = 1
    feeds: bool = True
    watched: bool = False
    custom: bool = False
    missing: tuple[str, ...] = ()
    lasts: bool = False


_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
Setting = Callable[[str], Any]
"""Name → the value of a generation setting, as ``generate`` will resolve it."""


def why_cold(arguments: Mapping[str, Any], setting: Setting) -> str | None:
    """Return why a call with these arguments cannot start from a stored prefix; None when it can."""
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


def why_unsound_call(arguments: Mapping[str, Any], setting: Setting) -> NotReusable | None:
    """Return why the arguments of a ``generate`` call forbid reuse, besides the reasons that ``read_inputs`` finds."""
    others = unknown_arguments(arguments)
    if others:
        return NotReusable(f"inputs besides tokens may decide K and V: {', '.join(others)}")
    if setting("token_healing"):
        return NotReusable("token healing rewrites the prompt")
    return None


def unknown_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Return the names of ``arguments`` of a ``generate`` call that may affect K and V in an unknown way."""
    custom = arguments.get("custom_generate")  # generate() passes it these arguments, not the model
    told = _HARMLESS | _SETTINGS | CHAINED | set(inspect.signature(custom).parameters if callable(custom) else ())
    return sorted(name for name, value in arguments.items() if value is not None and name not in told)


def is_custom(arguments: Mapping[str, Any], setting: Setting) -> bool:
    """Whether code other than transformers' own decides which tokens are fed: a function, or code from the hub."""
    moved = ("custom_generate", "penalty_alpha", "dola_layers", "constraints", "force_words_ids")
    return any(setting(name) for name in moved) or (setting("num_beam_groups") or 1) > 1
