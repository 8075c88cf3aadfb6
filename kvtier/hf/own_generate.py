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

from transformers import GenerationMixin

from kvtier.hf.compat.names import caches_among, decoder_cache

_lock = threading.Lock()
_originals: dict[type, Callable[..., Any]] = {}


def wrap_classes(kind: type) -> list[type]:
    """Wrap ``generate`` of all loaded classes that have their own; return those that were new.

    Args:
        kind: of the caches that are looked after, a ``TurnTaker``.
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
        given = {**{str(position): value for position, value in enumerate(args)}, **kwargs}
        caches = [decoder_cache(past) for past in caches_among(given, kind).values()]
        reason = f"{type(self).__name__} has a generate of its own, which does not tell its tokens"
        for cache in caches:
            cache.begin_without_reuse(reason)
        try:
            return original(self, *args, **kwargs)
        finally:
            for cache in caches:
                if cache.has_turn:  # it did not come to transformers' own
                    cache.pass_over(reason)

    return generate
