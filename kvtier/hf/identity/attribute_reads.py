"""Attribute names that the code of a model can read. An attribute that no code names cannot affect K and V."""

from __future__ import annotations

import collections
import functools
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from kvtier.hf.identity.code import (
    READS_ANYTHING,
    Origin,
    behind,
    closed_over,
    facts_of,
    origin_of_class,
    origin_of_function,
)

# Modules of released code that computes with nn.Modules. Other released code receives tensors and configs: for base
# classes of a model and functions that a model calls, the names in them count, but their calls are not followed.
COMPUTING = (
    "transformers.activations",
    "transformers.integrations.",
    "transformers.masking_utils",
    "transformers.modeling_flash_attention_utils",
    "transformers.modeling_layers",
    "transformers.modeling_rope_utils",
    "transformers.models.",
    "peft.tuners.",
)
# Iterators of containers that hold their values. Iterating a container that transformers fills on demand loads it all.
_SHOWING = tuple(kind.__iter__ for kind in (dict, collections.OrderedDict, list, tuple, set, frozenset))
# Bases of every module. The hooks that they call are judged elsewhere, one by one.
_BASES = frozenset({object, torch.nn.Module})


class Reads(NamedTuple):
    """Names that a piece of code, and all code that it calls by name, may read.

    Attributes:
        names: names of attributes and globals, and all strings.
        fragments: string pieces from which attribute names are built.
        anything: whether user code may read attributes by names that cannot be known.
        unknown: whether it calls user code, or functions from a registry.
    """

    names: frozenset[str]
    fragments: frozenset[str]
    anything: bool
    unknown: bool

    def may_read(self, name: str) -> bool:
        """Whether an attribute of this name may be read."""
        return self.anything or name in self.names or any(fragment in name for fragment in self.fragments)


def join(several: Iterable[Reads]) -> Reads:
    """Return the union of several ``Reads``."""
    reads = list(several)
    return Reads(
        frozenset().union(*(one.names for one in reads)),
        frozenset().union(*(one.fragments for one in reads)),
        any(one.anything for one in reads),
        any(one.unknown for one in reads),
    )


_released: weakref.WeakKeyDictionary[type, Reads] = weakref.WeakKeyDictionary()


def reads_of_class(kind: type) -> Reads:
    """Return the names that the methods of a class and of its bases may read."""
    found = _released.get(kind)
    if found is None:
        found = _Reader().read(kind)
        if origin_of_class(kind) is Origin.RELEASED:
            _released[kind] = found
    return found


class ReadsOfModel:
    """Names that the classes of a model may read, as far as a walk has met them. Code that several share is read once.

    Args:
        before: those of the last walk: released classes that it met in the same order are not read again.
    """

    def __init__(self, before: ReadsOfModel | None = None) -> None:
        self._before = before._released if before is not None else []
        self._released: list[tuple[type, Reads]] = []
        """Each released class, with the names that it and those before it may read."""
        self._own: list[type] = []
        self._of_own: Reads | None = None
        self._reader: _Reader | None = None

    def add(self, kind: type) -> None:
        """Add the next class that the walk meets."""
        if origin_of_class(kind) is not Origin.RELEASED:
            self._own.append(kind)
            self._of_own = None
            return
        index = len(self._released)
        if self._reader is None and index < len(self._before) and self._before[index][0] is kind:
            self._released.append(self._before[index])
            return
        if self._reader is None:
            self._reader = _Reader()
            for earlier, _ in self._released:
                self._reader.read(earlier)
        self._released.append((kind, self._reader.read(kind)))

    def may_read(self, name: str) -> bool:
        """Whether the code of a class that was added may read an attribute of this name."""
        if self._released and self._released[-1][1].may_read(name):
            return True
        if self._of_own is None:
            self._of_own = join(reads_of_class(kind) for kind in self._own)
        return self._of_own.may_read(name)


class _Reader:
    """Reads code once; what it has read counts for everything that it reads later."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._names: set[str] = set()
        self._fragments: set[str] = set()
        self._anything = False
        self._unknown = False

    def read(self, first: Any) -> Reads:
        """Return the names that ``first``, all code that it may run, and everything read before may read."""
        waiting = [first]
        while waiting:
            value = waiting.pop()
            if id(value) in self._seen:
                continue
            self._seen.add(id(value))
            waiting.extend(self._inside(value))
        return Reads(frozenset(self._names), frozenset(self._fragments), self._anything, self._unknown)

    def _inside(self, value: Any) -> Iterator[Any]:
        """Record the names in ``value``; yield the code that it may run."""
        if isinstance(value, type):
            yield from self._inside_class(value)
        elif isinstance(value, types.FunctionType):
            yield from self._inside_function(value)
        elif isinstance(value, (staticmethod, classmethod)):
            yield value.__func__
        elif isinstance(value, property):
            yield from (value.fget, value.fset, value.fdel)
        elif isinstance(value, functools.cached_property):
            yield value.func
        elif isinstance(value, (functools.partial, types.MethodType)):
            yield behind(value)
            if isinstance(value, types.MethodType):
                yield type(value.__self__)
        elif isinstance(value, functools._lru_cache_wrapper):
            yield value.__wrapped__
        elif isinstance(value, (dict, list, tuple, set, frozenset)) and type(value).__iter__ in _SHOWING:
            inside = list(value.values()) if isinstance(value, dict) else list(value)
            self._names.update(item for item in inside if isinstance(item, str))
            yield from (item for item in inside if callable(item) or isinstance(item, (dict, list, tuple)))
        elif not isinstance(value, (str, int, float, types.ModuleType, types.BuiltinFunctionType, type(None))):
            self._unknown = self._unknown or isinstance(value, Mapping)
            yield type(value)

    def _inside_class(self, kind: type) -> Iterator[Any]:
        is_computing = issubclass(kind, torch.nn.Module) or kind.__module__.startswith(COMPUTING)
        if kind in _BASES or (not is_computing and origin_of_class(kind) is Origin.RELEASED):
            return
        for base in kind.__mro__:
            if base not in _BASES:
                yield from vars(base).values()

    def _inside_function(self, function: types.FunctionType) -> Iterator[Any]:
        origin = origin_of_function(function)
        facts = facts_of(function.__code__)
        self._names.update(facts.names)
        self._fragments.update(facts.fragments)
        if origin is Origin.OWN:
            self._unknown = True
            self._anything = self._anything or not READS_ANYTHING.isdisjoint(facts.names)
        yield from closed_over(function)
        if origin is Origin.RELEASED and not str(function.__globals__.get("__name__")).startswith(COMPUTING):
            return
        for name in facts.globals_read:
            value = function.__globals__.get(name)
            if not isinstance(value, types.ModuleType):
                yield value
            elif origin is Origin.OWN:
                yield from (inside for key, inside in vars(value).items() if key in facts.names)


class Met:
    """Names in the described functions. User code may build names at run time, and pass modules to other code.

    Attributes:
        modules: names of the modules that define the functions.
    """

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self._names: set[str] = set()
        self._anything = False

    def add(self, function: types.FunctionType, is_own: bool) -> None:
        """Record the names in a function. With ``is_own``, installed code and dynamic access may read any name."""
        names = facts_of(function.__code__).names
        self._names |= names
        self.modules.add(str(function.__globals__.get("__name__")))
        if is_own:
            installed = origin_of_function(function) is Origin.INSTALLED
            self._anything = self._anything or installed or not READS_ANYTHING.isdisjoint(names)

    def may_read(self, name: str) -> bool:
        """Whether one of the functions may read an attribute of this name."""
        return self._anything or name in self._names
