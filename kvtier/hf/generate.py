"""The hook around ``generate()``: gives each turn its tokens, and commits what came of it."""

from __future__ import annotations

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from kvtier.errors import BusyError, PromptError, RestoreError, StreamError, UninstalledError
from kvtier.hf import own_generate
from kvtier.hf.fed import watching
from kvtier.hf.feeding import PromptEnd, feed, restore_classes, slice_prompts
from kvtier.hf.inputs import read_inputs
from kvtier.hf.prompt import Prompt, Unreadable
from kvtier.hf.quirks import cache_argument, takes_token_by_token, why_no_cache
from kvtier.hf.soundness import ENCODER_DECODER, POSITIONAL, is_custom, why_cold, why_unsound_call
from kvtier.report import TurnReport


class TurnTaker(ABC):
    """A cache that takes turns: what the hook asks of it."""

    @abstractmethod
    def _begin(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        *,
        off: str | None = None,
        cold: str | None = None,
        longest_answer: int = 0,
        repeats: int = 1,
        prompt: Prompt | None = None,
        watched: bool = False,
        custom: bool = False,
    ) -> TurnReport:
        """Begin a turn whose pages may still be on their way.

        Args:
            model: the model that will be called.
            input_ids: ``[batch, columns]``.
            attention_mask: ``[batch, columns]``.
            off: why this turn must neither reuse nor be kept.
            cold: why this turn must not reuse, though its prompt may be kept.
            longest_answer: new tokens at most, as far as one can tell.
            repeats: how many rows of the cache continue each row of the prompt.
            prompt: what ids, mask and all other inputs were read as.
            watched: whether to note what is fed: returned sequences do not tell which row holds what.
            custom: whether other code than transformers' own decides what is fed.
        """

    @abstractmethod
    def pass_over(self, reason: str) -> None:
        """Note a turn that could neither reuse nor be kept, and hold nothing of it."""

    @abstractmethod
    def _pieces(self) -> Sequence[tuple[int, int]]:
        """Return columns ``(begin, end)`` of the prompt that are to be fed one after the other before the rest."""

    @abstractmethod
    def _passed(self, column: int) -> None:
        """Note that forward passes have ended that gave the model the first ``column`` columns, and no more."""

    @property
    @abstractmethod
    def _has_states(self) -> bool:
        """Whether any layer keeps what is only valid after one token."""

    @abstractmethod
    def _commit(self, sequences: torch.Tensor | None, eos_ids: Iterable[int]) -> TurnReport:
        """End the turn: keep prompt and generated tokens; ``sequences`` None keeps the prompt alone."""

    @abstractmethod
    def _salvage(self) -> None:
        """End a turn that was interrupted: keep the part of its prompt that every layer has."""

    @abstractmethod
    def _can_start_again(self) -> bool:
        """Whether the turn began with a known prefix and no forward pass has ended yet: all tokens are known."""

    @abstractmethod
    def get_seq_length(self) -> int:
        """Return the columns held."""

    @abstractmethod
    def reset(self) -> None:
        """Hold nothing."""


@dataclass(slots=True)
class _Hook:
    """A wrapper around ``generate``, and whether it does anything."""

    original: Callable[..., Any]
    wrapper: Callable[..., Any]
    active: bool = True


_lock = threading.Lock()
_hook: _Hook | None = None
_threads: dict[int, int] = {}
"""``id`` of every cache that is having a turn → the thread it has it on."""


def install() -> None:
    """Wrap ``GenerationMixin.generate``. Done by the first ``TieredCache``; further calls change nothing.

    Calls without a ``TieredCache`` pass through untouched.
    """
    global _hook
    own_generate.wrap_classes(TurnTaker)
    with _lock:
        if _hook is not None and _is_below(GenerationMixin.generate, _hook.wrapper):
            _hook.active = True
            return
        if _hook is not None:
            _hook.active = False  # if someone still calls it, the new one is above it
        original = GenerationMixin.generate

        @functools.wraps(original)
        def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            past = kwargs.get("past_key_values")
            given = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
            if not hook.active or len(given) != len(args) + len(kwargs):  # arguments given twice: let it say so
                return original(self, *args, **kwargs)
            decoder = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
            if not isinstance(decoder, TurnTaker) or _threads.get(id(decoder)) == threading.get_ident():
                return original(self, *args, **kwargs)  # some ways of decoding call generate again inside a turn
            cache: TurnTaker = decoder
            if past is cache and getattr(self.config, "is_encoder_decoder", False):
                # Passed on as it is, it would take what the encoder says for tokens of the decoder.
                past = given["past_key_values"] = EncoderDecoderCache(cache, DynamicCache())
            try:
                try:
                    _occupy(cache)
                    if isinstance(past, EncoderDecoderCache):
                        return _encoder_decoder(original, self, past, given)
                    return _turn(original, self, cache, given)
                finally:
                    _leave(cache)
            finally:  # an interrupt may have come in place of the first
                _leave(cache)

        hook = _hook = _Hook(original, generate)
        GenerationMixin.generate = generate


