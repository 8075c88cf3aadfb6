"""Patches of released code: methods and attributes of classes, functions in modules."""

from __future__ import annotations

import functools
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from kvtier.hf.identity.attribute_reads import COMPUTING
from kvtier.hf.identity.code import (
    RELEASED,
    WRITTEN_IN_C,
    Origin,
    behind,
    closed_over,
    facts_of,
    origin_of_class,
    origin_of_function,
    top_package,
)
from kvtier.hf.identity.contents import NOT_FORWARD, class_content, class_name, class_words, installed_version
from kvtier.hf.identity.stable_repr import PLAIN, Describer

# Functions that any model calls.
_ALWAYS: tuple[Any, ...] = (torch, torch.nn.functional, torch.Tensor)
_COMPUTING = (*COMPUTING, "torch.nn.modules.")
_SCALARS = PLAIN | {torch.dtype, torch.device}


class _Seen(NamedTuple):
    """Contents of a class or module at the last look."""

    state: list[Any]
    """Its values; for each function, also the parts that can be edited in place."""
    words: str
    """Description of the entries that stay fixed while ``state`` is the same."""
    again: list[tuple[str, Any]]
    """Entries to describe in every turn."""
    calls: frozenset[str]
    """Names of model modules whose functions it holds."""


_classes: weakref.WeakKeyDictionary[type, _Seen] = weakref.WeakKeyDictionary()
_modules: dict[str, _Seen] = {}
_called_modules: dict[str, _Seen] = {}


def describe_patches(classes: Iterable[type], modules: Iterable[str], describer: Describer) -> list[str]:
    """Return descriptions of the patched entries of released classes, and of the functions in their modules.

    Classes of user code are described elsewhere, whole. ``modules`` are further modules that hold called functions,
    besides the imports of the classes' modules.
    """
    found: list[str] = []
    homes: dict[str, Any] = {}
    done: set[type] = set()
    waiting = sorted(set(classes), key=class_name)
    for kind in waiting:
        for base in kind.__mro__:
            if (
                base in done
                or top_package(base.__module__) in _UNEXAMINED
                or origin_of_class(base) is not Origin.RELEASED
            ):
                continue
            done.add(base)
            found += _words(base, class_name(base), _class_entries, _classes, base, describer)
            if base.__module__.startswith(_COMPUTING):
                homes.setdefault(base.__module__, sys.modules.get(base.__module__))
    for module in _ALWAYS:
        homes.setdefault(module.__name__, module)
    called = {name for name in modules if name.startswith(COMPUTING) and name in sys.modules}
    for name in sorted(homes):
        if isinstance(homes[name], (types.ModuleType, type)):
            found += _words(homes[name], name, _module_entries, _modules, name, describer)
            called |= _modules[name].calls
    for name in sorted(called - set(homes)):
        found += _words(sys.modules[name], name, _foreign_entries, _called_modules, name, describer)
    return found


_UNEXAMINED = frozenset(sys.stdlib_module_names) | {"builtins", "numpy"}


def _words(
    owner: Any, name: str, entries: Callable[[Any], Iterator[_Entry]], memory: Any, key: Any, describer: Describer
) -> list[str]:
    state = list(vars(owner).values())
    if owner not in _ALWAYS:
        functions = [value for value in state if type(value) is types.FunctionType]
        state += [part for function in functions for part in (function.__code__, function.__defaults__)]
    seen = memory.get(key)
    if seen is None or len(state) != len(seen.state) or not all(map(operator.is_, state, seen.state)):
        found = list(entries(owner))
        fixed = sorted(f"{entry}={words}" for entry, _, words in found if words is not None)
        again = [(entry, value) for entry, value, words in found if words is None]
        functions = [value for value in state if type(value) is types.FunctionType]
        calls = {str(value.__globals__.get("__name__")) for value in functions}
        calls = {name for name in calls if name.startswith(COMPUTING) and name in sys.modules}
        seen = memory[key] = _Seen(state, f"{name}: {';'.join(fixed)}", again, frozenset(calls))
    return [seen.words] + [
        f"{name}.{entry}: {describer.describe(value, f'{name}.{entry}')}" for entry, value in seen.again
    ]


_Entry = tuple[str, Any, str | None]
"""A changed or changeable entry: name, value, and a description if that is fixed for the same object."""


def _class_entries(kind: type) -> Iterator[_Entry]:
    """Yield the entries of a released class, except the methods that it was released with."""
    for key, value, words in _class_content_in_words(kind):
        if words is None or not (kind is torch.nn.Module or key in _BEFORE_FORWARD):
            yield key, value, words


