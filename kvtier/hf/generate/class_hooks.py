"""Model classes that bring a ``generate`` of their own, which the hook around transformers' does not see.

Most of them call transformers' one in the end, and that turn is as any. Others run the loop themselves: they would take
whatever a cache holds for the beginning of their prompt. So a cache goes into each of them empty (what it knows comes
from the store, if there is a turn), and leaves it empty if there was none.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

from transformers import GenerationMixin

from kvtier.hf.compat.names import CACHE_ARGUMENT, CACHE_ARGUMENTS
from kvtier.hf.turn.manager import managed_among, turns_of

_lock = threading.Lock()
_originals: dict[type, Callable[..., Any]] = {}
_listens = False
_OWN_HOOK: Any = vars(GenerationMixin).get("__init_subclass__")
"""What transformers does when a class below ``GenerationMixin`` is made; None where that is nothing."""


def install() -> None:
    """Wrap ``generate`` of all classes that have their own: those that are loaded, and those that come later."""
    global _listens
    with _lock:
        for owner in set(_below(GenerationMixin)):
            _wrap(owner)
        if _listens:
            return

        def __init_subclass__(cls: type, /, **kwargs: Any) -> None:  # noqa: N807
            if _OWN_HOOK is not None:
                _OWN_HOOK.__func__(cls, **kwargs)
            else:
                super(GenerationMixin, cls).__init_subclass__(**kwargs)
            with _lock:
                _wrap(cls)

        GenerationMixin.__init_subclass__ = classmethod(__init_subclass__)
        _listens = True


def uninstall() -> None:
    """Give all classes their ``generate`` back, and listen for no new ones."""
    global _listens
    with _lock:
        for owner, original in _originals.items():
            owner.generate = original  # type: ignore[attr-defined]
        _originals.clear()
        if _listens and _OWN_HOOK is not None:
            GenerationMixin.__init_subclass__ = _OWN_HOOK
        elif _listens:
            del GenerationMixin.__init_subclass__
        _listens = False


def _wrap(owner: type) -> None:
    if "generate" in vars(owner) and owner not in _originals:
        _originals[owner] = vars(owner)["generate"]
        owner.generate = _guarded(_originals[owner])  # type: ignore[attr-defined]


def _below(owner: type) -> Iterator[type]:
    children: list[type] = owner.__subclasses__()
    for child in children:
        yield child
        yield from _below(child)


def _guarded(original: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(original).parameters

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**{str(position): value for position, value in enumerate(args)}, **kwargs}
        managers = [turns for turns in map(turns_of, given.values()) if turns is not None]
        for name in managed_among(kwargs):
            is_ours = name in CACHE_ARGUMENTS and name not in parameters
            if is_ours and CACHE_ARGUMENT is not None and CACHE_ARGUMENT not in kwargs:
                kwargs[CACHE_ARGUMENT] = kwargs.pop(name)  # upstream's own name, which it does not warn of
        reason = f"{type(self).__name__} has a generate of its own, which does not tell its tokens"
        for turns in managers:
            turns.begin_without_reuse(reason)
        try:
            return original(self, *args, **kwargs)
        finally:
            for turns in managers:
                if turns.turn is not None:  # it did not come to transformers' own
                    turns.pass_over(reason)

    return generate
