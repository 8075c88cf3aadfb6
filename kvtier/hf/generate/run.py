"""Turns of a cache: one ``generate()`` call each, or a custom loop between its two ends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from kvtier.errors import BlockError, PromptError, RestoreError, StreamError
from kvtier.hf.compat.external_state import carry, settle
from kvtier.hf.compat.model_profiles import cache_argument, forget_notes
from kvtier.hf.compat.names import decoder_cache
from kvtier.hf.generate.prefill import PrefillDone, patch_prepare_inputs, prefill_chunk
from kvtier.hf.generate.request import read_loop_request
from kvtier.hf.inputs.positions import remember_positions
from kvtier.hf.inputs.request import GenerateRequest
from kvtier.hf.turn.manager import TurnManager
from kvtier.hf.turn.token_trace import watching
from kvtier.report import TurnReport

Generate = Callable[..., Any]
"""transformers' own ``generate``, unbound."""


def run_turn(original: Generate, model: PreTrainedModel, turns: TurnManager, request: GenerateRequest) -> Any:
    """Run ``generate`` as a turn of the passed cache, and return what it returns.

    Raises:
        PromptError: media are missing that the cache does not hold.
        StreamError: a page of a cold layer is lost, or cannot be written.
    """
    forget_notes(model, decoder_cache(request.past))
    if request.bypass is not None:
        return _run_aside(original, model, turns, request)
    if isinstance(request.past, EncoderDecoderCache):
        return _run_encoder_decoder(original, model, turns, request)
    settle(model)
    if turns.tokenizer is None and hasattr(given := request.arguments.get("tokenizer"), "get_vocab"):
        turns.tokenizer = given
    streamer, stream_failed = request.arguments.get("streamer"), False
    while True:
        report = turns.begin(model, request)
        try:
            output = _load_and_run(original, model, turns, request, len(report.rows), streamer)
        except (RestoreError, StreamError) as error:
            # In the first forward pass nothing is generated yet, and the store has removed the failed block: restart.
            # Lost cold pages may have a lasting cause, such as a full disk: restart once.
            if isinstance(error, StreamError) and (stream_failed or not turns.can_start_again()):
                turns.abort()
                raise
            stream_failed = isinstance(error, StreamError)
            turns.start_over()
            if streamer is not None:
                streamer = _WithoutPrompt(streamer)
        except BaseException:
            turns.abort()
            raise
        else:
            turns.commit(_sequences(output), request.eos_ids)
            return output


def _load_and_run(
    original: Generate, model: PreTrainedModel, turns: TurnManager, request: GenerateRequest, rows: int, streamer: Any
) -> Any:
    """Feed the model the unknown tokens; each layer waits for its own part of the known prefix."""
    passed = carry(model, request.past, rows)
    if passed is not None and all(passed.is_linear):
        patch_prepare_inputs(model)
    for begin, end in turns.prefill_chunks():
        assert request.ids is not None
        prefill_chunk(model, passed, request.ids, request.mask, begin, end)
        turns.prefilled(end)
    while (chunk := turns.next_chunk()) is not None:
        assert request.ids is not None
        prefill_chunk(model, passed, request.ids, request.mask, *chunk)
    arguments = _arguments(model, turns, passed, request)
    if streamer is not None:
        arguments["streamer"] = streamer
    with watching(model, request.past, lambda: turns.trace) if request.watched else nullcontext():
        return original(model, **arguments)


def _arguments(model: PreTrainedModel, turns: TurnManager, passed: Any, request: GenerateRequest) -> dict[str, Any]:
    """Return the arguments of the original ``generate``, now that the turn has begun."""
    arguments = dict(request.arguments)
    if passed is not None:
        arguments[str(cache_argument(model))] = passed
    if request.inputs is None:
        return arguments
    arguments = request.inputs.after(arguments, turns.layers.columns)
    if turns.layers.states:
        end_of_prompt = PrefillDone(functools.partial(turns.prefilled, request.inputs.prompt.columns))
        criteria = request.arguments.get("stopping_criteria") or ()
        arguments["stopping_criteria"] = StoppingCriteriaList([*criteria, end_of_prompt])
    return arguments


def _sequences(output: Any) -> Any:
    """Return the sequences in the ``output`` of ``generate``; the output itself if it has none."""
    found = output.get("sequences") if isinstance(output, Mapping) else getattr(output, "sequences", None)
    if found is None and not isinstance(output, torch.Tensor):
        return (output,)  # never None, which would mean that there is no answer
    return output if found is None else found


def _run_aside(original: Generate, model: PreTrainedModel, turns: TurnManager, request: GenerateRequest) -> Any:
    """Run a call that neither reuses nor is kept; its cache is not passed on, or begins empty."""
    turns.begin(model, request)
    try:
        return original(model, **request.arguments)
    finally:
        turns.commit(None)


def _run_encoder_decoder(
    original: Generate, model: PreTrainedModel, turns: TurnManager, request: GenerateRequest
) -> Any:
    """Run a turn without reuse; the encoder's K and V of an earlier turn are dropped too."""
    turns.begin(model, request)
    request.past.cross_attention_cache = DynamicCache()
    request.past.is_updated.clear()
    name = cache_argument(model)
    try:
        output = original(model, **request.arguments, **({name: request.past} if name is not None else {}))
    except BaseException:
        turns.abort()
        raise
    turns.commit(None)
    return output


class _WithoutPrompt(BaseStreamer):
    """A streamer for a restarted turn, without the prompt that was already streamed."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer = streamer
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Pass on every value except the first."""
        if self._seen_prompt:
            self._streamer.put(value)
        self._seen_prompt = True

    def end(self) -> None:
        """Pass on the end."""
        self._streamer.end()


# --- custom loops -----------------------------------------------------------------------------------------------------


def begin_loop(
    cache: Any, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> TurnReport:
    """Begin a turn of ``cache`` with the prompt ``input_ids [batch, columns]``; its prefix has loaded on return.

    Raises:
        ClosedError: the cache was closed.
        PromptError: ``attention_mask [batch, columns]`` does not fit ``input_ids``.
    """
    turns: TurnManager = cache.turns
    forget_notes(model, cache)
    request = read_loop_request(model, input_ids, attention_mask, turns.resident())
    while True:
        report = turns.begin(model, request)
        try:
            if turns.turn is not None and turns.turn.prefix is not None:
                turns.turn.prefix.wait()
        except BlockError:
            turns.start_over()  # later lookups skip the failed block: begin with the other blocks
            continue
        if turns.turn is not None and turns.turn.prompt is not None:
            remember_positions(model, turns.turn.prompt)
        return report


def commit_loop(turns: TurnManager, sequences: torch.Tensor) -> TurnReport:
    """End a turn: keep the tokens of ``sequences [rows, columns]``, its prompt and all tokens after it.

    Raises:
        PromptError: no turn has begun, or ``sequences`` do not begin with its prompt.
    """
    if turns.turn is None:
        raise PromptError("commit() without begin(): call begin(model, input_ids, attention_mask) first")
    if sequences.ndim != 2:
        raise PromptError(f"sequences must be [rows, columns], not {sequences.ndim}-dimensional")
    prompt = turns.turn.prompt
    if prompt is not None and not prompt.begins(sequences):
        raise PromptError("sequences do not begin with the prompt that begin() was given")
    return turns.commit(sequences)
