"""One ``generate()`` call as a turn of a cache: gives it its tokens, and commits what came of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from kvtier.errors import PromptError, RestoreError, StreamError
from kvtier.hf.carriers import carry, settle, why_not_carried
from kvtier.hf.fed import watching
from kvtier.hf.feeding import PromptEnd, feed, slice_prompts
from kvtier.hf.inputs import read_inputs
from kvtier.hf.prompt import Unreadable
from kvtier.hf.quirks import cache_argument, takes_token_by_token, why_no_cache
from kvtier.hf.soundness import ENCODER_DECODER, is_custom, why_cold, why_unsound_call
from kvtier.hf.taker import TurnTaker


def take_turn(
    original: Callable[..., Any],
    model: PreTrainedModel,
    cache: TurnTaker,
    kwargs: dict[str, Any],
) -> Any:
    """Run ``generate`` as a turn of ``cache``.

    Args:
        original: transformers' own ``generate``.
        model: what it is called on.
        cache: what was passed as ``past_key_values``.
        kwargs: all arguments by name; changed.

    Raises:
        PromptError: the mask tells of more columns than the prompt has.
        StreamError: a page of a cold layer is lost, or cannot be written.
    """
    input_ids = kwargs.get("inputs")
    input_ids = kwargs.get("input_ids") if input_ids is None else input_ids
    attention_mask = kwargs.get("attention_mask")
    if isinstance(input_ids, torch.Tensor) and input_ids.ndim == 2:
        if attention_mask is None and not model.config.is_encoder_decoder:
            attention_mask = _infer_mask(model, input_ids, kwargs)
            if attention_mask is not None:
                kwargs["attention_mask"] = attention_mask
        known = input_ids if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] > known.shape[1]:
            raise PromptError(
                f"attention_mask has {attention_mask.shape[1]} columns, input_ids {known.shape[1]}: pass the whole "
                "conversation as input_ids; the cache finds what it knows by itself"
            )
    no_cache = why_no_cache(model)
    if no_cache is not None:
        del kwargs["past_key_values"]
        return _without(original, model, cache, kwargs, no_cache)
    argument = cache_argument(model)
    if argument != "past_key_values":
        slice_prompts(model, TurnTaker)
    settle(model)
    _use_cache(model, kwargs)
    if isinstance(input_ids, torch.Tensor):
        _feed_at_once(model, kwargs, input_ids.shape[-1])
    setting = functools.partial(_setting, model, kwargs)
    unsound = why_unsound_call(kwargs, setting)
    off = unsound.reason if unsound is not None else None
    input_ids = input_ids if isinstance(input_ids, torch.Tensor) else None
    repeats = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
    if isinstance(input_ids, torch.Tensor):
        off = off or why_not_carried(model, len(input_ids), repeats)
    inputs = read_inputs(model, kwargs, input_ids, attention_mask, repeats) if off is None else None
    if isinstance(inputs, Unreadable):
        off, inputs = inputs.reason, None
    cold = why_cold(kwargs, setting)
    custom = is_custom(kwargs, setting)
    if custom and inputs is not None and not inputs.prompt.plain:
        off, inputs = "a custom generate may feed other inputs", None
    watched = custom or cold is not None or (setting("num_beams") or 1) > 1
    streamer = kwargs.get("streamer")
    longest_answer = int(setting("max_new_tokens") or 0)
    criteria = list(kwargs.get("stopping_criteria") or ())
    stream_failed = False
    while True:
        report = cache._begin(
            model,
            input_ids,
            attention_mask,
            off=off,
            cold=cold,
            longest_answer=longest_answer,
            repeats=repeats,
            prompt=inputs.prompt if inputs is not None else None,
            watched=watched,
            custom=custom,
        )
        try:
            passed = carry(model, cache, len(report.rows))
            for begin, end in cache._pieces():
                assert input_ids is not None
                feed(model, passed, input_ids, attention_mask, begin, end)
                cache._passed(end)
            arguments = {name: value for name, value in kwargs.items() if name != "past_key_values"}
            if passed is not None:
                arguments.setdefault(argument, passed)
            if inputs is not None:
                arguments = inputs.after(arguments, cache.get_seq_length())
                if cache._has_states:
                    end_of_prompt = PromptEnd(functools.partial(cache._passed, inputs.prompt.columns))
                    arguments["stopping_criteria"] = StoppingCriteriaList([*criteria, end_of_prompt])
            with watching(model, cache) if watched else nullcontext():
                output = original(model, **arguments)
        except (RestoreError, StreamError) as error:
            # Under the first forward pass nothing was generated yet, and a block that failed is gone from the store.
            # Cold pages that are lost may fail for a reason that stays, such as a full disk.
            if isinstance(error, StreamError) and (stream_failed or not cache._can_start_again()):
                cache._salvage()
                raise
            stream_failed = isinstance(error, StreamError)
            cache.reset()
            if streamer is not None:
                kwargs["streamer"] = _WithoutPrompt(streamer)
            continue
        except BaseException:
            cache._salvage()
            raise
        break
    sequences = output if isinstance(output, torch.Tensor) else getattr(output, "sequences", None)
    cache._commit(sequences, _eos_ids(model, kwargs))
    return output


def _without(
    original: Callable[..., Any], model: PreTrainedModel, cache: TurnTaker, kwargs: dict[str, Any], reason: str
) -> Any:
    """Run a turn of a model that takes no cache."""
    cache._begin(model, None, off=reason)
    try:
        return original(model, **kwargs)
    finally:
        cache._commit(None, ())


def take_turn_without_reuse(
    original: Callable[..., Any],
    model: PreTrainedModel,
    past: EncoderDecoderCache,
    kwargs: dict[str, Any],
) -> Any:
    """Run a turn without reuse; what the encoder said in an earlier turn is dropped too."""
    cache: TurnTaker = past.self_attention_cache
    _use_cache(model, kwargs)
    cache._begin(model, None, off=ENCODER_DECODER)
    past.cross_attention_cache = DynamicCache()
    past.is_updated.clear()
    try:
        output = original(model, **kwargs)
    except BaseException:
        cache._salvage()
        raise
    cache._commit(None, ())
    return output


def _use_cache(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Use the cache: with one and without using it, transformers feeds all tokens at every step."""
    if _setting(model, kwargs, "use_cache") is False:
        kwargs["use_cache"] = True


