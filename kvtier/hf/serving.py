"""Which caches are serving a ``generate()`` call, and which ``generate()`` call is running on this thread."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

from transformers import GenerationMixin

from kvtier.errors import BusyError

_lock = threading.Lock()
_threads: dict[int, int] = {}
"""``id`` of every cache that is serving ``generate()`` → the thread of that call."""


def occupy(cache: Any) -> None:
    """Keep other threads from calling ``generate()`` with ``cache``.

    Raises:
        BusyError: another thread does so now.
    """
    with _lock:
        if id(cache) in _threads:
            raise BusyError(
                "this TieredCache is serving generate() on another thread; give each thread a TieredCache of its own "
                "over one PrefixStore"
            )
        _threads[id(cache)] = threading.get_ident()


def leave(cache: Any) -> None:
    """Let the next call come, unless another thread has one. May be called more than once."""
    if is_serving(cache):
        del _threads[id(cache)]


def is_serving(cache: Any) -> bool:
    """Whether a wrapped ``generate()`` call on this thread has announced its turn to ``cache``."""
    return _threads.get(id(cache)) == threading.get_ident()


def refuse_inside(cache: Any, what: str) -> None:
    """Make sure that no wrapped ``generate()`` call is using ``cache``, on any thread.

    Raises:
        BusyError: one is; ``what`` would change the cache under it.
    """
    if id(cache) in _threads:
        raise BusyError(
            f"{what} inside generate(): this TieredCache is serving that call; do it after generate() has returned, or "
            "on another cache: fork() is possible at any time"
        )


def running_generate() -> FrameType | None:
    """Return the innermost ``generate()`` of a model that is running on this thread, wrapped by kvtier or not.

    It is found by its name and its first argument on the stack: no upstream hook is needed, so no renamed method can
    hide it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "generate" and code.co_argcount:
            owner = frame.f_locals.get(code.co_varnames[0])
            if isinstance(owner, GenerationMixin):
                return frame
        frame = frame.f_back
    return None