# PyTorch and transformers wrap some of these themselves, when they first need to.
_REMEMBERED = "_cached_value"  # suffix of the values that transformers caches on a class
_BEFORE_FORWARD = frozenset({"__init__", "__new__", "__init_subclass__", "__setstate__", "__getstate__", "__repr__"})


def _below_ours(value: Any) -> Any:
    """Return the function inside kvtier's wrappers, or ``value``: wrapping does not change the model."""
    while isinstance(value, types.FunctionType) and str(value.__globals__.get("__name__")).startswith("kvtier.hf."):
        if not hasattr(value, "__wrapped__"):
            break
        value = value.__wrapped__
    return value


def _class_content_in_words(kind: type) -> Iterator[_Entry]:
    for key, value in class_content(kind):
        if key.endswith(_REMEMBERED) or key in NOT_FORWARD or (key.startswith("__") and not callable(value)):
            continue
        if type(value) in _SCALARS:
            yield key, value, repr(value)
        elif isinstance(value, (types.FunctionType, staticmethod, classmethod, property)):
            below = _below_ours(value)
            if below is not value and any(below is _below_ours(vars(base).get(key)) for base in kind.__mro__[1:]):
                continue  # an inherited method that kvtier wrapped on the class
            words = _released_words(below)
            if words is None or words != f"{class_name(kind)}.{key}":
                yield key, below, words
        elif isinstance(value, type):
            yield key, value, class_words(value)
        elif not isinstance(value, WRITTEN_IN_C):
            yield key, value, None


def _module_entries(module: Any) -> Iterator[_Entry]:
    """Yield the code, constants and containers of a model module; of other modules, only foreign entries."""
    if not str(module.__name__).startswith(("transformers.models.", "peft.tuners.")):
        yield from _foreign_entries(module)
        return
    for key, value, words in _named_code(module):
        yield key, value, words
    for key, value in list(vars(module).items()):
        if key.startswith("__"):  # set by Python or torch.compile
            continue
        if type(value) in _SCALARS:
            yield key, value, repr(value)
        elif type(value) in _CONTAINERS or isinstance(value, types.MethodType):
            yield key, value, None


def _foreign_entries(module: Any) -> Iterator[_Entry]:
    """Yield a module's functions and classes of user code, and its public functions under another name."""
    for key, value, words in _named_code(module):
        is_class = isinstance(value, type)
        if words is None or (not is_class and value.__name__ != key and not key.startswith("_")):
            yield key, value, words


def _named_code(module: Any) -> Iterator[_Entry]:
    for key, value in list(vars(module).items()):
        if key.startswith("__") and not isinstance(module, type):
            continue
        if isinstance(value, type):
            yield key, value, class_words(value)
        elif isinstance(value, types.FunctionType):
            yield key, value, _released_words(value)
        elif isinstance(value, types.BuiltinFunctionType):
            yield key, value, f"{value.__module__}.{value.__name__}"


_CONTAINERS = frozenset({list, dict, tuple, set, frozenset})


def _released_words(value: Any, seen: frozenset[int] = frozenset()) -> str | None:
    """Return the names of released code and of the code that it wraps; None if any of it is user code."""
    if id(value) in seen:
        return ""
    seen |= {id(value)}
    if isinstance(value, (staticmethod, classmethod)):
        return _released_words(value.__func__, seen)
    if isinstance(value, property):
        value = behind(value.fget)
    if isinstance(value, (functools.partial, types.MethodType)):
        inside: list[Any] = [value.func, *value.args] if isinstance(value, functools.partial) else [value.__func__]
        return _joined(inside, "", seen)
    if isinstance(value, type):
        return class_words(value)
    if not isinstance(value, types.FunctionType):
        return repr(value) if type(value) in _SCALARS else class_name(type(value))
    code, module = value.__code__, value.__globals__.get("__name__")
    if code.co_filename.startswith("<") and top_package(module) in RELEASED:  # generated, as by dataclasses
        return f"{module}.{code.co_name} {facts_of(code).digest}"
    origin = origin_of_function(value)
    if origin is Origin.OWN:
        return None
    defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    inside = [*filter(callable, defaults), *closed_over(value)]
    version = f" {installed_version(top_package(module))}" if origin is Origin.INSTALLED else ""
    return _joined(inside, f"{module}.{getattr(code, 'co_qualname', code.co_name)}{version}", seen)


def _joined(inside: list[Any], name: str, seen: frozenset[int]) -> str | None:
    words = [
        _released_words(part, seen)
        for part in inside
        if not (isinstance(part, type) and f"{part.__qualname__}." in name)
    ]
    return None if None in words else " ".join([name, *(word or "" for word in words)]).rstrip()