def _feed_at_once(model: PreTrainedModel, kwargs: dict[str, Any], columns: int) -> None:
    """Let all ``columns`` of a prompt be one chunk, where transformers would forget states between chunks."""
    if takes_token_by_token(model) and _setting(model, kwargs, "prefill_chunk_size"):
        kwargs["prefill_chunk_size"] = columns


def _setting(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """Return a generation setting as ``generate`` will resolve it."""
    for source in (kwargs.get("generation_config"), model.generation_config):
        if kwargs.get(name) is not None:
            break
        if getattr(source, name, None) is not None:
            return getattr(source, name)
    return kwargs.get(name)


def _eos_ids(model: PreTrainedModel, kwargs: dict[str, Any]) -> list[int]:
    eos = _setting(model, kwargs, "eos_token_id")
    if eos is None:
        return []
    if isinstance(eos, torch.Tensor):
        eos = eos.tolist()
    return [int(e) for e in eos] if isinstance(eos, (list, tuple)) else [int(eos)]


def _infer_mask(model: PreTrainedModel, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the mask that ``generate`` would infer from padding ids; None when it is all ones."""
    pad = _setting(model, kwargs, "pad_token_id")
    pad = pad.item() if isinstance(pad, torch.Tensor) else pad
    if pad is None or int(pad) in _eos_ids(model, kwargs):
        return None
    padding = input_ids == int(pad)
    return (~padding).long() if bool(padding.any()) else None


class _WithoutPrompt(BaseStreamer):
    """A streamer that has seen the prompt already: the turn starts again."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer = streamer
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Pass on everything but the first value."""
        if self._seen_prompt:
            self._streamer.put(value)
        self._seen_prompt = True

    def end(self) -> None:
        """Pass on."""
        self._streamer.end()
