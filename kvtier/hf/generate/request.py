"""Arguments of a call → ``GenerateRequest``. Keyword arguments are read here, once, and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from kvtier.errors import PromptError
from kvtier.hf.compat.canary import why_untrusted
from kvtier.hf.compat.external_state import why_not_carried
from kvtier.hf.compat.model_profiles import profile_of, why_no_cache
from kvtier.hf.compat.names import CACHE_ARGUMENTS
from kvtier.hf.identity.eligibility import ENCODER_DECODER
from kvtier.hf.inputs.chain_inputs import Inputs, Missing, read_inputs, why_not_begin
from kvtier.hf.inputs.continued import media_error, missing_media
from kvtier.hf.inputs.prompt import ResidentPrefix, read_prompt
from kvtier.hf.inputs.request import GenerateRequest, is_custom, unknown_arguments, why_cold, why_unsound_call
from kvtier.hf.not_reusable import NotReusable

Resident = Callable[[], ResidentPrefix | None]
"""Returns the known tokens that a cache holds; None when there are none."""


def read_loop_request(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    resident: ResidentPrefix | None,
) -> GenerateRequest:
    """Return the request of ``begin``, for a custom loop that feeds ``input_ids`` itself.

    ``input_ids`` and ``attention_mask`` are ``[batch, columns]``; the cache holds the tokens ``resident``.

    Raises:
        PromptError: the mask has another shape than the ids.
    """
    prompt = read_prompt(input_ids, attention_mask)
    off = why_not_begin(model)
    if isinstance(prompt, NotReusable):
        return GenerateRequest(off or prompt.reason, feeds=False, lasts=off is not None)
    missing = _missing(model, {}, input_ids, attention_mask)
    if missing and off is None:
        inputs = read_inputs(model, {}, input_ids, attention_mask, 1, missing, resident)
        if isinstance(inputs, NotReusable):
            kinds = ", ".join(missing)
            return GenerateRequest(
                f"begin() is not told which {kinds} enters at the placeholders: {inputs.reason}", feeds=False
            )
        prompt = inputs.prompt
    return GenerateRequest(off, prompt=prompt, feeds=False, lasts=off is not None)


def parse_request(
    model: PreTrainedModel, name: str, past: Any, given: Mapping[str, Any], resident: Resident
) -> GenerateRequest:
    """Return the request of a ``generate`` call with all arguments ``given``, the cache ``past`` under ``name``.

    Raises:
        PromptError: the mask has more columns than the prompt, or media are missing that the cache does not hold.
    """
    if name not in CACHE_ARGUMENTS:
        return _bypass(model, past, given, f"kvtier does not know a cache that is given as {name}=")
    arguments = {key: value for key, value in given.items() if key != name}
    is_bare = not isinstance(past, EncoderDecoderCache)
    if is_bare and getattr(model.config, "is_encoder_decoder", False):
        # Passed on as it is, the cache would take encoder output for decoder tokens.
        past, is_bare = EncoderDecoderCache(past, DynamicCache()), False
    lasting = (why_untrusted() or why_no_cache(model)) if is_bare else None
    bypass = lasting or _why_without_cache(model, arguments)
    if bypass is not None:
        return _bypass(model, past, arguments, bypass, lasts=lasting is not None)
    if not is_bare:
        _use_cache(model, arguments)
        return GenerateRequest(ENCODER_DECODER, past=past, arguments=MappingProxyType(arguments), lasts=True)
    return _parse(model, past, arguments, resident)


def _bypass(
    model: PreTrainedModel, past: Any, arguments: Mapping[str, Any], reason: str, *, lasts: bool = False
) -> GenerateRequest:
    """Return the request of a call that begins with an empty cache, and so must pass the media of all placeholders.

    Raises:
        PromptError: media are missing.
    """
    missing = _missing(model, arguments, _ids_of(arguments), arguments.get("attention_mask"))
    if missing:
        raise media_error(missing, reason)
    passed = MappingProxyType(dict(arguments))
    return GenerateRequest(reason, bypass=reason, past=past, arguments=passed, lasts=lasts)


def _ids_of(arguments: Mapping[str, Any]) -> Any:
    ids = arguments.get("inputs")
    return arguments.get("input_ids") if ids is None else ids


def _parse(model: PreTrainedModel, past: Any, arguments: dict[str, Any], resident: Resident) -> GenerateRequest:
    ids = _ids_of(arguments)
    mask = _checked_mask(model, ids, arguments)
    setting = functools.partial(_setting_of, model, arguments)
    _use_cache(model, arguments)
    if not isinstance(ids, torch.Tensor):
        ids = None
    elif profile_of(model).token_by_token and setting("prefill_chunk_size"):
        arguments["prefill_chunk_size"] = ids.shape[-1]  # between chunks, transformers would forget states
    repeats = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
    cold, custom = why_cold(arguments, setting), is_custom(arguments, setting)
    missing = _missing(model, arguments, ids, mask)
    unsound = why_unsound_call(arguments, setting)
    off = unsound.reason if unsound is not None else None
    if off is None and ids is not None:
        off = why_not_carried(model, len(ids), repeats)
    inputs: Inputs | NotReusable | None = None
    if off is None:
        inputs = read_inputs(model, arguments, ids, mask, repeats, missing, resident() if missing else None)
    if isinstance(inputs, NotReusable):
        off, inputs = inputs.reason, None
    if custom and inputs is not None and not inputs.prompt.plain:
        off, inputs = "a custom generate may feed other inputs", None
    chunk = setting("prefill_chunk_size")
    if inputs is not None and inputs.both_ways and chunk and chunk < inputs.prompt.columns:
        off, inputs = "prefill_chunk_size may cut tokens apart that attend to each other both ways", None
    if off is not None and missing:
        raise media_error(missing, off)
    return GenerateRequest(
        off=off,
        cold=cold,
        past=past,
        arguments=MappingProxyType(arguments),
        ids=ids,
        mask=mask,
        inputs=inputs,
        prompt=inputs.prompt if inputs is not None else None,
        eos_ids=tuple(_token_ids(setting("eos_token_id"))),
        longest_answer=int(setting("max_new_tokens") or 0),
        new_columns=_new_columns(setting("max_new_tokens"), setting("max_length"), ids),
        repeats=repeats,
        watched=custom or cold is not None or (setting("num_beams") or 1) > 1,
        custom=custom,
        missing=tuple(missing),
    )


def _new_columns(max_new_tokens: Any, max_length: Any, ids: Any) -> int:
    """Return how many columns may follow the prompt; 0 if that is not known."""
    if max_new_tokens is not None:
        return int(max_new_tokens)
    if max_length is not None and isinstance(ids, torch.Tensor) and ids.ndim == 2:
        return max(0, int(max_length) - ids.shape[1])
    return 0


def _missing(model: PreTrainedModel, arguments: Mapping[str, Any], ids: Any, mask: torch.Tensor | None) -> Missing:
    """Return the positions of placeholders without passed media; none if other arguments may contain the media."""
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        return {}
    if arguments.get("inputs_embeds") is not None or unknown_arguments(arguments):
        return {}
    real = torch.ones(ids.shape, dtype=torch.bool, device="cpu")
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        real = torch.ne(mask, 0).to("cpu")
    return missing_media(model, arguments, ids.detach().to("cpu", torch.int64).numpy(), real.numpy())


def _checked_mask(model: PreTrainedModel, ids: Any, arguments: dict[str, Any]) -> torch.Tensor | None:
    """Return the attention mask; if none was passed, infer it from padding ids as ``generate`` does."""
    mask: torch.Tensor | None = arguments.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return mask
    if mask is None and not model.config.is_encoder_decoder:
        mask = _infer_mask(model, ids, arguments)
        if mask is not None:
            arguments["attention_mask"] = mask
    fed = ids if arguments.get("inputs_embeds") is None else arguments["inputs_embeds"]
    if mask is not None and mask.ndim == 2 and mask.shape[1] > fed.shape[1]:
        raise PromptError(
            f"attention_mask has {mask.shape[1]} columns, input_ids {fed.shape[1]}: pass the whole conversation as "
            "input_ids; the cache finds what it knows by itself"
        )
    return mask


def _why_without_cache(model: PreTrainedModel, arguments: Mapping[str, Any]) -> str | None:
    """Return why a call must run without its cache: the call asks for that; None when it does not.

    A model that uses no cache by default, such as MPT, uses a passed cache.
    """
    asked = arguments.get("use_cache")
    if asked is None and getattr(model.generation_config, "use_cache", None) is not False:
        asked = getattr(arguments.get("generation_config"), "use_cache", None)
    return "use_cache=False was passed" if asked is False else None


def _use_cache(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Make a call use its cache: with an unused cache, transformers feeds all tokens at every step."""
    if _setting_of(model, arguments, "use_cache") is False:
        arguments["use_cache"] = True


def _setting_of(model: PreTrainedModel, arguments: dict[str, Any], name: str) -> Any:
    """Return a generation setting as ``generate`` will resolve it."""
    for source in (arguments.get("generation_config"), model.generation_config):
        if arguments.get(name) is not None:
            break
        if getattr(source, name, None) is not None:
            return getattr(source, name)
    return arguments.get(name)


def _token_ids(setting: Any) -> list[int]:
    """Return the ids that a setting names: None, a number, or a sequence, array or tensor of numbers of any dtype."""
    if setting is None:
        return []
    if isinstance(setting, (torch.Tensor, np.ndarray)):
        setting = setting.tolist()
    return [int(each) for each in setting] if isinstance(setting, (list, tuple, set)) else [int(setting)]


def _infer_mask(model: PreTrainedModel, ids: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor | None:
    """Return the mask that ``generate`` would infer from padding ids; None when it is all ones."""
    pads = _token_ids(_setting_of(model, arguments, "pad_token_id"))
    if (
        len(pads) != 1
        or pads[0] in _token_ids(_setting_of(model, arguments, "eos_token_id"))
        or ids.dtype not in (torch.int32, torch.int64)
    ):
        return None
    padding = ids == pads[0]
    return (~padding).long() if bool(padding.any()) else None
