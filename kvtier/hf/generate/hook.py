"""The hook around generate(): calls with a TieredCache become turns, other calls pass through."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from kvtier.errors import ConfigurationError
from kvtier.hf.compat.model_profiles import cache_argument, forget_notes
from kvtier.hf.compat.names import CACHE_ARGUMENTS, POSITIONAL, PREPARE_CACHE, decoder_cache
from kvtier.hf.generate import class_hooks
from kvtier.hf.generate.early_lookup import original_of
from kvtier.hf.generate.prefill import restore_classes
from kvtier.hf.generate.request import parse_request
from kvtier.hf.generate.run import run_turn
from kvtier.hf.identity.weights.digest import forget_models
from kvtier.hf.not_reusable import warn_of
from kvtier.hf.turn.exclusive_use import GENERATE, exclusively, is_serving, note_wrapped
from kvtier.hf.turn.manager import managed_among, turns_of

_TAKEN_BEFORE = (
    "generate() was taken from the model before kvtier was imported, as functools.partial(model.generate) does, or "
    "after uninstall(); take it afterwards, so that kvtier sees the prompt"
)


@dataclass(slots=True)
class _Hook:
    """Wrappers around ``generate`` and its cache preparation. Inactive wrappers pass every call through."""

    originals: dict[str, Callable[..., Any]]
    wrappers: dict[str, Callable[..., Any]]
    active: bool = True


_lock = threading.Lock()
_hook: _Hook | None = None


def install() -> None:
    """Wrap ``GenerationMixin.generate``. Calls without a ``TieredCache`` pass through untouched.

    Called when ``TieredCache`` is imported, and by the first cache after ``uninstall``.
    """
    global _hook
    class_hooks.install()
    with _lock:
        if _hook is not None and _is_below(GenerationMixin.generate, _hook.wrappers["generate"]):
            _hook.active = True
            note_wrapped(True)
            return
        if _hook is not None:
            _hook.active = False  # if it is still called, the new hook lies above it
        originals = {"generate": original_of(GenerationMixin.generate)}
        if hasattr(GenerationMixin, PREPARE_CACHE):
            originals[PREPARE_CACHE] = getattr(GenerationMixin, PREPARE_CACHE)
        hook = _hook = _Hook(originals, {})
        note_wrapped(True)
        for name, original in originals.items():
            hook.wrappers[name] = (_wrapped if name == "generate" else _noticing)(hook, original)
            setattr(GenerationMixin, name, hook.wrappers[name])


def _wrapped(hook: _Hook, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the wrapper of ``generate``, which runs calls with a ``TieredCache`` as turns."""

    @functools.wraps(original)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
        if not hook.active or len(given) != len(args) + len(kwargs):  # arguments given twice: the original raises
            return original(self, *args, **kwargs)
        caches = managed_among(given)
        if not caches:
            _refuse_paths(given)
            return original(self, *args, **kwargs)
        name, past = _the_one_of(caches, given)
        turns = turns_of(past)
        if turns is None or is_serving(turns):  # some decoding modes call generate again inside a turn
            if name in CACHE_ARGUMENTS:
                given[cache_argument(self) or name] = given.pop(name)
            return original(self, **given)
        return exclusively(
            turns,
            GENERATE,
            lambda: run_turn(original, self, turns, parse_request(self, name, past, given, turns.resident)),
        )

    return generate


def _refuse_paths(given: Mapping[str, Any]) -> None:
    """Refuse a path in place of a cache, which transformers would fail on without naming the argument.

    Raises:
        ConfigurationError: a cache argument is a path.
    """
    for name in CACHE_ARGUMENTS:
        if isinstance(given.get(name), (str, os.PathLike)):
            path = os.fspath(given[name])
            raise ConfigurationError(
                f"{name}={path!r} is a path, not a cache; make the cache once, cache = TieredCache({path!r}), and pass "
                f"{name}=cache to each generate()"
            )


def _the_one_of(caches: dict[str, Any], given: dict[str, Any]) -> tuple[str, Any]:
    """Return the name and the value of the cache of a call.

    Raises:
        ConfigurationError: the call has several caches.
    """
    others = [name for name in CACHE_ARGUMENTS if name not in caches and given.get(name) is not None]
    if len(caches) + len(others) > 1:
        raise ConfigurationError(
            f"generate() was given a cache under several names: {', '.join(sorted([*caches, *others]))}; pass one"
        )
    return next(iter(caches.items()))


def _noticing(hook: _Hook, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the wrapper of the cache preparation in ``generate``, for calls that the wrapper of ``generate`` missed.

    A ``generate`` that was taken from a model before it was wrapped still comes here: its cache begins empty.
    """

    @functools.wraps(original)
    def prepare(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, dict)] if hook.active else []
        for past in (past for model_kwargs in given for past in model_kwargs.values()):
            turns = turns_of(past)
            if turns is not None and not is_serving(turns):
                forget_notes(self, decoder_cache(past))
                turns.begin_without_reuse(_TAKEN_BEFORE)
                warn_of(_TAKEN_BEFORE)
        return original(self, *args, **kwargs)

    return prepare


def uninstall() -> None:
    """Restore the original ``GenerationMixin.generate``. The next ``TieredCache`` wraps it again.

    Until then, existing caches take turns only through ``begin`` and ``commit``. If another wrapper lies on top, both
    wrappers stay, and kvtier's passes every call through.
    """
    global _hook
    with _lock:
        if _hook is None:
            return
        _hook.active = False
        note_wrapped(False)
        restore_classes()
        class_hooks.uninstall()
        forget_models()  # also removes the hooks that count optimizer steps
        covered = False
        for name, wrapper in _hook.wrappers.items():
            if getattr(GenerationMixin, name) is wrapper:
                setattr(GenerationMixin, name, _hook.originals[name])
            else:
                covered = True
        if not covered:
            _hook = None


def _is_below(function: Any, wrapper: Callable[..., Any]) -> bool:
    """Return whether ``function`` is ``wrapper``, or wraps it according to ``__wrapped__``."""
    while function is not None and function is not wrapper:
        function = getattr(function, "__wrapped__", None)
    return function is wrapper
