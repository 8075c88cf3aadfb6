"""Exclusive use: which call uses a cache, and how long other calls wait for it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from transformers import GenerationMixin

from kvtier.errors import BusyError, ConfigurationError, UninstalledError

Result = TypeVar("Result")

GENERATE = "generate()"


@dataclass(slots=True, eq=False)
class _Use:
    """A call that is using a cache."""

    what: str
    thread: int | None
    """The id of its thread; None when it runs in the parent process of a fork."""


_uses: WeakKeyDictionary[Any, _Use] = WeakKeyDictionary()
_freed = threading.Condition()
"""Guards ``_uses``; notified when a cache becomes free. Its lock is reentrant, for signal handlers."""


def checked_wait_seconds(wait_seconds: object) -> float:
    """Return ``wait_seconds``.

    Raises:
        ConfigurationError: it is not a number of seconds from 0 to ``threading.TIMEOUT_MAX``.
    """
    is_number = isinstance(wait_seconds, (int, float)) and not isinstance(wait_seconds, bool)
    if not is_number or not 0 <= wait_seconds <= threading.TIMEOUT_MAX:  # type: ignore[operator]
        raise ConfigurationError(
            f"wait_seconds={wait_seconds!r:.80} must be a number of seconds from 0 (do not wait) to "
            f"{threading.TIMEOUT_MAX:.0e}."
        )
    return float(wait_seconds)  # type: ignore[arg-type]


def exclusively(cache: Any, what: str, call: Callable[[], Result]) -> Result:
    """Run ``call`` with exclusive use of ``cache``, and return its result.

    A call on another thread is waited for, up to ``cache.wait_seconds``. There is no wait for an outer call on this
    thread, which cannot end before this one, nor for a call in the parent process of a fork. ``what`` is the calling
    method, as messages name it; ``GENERATE`` makes ``is_serving`` true.

    Raises:
        BusyError: another call is using ``cache``.
    """
    mine = _Use(what, threading.get_ident())
    try:
        try:
            _occupy(cache, mine)
            return call()
        finally:
            _leave(cache, mine)
    finally:  # an interrupt may have prevented the first
        _leave(cache, mine)


def _occupy(cache: Any, mine: _Use) -> None:
    with _freed:
        other = _uses.get(cache)
        if other is not None and other.thread == mine.thread:
            raise BusyError(
                f"{mine.what} inside {other.what}: this TieredCache is serving that call; do it after {other.what} has "
                "returned, or on another cache: fork() is possible at any time"
            )
        if other is not None and other.thread is None:
            raise BusyError(
                f"this TieredCache was in the middle of {other.what} on another thread when this process was forked; "
                "make a new TieredCache here"
            )
        if not _freed.wait_for(lambda: cache not in _uses, cache.wait_seconds):
            raise BusyError(
                f"{other.what if other is not None else 'a call'} on another thread is using this TieredCache, and "
                f"{mine.what} has waited {cache.wait_seconds:g} seconds; let it wait longer with "
                "TieredCache(wait_seconds=…), or give each thread a TieredCache of its own over one PrefixStore"
            )
        _uses[cache] = mine


def _leave(cache: Any, mine: _Use) -> None:
    """Free ``cache`` for the next call, if ``mine`` is using it. May be called more than once."""
    if _uses.get(cache) is mine:
        with _freed:
            _freed.notify_all()  # first: an interrupt between the two must not leave waiters asleep on a free cache
            del _uses[cache]


def is_serving(cache: Any) -> bool:
    """Whether a wrapped ``generate()`` call on this thread is using ``cache``."""
    use = _uses.get(cache)
    return use is not None and use.what == GENERATE and use.thread == threading.get_ident()


def _forget_threads() -> None:
    """Clear the thread ids of the parent's calls in the child of a fork: a later thread may get the same id."""
    global _freed
    _freed = threading.Condition()  # a thread of the parent may hold the old lock
    for use in _uses.values():
        if use.thread != threading.get_ident():
            use.thread = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def running_generate() -> FrameType | None:
    """Return the innermost ``generate()`` of a model that is running on this thread, wrapped by kvtier or not.

    The stack is searched by function name and first argument. No upstream hook is needed, so no renamed method can
    hide the call.
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


_is_wrapped = False


def note_wrapped(wrapped: bool) -> None:
    """Note whether ``generate`` announces its calls from now on."""
    global _is_wrapped
    _is_wrapped = wrapped


def check_wrapped() -> None:
    """Check that ``generate`` is wrapped: unwrapped, it takes all tokens in a cache for the start of its prompt.

    Raises:
        UninstalledError: ``generate`` is not wrapped.
    """
    if not _is_wrapped:
        raise UninstalledError(
            "kvtier.uninstall() was called, and without it no cache can tell which tokens it is given; make a new "
            "TieredCache, or call begin() first"
        )