def uninstall() -> None:
    """Give ``GenerationMixin.generate`` back as it was. The next ``TieredCache`` wraps it again.

    Until then, caches that are there take turns only through ``begin`` and ``commit``.
    Where another wrapper lies on top, that one stays, and this one passes every call through.
    """
    global _hook
    with _lock:
        if _hook is None:
            return
        _hook.active = False
        restore_classes()
        own_generate.restore_classes()
        if GenerationMixin.generate is _hook.wrapper:
            GenerationMixin.generate = _hook.original
            _hook = None


def check_installed() -> None:
    """Make sure that ``generate`` is wrapped: unwrapped, it takes whatever a cache holds for the prompt's beginning.

    Raises:
        UninstalledError: it is not.
    """
    if _hook is None or not _hook.active:
        raise UninstalledError(
            "kvtier.uninstall() was called, and without it no cache can tell which tokens it is given; make a new "
            "TieredCache, or call begin() first"
        )


def look_for_own_generate(*, holds_turn: bool) -> None:
    """Look for classes with a ``generate`` of their own that were imported since the last look.

    Called when tokens begin to come that no turn has named. ``holds_turn``: to a cache that holds a turn's.

    Raises:
        PromptError: there are some, and one of them may have taken what the cache holds for its prompt's beginning.
    """
    new = own_generate.wrap_classes(TurnTaker)
    if new and holds_turn:
        raise PromptError(
            f"{new[0].__name__} was imported after this cache was made: if its generate() is what is running, it began "
            "before the cache could see it. Call it again; in a loop of your own, call begin() first"
        )


def _is_below(function: Any, wrapper: Callable[..., Any]) -> bool:
    """Return whether ``function`` is ``wrapper`` or says that it wraps it."""
    while function is not None and function is not wrapper:
        function = getattr(function, "__wrapped__", None)
    return function is wrapper


def _occupy(cache: TurnTaker) -> None:
    """Keep other threads from having a turn on ``cache``."""
    with _lock:
        if id(cache) in _threads:
            raise BusyError(
                "this TieredCache is serving generate() on another thread; give each thread a TieredCache of its own "
                "over one PrefixStore"
            )
        _threads[id(cache)] = threading.get_ident()


def _leave(cache: TurnTaker) -> None:
    """Let the next turn come, unless another thread has one. May be called more than once."""
    if _threads.get(id(cache)) == threading.get_ident():
        del _threads[id(cache)]


def _turn(
    original: Callable[..., Any],
    model: PreTrainedModel,
    cache: TurnTaker,
    kwargs: dict[str, Any],
) -> Any:
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
        kwargs[argument] = kwargs.pop("past_key_values")
        slice_prompts(model, TurnTaker)
    _use_cache(model, kwargs)
    if isinstance(input_ids, torch.Tensor):
        _feed_at_once(model, kwargs, input_ids.shape[-1])
    setting = functools.partial(_setting, model, kwargs)
    unsound = why_unsound_call(kwargs, setting)
    off = unsound.reason if unsound is not None else None
    input_ids = input_ids if isinstance(input_ids, torch.Tensor) else None
    repeats = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
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
        cache._begin(
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
            for begin, end in cache._pieces():
                assert input_ids is not None
                feed(model, cache, input_ids, attention_mask, begin, end)
                cache._passed(end)
            arguments = kwargs
            if inputs is not None:
                arguments = inputs.after(kwargs, cache.get_seq_length())
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


def _encoder_decoder(
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
