"""One ``generate()`` call as a turn of a cache: gives it its tokens, and commits what came of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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

from kvtier.errors import RestoreError, StreamError
from kvtier.hf.compat.canary import why_untrusted
from kvtier.hf.compat.external_state import carry, settle
from kvtier.hf.compat.model_profiles import cache_argument, why_no_cache
from kvtier.hf.generate.prefill import PrefillDone, patch_prepare_inputs, prefill_chunk
from kvtier.hf.identity.eligibility import ENCODER_DECODER
from kvtier.hf.inputs.request import (
    GenerateRequest,
    eos_ids,
    read_request,
    refuse_missing_media,
    use_cache,
    why_without_cache,
)
from kvtier.hf.turn.taker import TurnTaker
from kvtier.hf.turn.token_trace import watching


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
        cache: that was passed.
        kwargs: all other arguments by name; changed.

    Raises:
        PromptError: the mask tells of more columns than the prompt has, or media are missing that the cache does not
            hold.
        StreamError: a page of a cold layer is lost, or cannot be written.
    """
    no_cache = why_untrusted() or why_no_cache(model) or why_without_cache(model, kwargs)
    if no_cache is not None:
        return _without(original, model, cache, kwargs, no_cache)
    settle(model)
    request = read_request(model, kwargs, cache.resident)
    ends, streamer = eos_ids(model, kwargs), kwargs.get("streamer")
    stream_failed = False
    while True:
        report = cache._begin(model, request)
        try:
            passed = carry(model, cache, len(report.rows))
            if passed is not None and all(passed.is_linear):
                patch_prepare_inputs(model, TurnTaker)
            for begin, end in cache._pieces():
                assert request.ids is not None
                prefill_chunk(model, passed, request.ids, request.mask, begin, end)
                cache._passed(end)
            arguments = _arguments(model, cache, passed, request, kwargs)
            with watching(model, cache) if request.watched else nullcontext():
                output = original(model, **arguments)
        except (RestoreError, StreamError) as error:
            # Under the first forward pass nothing was generated yet, and a block that failed is gone from the store.
            # Cold pages that are lost may fail for a reason that stays, such as a full disk.
            if isinstance(error, StreamError) and (stream_failed or not cache._can_start_again()):
                cache._salvage()
                raise
            stream_failed = isinstance(error, StreamError)
            cache.start_over()
            if streamer is not None:
                kwargs["streamer"] = _WithoutPrompt(streamer)
            continue
        except BaseException:
            cache._salvage()
            raise
        break
    cache._commit(_sequences(output), ends)
    return output


def _sequences(output: Any) -> Any:
    """Return the sequences in what ``generate`` returned; all of it where there are none."""
    found = output.get("sequences") if isinstance(output, Mapping) else getattr(output, "sequences", None)
    if found is None and not isinstance(output, torch.Tensor):
        return (output,)  # never None, which would say that nothing was answered
    return output if found is None else found


def _arguments(
    model: PreTrainedModel, cache: TurnTaker, passed: Any, request: GenerateRequest, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return what the original is called with, now that the turn has begun."""
    arguments = dict(kwargs)
    if passed is not None:
        arguments[str(cache_argument(model))] = passed
    if request.inputs is None:
        return arguments
    arguments = request.inputs.after(arguments, cache.get_seq_length())
    if cache._has_states:
        end_of_prompt = PrefillDone(functools.partial(cache._passed, request.inputs.prompt.columns))
        criteria = kwargs.get("stopping_criteria") or ()
        arguments["stopping_criteria"] = StoppingCriteriaList([*criteria, end_of_prompt])
    return arguments


def _without(
    original: Callable[..., Any], model: PreTrainedModel, cache: TurnTaker, kwargs: dict[str, Any], reason: str
) -> Any:
    """Run a turn that neither reuses nor is kept, whose cache is not passed on or begins empty."""
    refuse_missing_media(model, kwargs, reason)
    cache._begin(model, GenerateRequest(reason))
    try:
        return original(model, **kwargs)
    finally:
        cache._commit(None, ())


def take_unknown_turn(
    original: Callable[..., Any], model: PreTrainedModel, cache: TurnTaker, kwargs: dict[str, Any], name: str
) -> Any:
    """Run ``generate`` with a cache among its arguments under a ``name`` that kvtier does not know: without reuse."""
    return _without(original, model, cache, kwargs, f"kvtier does not know a cache that is given as {name}=")


def take_turn_without_reuse(
    original: Callable[..., Any],
    model: PreTrainedModel,
    past: EncoderDecoderCache,
    kwargs: dict[str, Any],
) -> Any:
    """Run a turn without reuse; what the encoder said in an earlier turn is dropped too."""
    cache: TurnTaker = past.self_attention_cache
    unwanted = why_without_cache(model, kwargs)
    if unwanted is not None:
        return _without(original, model, cache, kwargs, unwanted)
    use_cache(model, kwargs)
    cache._begin(model, GenerateRequest(ENCODER_DECODER))
    past.cross_attention_cache = DynamicCache()
    past.is_updated.clear()
    name = cache_argument(model)
    try:
        output = original(model, **kwargs, **({name: past} if name is not None else {}))
    except BaseException:
        cache._salvage()
        raise
    cache._commit(None, ())
    return output


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
