"""Hooks for model classes with their own ``generate``, which the hook around transformers' ``generate`` does not see.

Most of these methods end in transformers' ``generate``, which runs a normal turn. Others run the decoding loop
themselves and would take all tokens in a cache for the start of their prompt. A cache is therefore empty when such a
method begins (a turn loads its prefix from the store), and empty when it ends without a turn.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

from transformers import GenerationMixin

from kvtier.hf.compat.names import CACHE_ARGUMENT, CACHE_ARGUMENTS
from kvtier.hf.generate.replaced_method import ReplacedMethod
from kvtier.hf.turn.manager import managed_among, turns_of

_lock = threading.Lock()
_replaced = ReplacedMethod("generate")
_listens = False
_OWN_HOOK: Any = vars(GenerationMixin).get("__init_subclass__")
"""``__init_subclass__`` of ``GenerationMixin`` in transformers; None when it defines none."""


def install() -> None:
    """Wrap ``generate`` of all classes that define their own: existing classes, and later ones when they are made."""
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
    """Restore ``generate`` of all classes, and stop wrapping new classes."""
    global _listens
    with _lock:
        _replaced.restore()
        if _listens and _OWN_HOOK is not None:
            GenerationMixin.__init_subclass__ = _OWN_HOOK
        elif _listens:
            del GenerationMixin.__init_subclass__
        _listens = False


def _wrap(owner: type) -> None:
    if "generate" in vars(owner):
        _replaced.wrap(owner, _guarded)


def _below(owner: type) -> Iterator[type]:
    children: list[type] = owner.__subclasses__()
    for child in children:
        yield child
        yield from _below(child)


def _guarded(original: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(original).parameters

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        managers = [turns for turns in map(turns_of, (*args, *kwargs.values())) if turns is not None]
        for name in managed_among(kwargs):
            is_ours = name in CACHE_ARGUMENTS and name not in parameters
            if is_ours and CACHE_ARGUMENT is not None and CACHE_ARGUMENT not in kwargs:
                kwargs[CACHE_ARGUMENT] = kwargs.pop(name)  # upstream's current name, without a deprecation warning
        reason = f"{type(self).__name__} has a generate of its own, which does not tell its tokens"
        for turns in managers:
            turns.begin_without_reuse(reason)
        try:
            return original(self, *args, **kwargs)
        finally:
            for turns in managers:
                if turns.turn is not None:  # transformers' generate was not called
                    turns.pass_over(reason)

    return generate
