"""Models that transformers computes otherwise when it goes on from a cache than at once, and what to do about it.

Each entry was found by comparing one forward pass over a whole prompt with passes that continue a ``DynamicCache``.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Cache

from kvtier.hf.carriers import carried_argument

_OFF = {
    "cpmant": "the model puts columns of its own before the prompt's",
    "prophetnet": "the model goes on from a cache by one token at a time only, and not to the same K and V",
    "recurrent_gemma": "the model keeps its recurrent state in its modules, outside of any cache",
}
# A cache shows these no more than a window, which they do not have without one; their positions end with it.
_WITHIN_WINDOW = frozenset({"moshi"})
# Where rows are padded, these go on from a cache to other K and V than at once.
_NOT_PADDED = frozenset({"git", "minimax_m3_vl", "minimax_m3_vl_text"})
# A model that is not told positions counts columns, padding among them; these look at distances alone.
_BY_DISTANCE = frozenset({"bloom", "mpt"})
# A pass over several tokens begins these with an empty recurrent state, whatever the cache holds.
_TOKEN_BY_TOKEN = frozenset({"falcon_mamba", "jamba", "mamba", "zamba"})
# One token at a time, these compute other states than over many tokens at once.
_DECODES_OTHERWISE = frozenset({"nemotron_h", "zamba2"})


def why_off(model: Any) -> str | None:
    """Return why nothing of this kind of model may be reused; None when it may."""
    counts = carried_argument(model) is not None or hasattr(Cache, "get_conv_state")
    if cache_argument(model) == "cache_params" and not counts:
        return "before 5.21, transformers tells a cache of states alone not how many tokens it has seen"
    return _OFF.get(model.config.model_type)


def why_not_so(model: Any, columns: int, is_padded: bool, longest_answer: int) -> str | None:
    """Return why nothing of a prompt of such a shape may be reused; None when it may.

    Args:
        model: the model.
        columns: of the prompt.
        is_padded: whether any row of it is.
        longest_answer: new tokens at most; 0 where nobody can tell.
    """
    if is_padded and model.config.model_type in _NOT_PADDED:
        return "transformers goes on from padded rows of this model otherwise than it computes them at once"
    if is_padded and _counts_columns(model):
        return "the positions of this model count padding too: what is known of a row holds for its padding only"
    if model.config.model_type not in _WITHIN_WINDOW:
        return None
    window = model.config.get_text_config(decoder=True).sliding_window
    if longest_answer and columns + longest_answer <= window:
        return None
    return f"transformers shows this model no more than {window} tokens of a cache; set max_new_tokens to stay within"


def _counts_columns(model: Any) -> bool:
    told = "position_ids" in inspect.signature(type(model).forward).parameters
    return not told and cache_argument(model) == "past_key_values" and model.config.model_type not in _BY_DISTANCE


def takes_token_by_token(model: Any) -> bool:
    """Whether a model that goes on from a known prefix must be given one token at a time."""
    return model.config.model_type in _TOKEN_BY_TOKEN


def decodes_otherwise(model: Any) -> bool:
    """Whether the states after generated tokens are not those that a prompt of the same tokens would have given."""
    return model.config.model_type in _DECODES_OTHERWISE


def why_no_cache(model: Any) -> str | None:
    """Return why ``generate`` does not take a cache for this model; None when it does."""
    name = type(model).__name__
    if carried_argument(model) is not None:
        return None
    if not {"past_key_values", "cache_params"} & set(inspect.signature(model.forward).parameters):
        return f"{name} uses no cache"
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        return f"{name} uses a cache of its own"
    return None


def cache_argument(model: Any) -> str:
    """Return the name under which the model takes a cache."""
    carried = carried_argument(model)
    if carried is not None:
        return carried
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"
