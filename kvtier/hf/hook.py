"""The hook around ``generate()``: calls with a cache of ours become turns, all others pass through."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
)

from kvtier.errors import BusyError, PromptError, UninstalledError
from kvtier.hf import own_generate
from kvtier.hf.feeding import restore_classes
from kvtier.hf.generate import take_turn, take_turn_without_reuse
from kvtier.hf.soundness import POSITIONAL
from kvtier.hf.taker import TurnTaker


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
            if hook.active and isinstance(kwargs.get("cache_params"), TurnTaker):  # as models without attention call it
                kwargs["past_key_values"] = kwargs.pop("cache_params")
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
                        return take_turn_without_reuse(original, self, past, given)
                    return take_turn(original, self, cache, given)
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
