"""The hook around ``generate()``: gives each turn its tokens, and commits what came of it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvtier.errors import PromptError, RestoreError
from kvtier.hf.cache import TieredCache

_lock = threading.Lock()
_original: Callable[..., Any] | None = None
# Tensors that generate() takes besides the prompt and that do not change its K and V.
_HARMLESS = frozenset(
    {"inputs", "input_ids", "attention_mask", "negative_prompt_ids", "negative_prompt_attention_mask"}
)
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def install() -> None:
    """Wrap ``GenerationMixin.generate``. Done by the first ``TieredCache``; further calls change nothing.

    Calls without a ``TieredCache`` pass through untouched.
    """
    global _original
    with _lock:
        if _original is not None:
            return
        _original = original = GenerationMixin.generate

        @functools.wraps(original)
        def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            past = kwargs.get("past_key_values")
            if isinstance(past, TieredCache):
                return _turn(original, self, past, args, kwargs)
            if isinstance(past, EncoderDecoderCache) and isinstance(past.self_attention_cache, TieredCache):
                return _encoder_decoder(original, self, past, args, kwargs)
            return original(self, *args, **kwargs)

        generate._kvtier = True  # type: ignore[attr-defined]
        GenerationMixin.generate = generate


def uninstall() -> None:
    """Give ``GenerationMixin.generate`` back as it was. The next ``TieredCache`` wraps it again."""
    global _original
    with _lock:
        if _original is not None and getattr(GenerationMixin.generate, "_kvtier", False):
            GenerationMixin.generate = _original
            _original = None


def _turn(
    original: Callable[..., Any],
    model: PreTrainedModel,
    cache: TieredCache,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    kwargs = dict(kwargs)
    input_ids = args[0] if args else kwargs.get("inputs")
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
    off = _other_inputs(input_ids, kwargs)
    cold = "assisted decoding starts cold" if any(_setting(model, kwargs, name) for name in _ASSISTED) else None
    streamer = kwargs.get("streamer")
    while True:
        cache._begin(model, input_ids, attention_mask, off=off, cold=cold)
        try:
            output = original(model, *args, **kwargs)
        except RestoreError:
            # A block failed under the first forward pass: it is gone from the store, nothing was generated yet.
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


def _encoder_decoder(
    original: Callable[..., Any],
    model: PreTrainedModel,
    past: EncoderDecoderCache,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a turn without reuse; what the encoder said in an earlier turn is dropped too."""
    cache: TieredCache = past.self_attention_cache
    cache._begin(model, None, off="encoder-decoder models are not reused yet")
    past.cross_attention_cache = DynamicCache()
    past.is_updated.clear()
    try:
        output = original(model, *args, **kwargs)
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


def _other_inputs(input_ids: object, kwargs: dict[str, Any]) -> str | None:
    """Return why inputs besides tokens and mask forbid reuse."""
    others = sorted(k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.ndim and k not in _HARMLESS)
    others = [name for name in others if name not in ("eos_token_id", "pad_token_id", "bos_token_id")]
    if others:
        return f"inputs besides tokens decide K and V: {', '.join(others)}"
    if kwargs.get("token_healing"):
        return "token healing rewrites the prompt"
    if isinstance(kwargs.get("custom_generate"), str):
        return "a custom generate from the hub may feed other tokens"
    return None if isinstance(input_ids, torch.Tensor) else "no input_ids were given"


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
