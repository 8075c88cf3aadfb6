"""ModelProfile: a table of the models that differ from transformers' general behaviour.

Most entries were found by comparing one forward pass over a whole prompt with passes that continue a ``DynamicCache``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kvtier.hf.compat.names import INSTALLED, STATES_ARE_COUNTED, Version, forward_argument, generate_argument


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Particularities of the models of one ``model_type``.

    Attributes:
        off: why nothing is reused.
        off_before: the first version of transformers in which ``off`` no longer holds; None while it holds in all.
        within: the name of the config value that limits the total of tokens up to which a cache continues correctly.
        not_padded: padded rows get other K and V when they continue a cache than in one pass.
        by_distance: attention depends on distances alone, so that padding shifts nothing.
        token_by_token: a pass over several tokens begins with an empty recurrent state, whatever the cache holds.
        decodes_otherwise: one token at a time, the model computes other states than over many tokens at once.
        sees_ahead: tokens attend to later tokens, beyond a run of placeholders.
        media_by_row: the main tensor of images is ``[rows, images of a row, …]``.
        carried_argument: the argument that takes states carried outside of any cache; ``"cache"`` means the cache
            argument.
        notes_on_cache: attributes that the model sets on a cache object, about the prompt of one call.
    """

    off: str | None = None
    off_before: Version | None = None
    within: str | None = None
    not_padded: bool = False
    by_distance: bool = False
    token_by_token: bool = False
    decodes_otherwise: bool = False
    sees_ahead: bool = False
    media_by_row: bool = False
    carried_argument: str | None = None
    notes_on_cache: tuple[str, ...] = ()

    @property
    def why_off(self) -> str | None:
        """Return why nothing is reused in the installed version of transformers; None when it may be."""
        return self.off if self.off_before is None or self.off_before > INSTALLED else None


_MISCOUNTS = "before 5.18, transformers continues this model from a cache to other K and V"
_OWN_DICT = "the model keeps K and V in a dict of its own, and continues it by one token at a time only"

PROFILES: Mapping[str, ModelProfile] = MappingProxyType(
    {
        "big_bird": ModelProfile(off=_MISCOUNTS, off_before=(5, 18)),
        "bloom": ModelProfile(by_distance=True),
        "blt": ModelProfile(off="the model divides bytes into other patches when it continues a cache than at once"),
        "cpmant": ModelProfile(off="the model puts columns of its own before the prompt's"),
        "diffusion_gemma": ModelProfile(sees_ahead=True),
        "doge": ModelProfile(off=_MISCOUNTS, off_before=(5, 18), within="keep_window_size"),
        "embedding_gemma2": ModelProfile(sees_ahead=True),
        "falcon_mamba": ModelProfile(token_by_token=True),
        "flaubert": ModelProfile(off=_OWN_DICT),
        "florence2": ModelProfile(sees_ahead=True),
        "git": ModelProfile(off=_MISCOUNTS, off_before=(5, 18), not_padded=True),
        "idefics2": ModelProfile(media_by_row=True),
        "idefics3": ModelProfile(media_by_row=True),
        "jamba": ModelProfile(token_by_token=True),
        "mamba": ModelProfile(token_by_token=True),
        "megatron-bert": ModelProfile(off=_MISCOUNTS, off_before=(5, 18)),
        "minimax": ModelProfile(carried_argument="cache"),
        "minimax_m3_vl": ModelProfile(not_padded=True),
        "molmo2": ModelProfile(sees_ahead=True),
        "moshi": ModelProfile(within="sliding_window"),
        "mpt": ModelProfile(by_distance=True),
        "nemotron_h": ModelProfile(decodes_otherwise=True),
        "paligemma": ModelProfile(sees_ahead=True),
        "prophetnet": ModelProfile(
            off="the model continues a cache by one token at a time only, and not to the same K and V"
        ),
        "qwen4_exp": ModelProfile(
            off="before 5.21, the model keeps the positions of its last prompt on the cache",
            off_before=(5, 21),
            notes_on_cache=("position_ids",),
        ),
        "recurrent_gemma": ModelProfile(off="the model keeps its recurrent state in its modules, outside of any cache"),
        "rembert": ModelProfile(off=_MISCOUNTS, off_before=(5, 18)),
        "roformer": ModelProfile(off=_MISCOUNTS, off_before=(5, 18)),
        "rwkv": ModelProfile(carried_argument="state"),
        "smolvlm": ModelProfile(media_by_row=True),
        "unlimited_ocr": ModelProfile(sees_ahead=True),
        "xlm": ModelProfile(off=_OWN_DICT),
        "xlstm": ModelProfile(carried_argument="cache"),
        "zamba": ModelProfile(token_by_token=True),
        "zamba2": ModelProfile(decodes_otherwise=True),
    }
)
_PLAIN = ModelProfile()


def profile_of(model: Any) -> ModelProfile:
    """Return the profile of ``model``, or of a config that has a ``model_type``.

    The text part of a model, ``…_text``, has the profile of the whole model unless it has its own.
    """
    model_type = str(getattr(getattr(model, "config", model), "model_type", ""))
    return PROFILES.get(model_type) or PROFILES.get(model_type.removesuffix("_text"), _PLAIN)


def forget_notes(model: Any, cache: Any) -> None:
    """Delete the attributes that ``model`` set on a cache object in an earlier call: they are about another prompt."""
    for name in profile_of(model).notes_on_cache:
        vars(cache).pop(name, None)


def cache_argument(model: Any) -> str | None:
    """Return the name under which ``generate`` passes ``model`` its cache, or the replacement for it."""
    carried = profile_of(model).carried_argument
    return carried if carried not in (None, "cache") else generate_argument(model)


def passed_argument(model: Any) -> str | None:
    """Return the name under which a forward pass of ``model`` takes the same."""
    carried = profile_of(model).carried_argument
    return carried if carried not in (None, "cache") else forward_argument(model)


def why_no_cache(model: Any) -> str | None:
    """Return why ``generate`` does not take a cache for this model; None when it does."""
    name = type(model).__name__
    if profile_of(model).carried_argument is not None:
        return None
    if forward_argument(model) is None:
        return f"the forward pass of {name} takes no cache under a name that kvtier knows"
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        return f"{name} uses a cache of its own"
    return None


def why_off(model: Any) -> str | None:
    """Return why nothing may be reused with this type of model; None when reuse is allowed."""
    profile = profile_of(model)
    states_alone = forward_argument(model) == "cache_params"
    if states_alone and profile.carried_argument is None and not STATES_ARE_COUNTED:
        return "before 5.21, transformers does not count for a cache of states alone how many tokens it has seen"
    return profile.why_off


def why_not_so(model: Any, columns: int, is_padded: bool, longest_answer: int) -> str | None:
    """Return why nothing may be reused for a prompt of this shape; None when reuse is allowed.

    ``longest_answer``: the most new tokens; 0 if not known.
    """
    profile = profile_of(model)
    if is_padded and profile.not_padded:
        return "transformers continues padded rows of this model to other K and V than it computes at once"
    parameters = inspect.signature(type(model).forward).parameters if is_padded and not profile.by_distance else None
    if parameters is not None and "position_ids" not in parameters:  # the model counts columns
        return "the positions of this model count padding too: reuse would hold for the same padding only"
    if profile.within is None:
        return None
    window = getattr(model.config.get_text_config(decoder=True), profile.within)
    if longest_answer and columns + longest_answer <= window:
        return None
    return (
        f"beyond {window} tokens (its {profile.within}), transformers continues this model from a cache otherwise than "
        "it computes all at once; set max_new_tokens to stay within"
    )
