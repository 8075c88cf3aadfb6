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
    """A call that is using a cache.

    Attributes:
        what: the method, as messages name it.
        thread: that it runs on; None where it runs in the process that this one was forked from.
    """

    what: str
    thread: int | None


_uses: WeakKeyDictionary[Any, _Use] = WeakKeyDictionary()
_freed = threading.Condition()
"""Guards ``_uses``, and is notified when a cache becomes free. Its lock is reentrant: a signal handler may come in."""


def checked_wait_seconds(wait_seconds: object) -> float:
    """Return ``wait_seconds``.

    Raises:
        ConfigurationError: it is no number of seconds from 0 to ``threading.TIMEOUT_MAX``.
    """
    is_number = isinstance(wait_seconds, (int, float)) and not isinstance(wait_seconds, bool)
    if not is_number or not 0 <= wait_seconds <= threading.TIMEOUT_MAX:  # type: ignore[operator]
        raise ConfigurationError(
            f"wait_seconds={wait_seconds!r:.80} must be a number of seconds from 0 (do not wait) to "
            f"{threading.TIMEOUT_MAX:.0e}."
        )
    return float(wait_seconds)  # type: ignore[arg-type]


def exclusively(cache: Any, what: str, call: Callable[[], Result]) -> Result:
    """Return what ``call`` returns, which is the only one to use ``cache`` meanwhile.

    A call on another thread is waited for, up to ``cache.wait_seconds``. One on this thread never is: it would not end
    before this one. Nor is a call that runs in the process that this one was forked from.

    Args:
        cache: that ``call`` reads and changes.
        what: the method that asks, as messages name it; ``GENERATE`` makes ``is_serving`` true.
        call: that is run.

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
    finally:  # an interrupt may have come in place of the first
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
    """Let the next call come, if ``mine`` is using ``cache``. May be called more than once."""
    if _uses.get(cache) is mine:
        with _freed:
            _freed.notify_all()  # first: an interrupt between the two must not leave others asleep beside a free cache
            del _uses[cache]


def is_serving(cache: Any) -> bool:
    """Whether a wrapped ``generate()`` call on this thread is using ``cache``."""
    use = _uses.get(cache)
    return use is not None and use.what == GENERATE and use.thread == threading.get_ident()


def _forget_threads() -> None:
    """In the child of a fork, note which calls it has no thread for: a later thread may get the number of theirs."""
    global _freed
    _freed = threading.Condition()  # a thread that the child does not have may hold the old one
    for use in _uses.values():
        if use.thread != threading.get_ident():
            use.thread = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


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


_is_wrapped = False


def note_wrapped(wrapped: bool) -> None:
    """Note whether ``generate`` announces its calls from now on."""
    global _is_wrapped
    _is_wrapped = wrapped


def check_wrapped() -> None:
    """Make sure that ``generate`` is wrapped: unwrapped, it takes whatever a cache holds for the prompt's beginning.

    Raises:
        UninstalledError: it is not.
    """
    if not _is_wrapped:
        raise UninstalledError(
            "kvtier.uninstall() was called, and without it no cache can tell which tokens it is given; make a new "
            "TieredCache, or call begin() first"
        )
