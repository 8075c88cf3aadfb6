"""The hook around ``generate()``: gives each turn its tokens, and commits what came of it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvtier.errors import PromptError, RestoreError
from kvtier.hf.cache import TieredCache
from kvtier.hf.soundness import POSITIONAL, why_unsound_call

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


@dataclass(slots=True)
class _Hook:
    """A wrapper around ``generate``, and whether it does anything."""

    original: Callable[..., Any]
    wrapper: Callable[..., Any]
    active: bool = True


_lock = threading.Lock()
_hook: _Hook | None = None
_running = threading.local()


def install() -> None:
    """Wrap ``GenerationMixin.generate``. Done by the first ``TieredCache``; further calls change nothing.

    Calls without a ``TieredCache`` pass through untouched.
    """
    global _hook
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
            if isinstance(past, TieredCache) and past not in _caches_running():
                return _turn(original, self, past, given)
            if isinstance(past, EncoderDecoderCache) and isinstance(past.self_attention_cache, TieredCache):
                return _encoder_decoder(original, self, past, given)
            return original(self, *args, **kwargs)

        hook = _hook = _Hook(original, generate)
        GenerationMixin.generate = generate


def uninstall() -> None:
    """Give ``GenerationMixin.generate`` back as it was. The next ``TieredCache`` wraps it again.

    Where another wrapper lies on top, that one stays, and this one passes every call through.
    """
    global _hook
    with _lock:
        if _hook is None:
            return
        _hook.active = False
        if GenerationMixin.generate is _hook.wrapper:
            GenerationMixin.generate = _hook.original
            _hook = None


def _is_below(function: Any, wrapper: Callable[..., Any]) -> bool:
    """Return whether ``function`` is ``wrapper`` or says that it wraps it."""
    while function is not None and function is not wrapper:
        function = getattr(function, "__wrapped__", None)
    return function is wrapper


def _caches_running() -> list[TieredCache]:
    """Return the caches whose turn runs on this thread: some ways of decoding call ``generate`` again inside it."""
    if not hasattr(_running, "caches"):
        _running.caches = []
    caches: list[TieredCache] = _running.caches
    return caches


def _turn(
    original: Callable[..., Any],
    model: PreTrainedModel,
    cache: TieredCache,
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
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] > input_ids.shape[1]:
            raise PromptError(
                f"attention_mask has {attention_mask.shape[1]} columns, input_ids {input_ids.shape[1]}: pass the whole "
                "conversation as input_ids; the cache finds what it knows by itself"
            )
    if _setting(model, kwargs, "use_cache") is False:
        kwargs["use_cache"] = True  # with a cache and without using it, transformers feeds all tokens at every step
    unsound = why_unsound_call(kwargs, functools.partial(_setting, model, kwargs))
    off = unsound.reason if unsound is not None else None
    if off is None and not isinstance(input_ids, torch.Tensor):
        off = "no input_ids were given"
    cold = "assisted decoding starts cold" if any(_setting(model, kwargs, name) for name in _ASSISTED) else None
    streamer = kwargs.get("streamer")
    while True:
        cache._begin(model, input_ids, attention_mask, off=off, cold=cold)
        _caches_running().append(cache)
        try:
            output = original(model, **kwargs)
        except RestoreError:
            # A block failed under the first forward pass: it is gone from the store, nothing was generated yet.
            cache.reset()
            if streamer is not None:
                kwargs["streamer"] = _WithoutPrompt(streamer)
            continue
        except BaseException:
            cache._salvage()
            raise
        finally:
            _caches_running().pop()
        break
    sequences = output if isinstance(output, torch.Tensor) else getattr(output, "sequences", None)
    cache._commit(sequences, _eos_ids(model, kwargs))
    return output


def _encoder_decoder(
    original: Callable[..., Any],
    model: PreTrainedModel,
    past: EncoderDecoderCache,
    kwargs: dict[str, Any],
) -> Any:
    """Run a turn without reuse; what the encoder said in an earlier turn is dropped too."""
    cache: TieredCache = past.self_attention_cache
    cache._begin(model, None, off="encoder-decoder models are not reused yet")
    past.cross_attention_cache = DynamicCache()
    past.is_updated.clear()
    try:
        output = original(model, **kwargs)
    except BaseException:
        cache._salvage()
        raise
    cache._commit(None, ())
    return output


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
