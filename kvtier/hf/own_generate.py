"""Model classes that bring a ``generate`` of their own, which the hook around transformers' does not see.

Most of them call transformers' one in the end, and that turn is as any. Others run the loop themselves: they would take
whatever a cache holds for the beginning of their prompt. So a cache goes into each of them empty (what it knows comes
from the store, if there is a turn), and leaves it empty if there was none.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from transformers import EncoderDecoderCache, GenerationMixin

_lock = threading.Lock()
_originals: dict[type, Callable[..., Any]] = {}


def wrap_classes(kind: type) -> list[type]:
    """Wrap ``generate`` of all loaded classes that have their own; return those that were new.

    Args:
        kind: of the caches that are looked after. They have ``reset``, ``last_turn`` and ``pass_over(reason)``.
    """
    with _lock:
        new = [owner for owner in set(_below(GenerationMixin)) - set(_originals) if "generate" in vars(owner)]
        for owner in new:
            _originals[owner] = vars(owner)["generate"]
            owner.generate = _guarded(_originals[owner], kind)  # type: ignore[attr-defined]
    return new


def restore_classes() -> None:
    """Give all classes their ``generate`` back."""
    with _lock:
        for owner, original in _originals.items():
            owner.generate = original  # type: ignore[attr-defined]
        _originals.clear()


def _below(owner: type) -> Iterator[type]:
    children: list[type] = owner.__subclasses__()
    for child in children:
        yield child
        yield from _below(child)


def _guarded(original: Callable[..., Any], kind: type) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        past = kwargs.get("past_key_values")
        cache = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
        if not isinstance(cache, kind):
            return original(self, *args, **kwargs)
        guarded: Any = cache
        guarded.reset()
        before = guarded.last_turn
        try:
            return original(self, *args, **kwargs)
        finally:
            if guarded.last_turn is before:
                guarded.pass_over(f"{type(self).__name__} has a generate of its own, which does not tell its tokens")

    return generate
