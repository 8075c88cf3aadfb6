"""Stable descriptions of values: equal in every process in which the values compute the same."""

from __future__ import annotations

import copyreg
import enum
import functools
import hashlib
import logging
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from kvtier.hf.identity.attribute_reads import Met
from kvtier.hf.identity.code import (
    WRITTEN_IN_C,
    Origin,
    facts_of,
    has_hidden_memory,
    is_compiled,
    origin_of_class,
    origin_of_function,
    origin_of_module,
    package_of_function,
)
from kvtier.hf.identity.contents import (
    attributes_of,
    class_content,
    class_name,
    class_words,
    config_values,
    installed_version,
    reduction,
)

# Types whose repr is complete.
PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None)})
_REPRS = PLAIN | {types.EllipsisType, types.NotImplementedType, torch.dtype, torch.layout, torch.memory_format}
_NUMBERS = (int, float, complex, str, bytes, bytearray)
_BUILT_IN_OPERATORS = frozenset({"aten", "prims", "prim", "higher_order", "mkldnn", "quantized", "inductor", "_c10d"})

_LONGEST = 200
# Describing more values in every turn would cost too much.
_MOST_VALUES = 50_000

Found = list[tuple[str, Any]]
"""Path and value of each tensor, module and script object met inside a value."""
_OF_DICTS = (dict.__iter__, OrderedDict.__iter__)


class Undescribable(Exception):  # noqa: N818  (not the caller's error)
    """A value has no stable description: it may compute something else in another process, or later."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(f"{path or 'a value'} cannot be described ({what})")


def describe(value: Any, path: str, found: Found) -> str:
    """Return a description of ``value`` without addresses, and without an order that differs between processes.

    Raises:
        Undescribable: the value has no stable description: a lock, an open file, a running generator.
    """
    return Describer(found).describe(value, path)


def describe_code(function: Any) -> str:
    """Return a description of a callable: its origin; for user code also its code and the values that it reads.

    Raises:
        Undescribable: it reads a value without a stable description.
    """
    return Describer([]).describe(function, "")


class Describer:
    """Descriptions of values at one moment. A value met again is not described again.

    Tensors, modules and script objects are only named: they are appended to ``found``, for the caller to read.
    Dicts are sorted, except dicts that user code reads: it may iterate over them in their order.

    Attributes:
        found: see above.
        classes: every class met; a released class is described by its name alone.
        met: names that the functions met may read.
    """

    def __init__(self, found: Found) -> None:
        self.found = found
        self.classes: set[type] = set()
        self.met = Met()
        self._done: dict[tuple[int, bool], str] = {}
        self._kept: list[Any] = []  # keeps ids from being reused
        self._open: dict[int, int] = {}
        self._in_own_code = 0

    def describe(self, value: Any, path: str) -> str:
        """Return a description of ``value``, which is found at ``path``."""
        kind = type(value)
        if kind in _REPRS:
            return repr(value)
        if isinstance(value, (torch.Tensor, torch.nn.Module, torch.ScriptObject)):
            self.found.append((path, value))
            return kind.__name__
        if kind is torch.device:
            return "device"  # the same model on another device is the same model
        known_as = (id(value), bool(self._in_own_code))
        if (done := self._done.get(known_as)) is not None:
            return done
        if id(value) in self._open:  # a cycle: its depth, counted from the outermost value, names the value
            return f"<{self._open[id(value)]}>"
        self._open[id(value)] = len(self._open)
        try:
            words = self._whole(value, kind, path)
        finally:
            del self._open[id(value)]
        if len(words) > _LONGEST:  # a long description must not be repeated each time the value is met
            words = f"#{hashlib.sha256(words.encode()).hexdigest()}"
        self._done[known_as] = words
        self._kept.append(value)
        if len(self._kept) > _MOST_VALUES:
            raise Undescribable(path, f"more than {_MOST_VALUES} values inside")
        return words

    # --- plain values -----------------------------------------------------------------------------------------------

    def _whole(self, value: Any, kind: type, path: str) -> str:
        if isinstance(value, type):
            return self._class(value, path)
        if isinstance(value, enum.Enum):
            return f"{self.describe(kind, path)}.{value.name}={self.describe(value.value, path)}"
        if isinstance(value, types.ModuleType):
            return self._module(value, path)
        shows_what_is_there = getattr(kind, "__iter__", None) in _OF_DICTS  # other mappings may load on iteration
        if isinstance(value, types.MappingProxyType) or shows_what_is_there:
            return self._subclass(value, path, self._mapping(value, path), (dict, types.MappingProxyType))
        if isinstance(value, (set, frozenset)):
            words = sorted(self.describe(item, f"{path}.item") for item in value)
            return self._subclass(value, path, f"{{{','.join(words)}}}", (set, frozenset))
        if isinstance(value, (list, tuple)):
            words = [self.describe(item, f"{path}.{i}") for i, item in enumerate(value)]
            opened, closed = "()" if isinstance(value, tuple) else "[]"
            return self._subclass(value, path, opened + ",".join(words) + closed, (list, tuple))
        if isinstance(value, (np.ndarray, np.generic)):
            return self._numpy(value, path)
        if isinstance(value, _NUMBERS):
            base = next(base for base in _NUMBERS if isinstance(value, base))
            return self._subclass(value, path, base.__repr__(value), _NUMBERS)
        if isinstance(value, PreTrainedConfig):
            values = self.describe(config_values(value), path)
            return values if kind.__module__.startswith("transformers.") else f"{self.describe(kind, path)} {values}"
        if isinstance(value, (np.dtype, np.ufunc, torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return self._named(value, path)
        if isinstance(value, logging.Logger):
            return "logger"
        if isinstance(value, (memoryview, weakref.ref)):
            inside = value() if isinstance(value, weakref.ref) else (value.format, value.shape, value.tobytes())
            return f"{kind.__name__} {self.describe(inside, path)}"
        return self._callable(value, kind, path) or self._object(value, kind, path)

    def _mapping(self, value: Mapping[Any, Any], path: str) -> str:
        items = [f"{self.describe(k, f'{path}.key')}:{self.describe(v, f'{path}.{_key(k)}')}" for k, v in value.items()]
        keeps_order = bool(self._in_own_code) or isinstance(value, OrderedDict)
        return "{" + ",".join(items if keeps_order else sorted(items)) + "}"

    def _subclass(self, value: Any, path: str, words: str, plain: tuple[type, ...]) -> str:
        """Return ``words``, the content of a builtin type, and the additions of a subclass."""
        kind = type(value)
        if kind in plain:
            return words if kind is not frozenset else f"frozen{words}"
        if kind is OrderedDict or kind is torch.Size:
            return f"{kind.__name__}{words}"
        factory = self.describe(getattr(value, "default_factory", None), path)  # of a defaultdict
        return f"{self.describe(kind, path)}({words},{factory}){self._content(value, path)}"

    def _numpy(self, value: Any, path: str) -> str:
        if type(value) is not np.ndarray and isinstance(value, np.ndarray) and type(value) is not np.memmap:
            raise Undescribable(path, type(value).__qualname__)
        words = f"{np.dtype(value.dtype).descr} {value.shape}"
        if value.dtype.char in "gG":  # its bytes include padding
            return f"{words} {[repr(number) for number in np.ravel(value)]}"
        if value.dtype.char == "V" or value.dtype.hasobject:  # its bytes include padding or addresses
            return f"{words} {self.describe(value.tolist(), path)}"
        return f"{words} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"

    def _named(self, value: Any, path: str) -> str:
        if isinstance(value, np.ufunc) and getattr(np, value.__name__, None) is not value:
            raise Undescribable(path, "a ufunc that NumPy does not have")
        if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            name = str(value)
            if name.split(".", maxsplit=1)[0].split("::", maxsplit=1)[0] not in _BUILT_IN_OPERATORS:
                raise Undescribable(path, f"the operator {name}")
            return name
        return repr(value)

    # --- code -------------------------------------------------------------------------------------------------------

    def _callable(self, value: Any, kind: type, path: str) -> str:
        if kind is types.FunctionType:
            return self._function(value, path)
        if kind is types.MethodType:
            return f"method {self.describe(value.__func__, path)} of {self.describe(value.__self__, f'{path}.self')}"
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return self._subclass(value, path, f"partial {self.describe(parts, path)}", (functools.partial,))
        if type(value).__name__ == "instancemethod":  # of a pybind11 class, which is named beside it
            return f"instancemethod {value.__name__}"
        if isinstance(value, WRITTEN_IN_C):
            owner = getattr(value, "__objclass__", None) or getattr(value, "__self__", None)
            if isinstance(owner, types.ModuleType) or owner is None:
                return f"{getattr(owner, '__name__', None) or value.__module__}.{value.__qualname__}"
            where = f"{owner.__module__}." if isinstance(owner, type) else f"{self.describe(owner, f'{path}.self')} "
            return f"{where}{value.__qualname__}"
        if kind is types.MethodWrapperType:
            return f"{value.__name__} of {self.describe(value.__self__, f'{path}.self')}"
        if isinstance(value, (staticmethod, classmethod)):
            return f"{kind.__name__} {self.describe(value.__func__, path)}"
        if isinstance(value, property):
            return f"property {self.describe((value.fget, value.fset, value.fdel), path)}"
        if isinstance(value, functools.cached_property):
            return f"cached_property {self.describe(value.func, path)}"
        if isinstance(value, functools._lru_cache_wrapper):
            return f"lru_cache {self.describe(value.__wrapped__, path)}"
        if kind is types.CodeType:
            return facts_of(value).digest
        return ""

    def _function(self, function: types.FunctionType, path: str) -> str:
        if is_compiled(function):
            return f"compiled {self.describe(function.__dict__['_torchdynamo_orig_callable'], path)}"
        origin = origin_of_function(function)
        code = function.__code__
        module = str(function.__globals__.get("__name__"))
        name = f"{module}.{getattr(code, 'co_qualname', code.co_name)}"
        if origin is not Origin.RELEASED or "<" in name or not hasattr(code, "co_qualname"):
            name = f"{name} {facts_of(code).digest}"
        if origin is Origin.INSTALLED:
            name = f"{name} {installed_version(package_of_function(function))}"
        owned = origin is Origin.OWN
        self.met.add(function, owned or (origin is Origin.INSTALLED and bool(self._in_own_code)))
        self._in_own_code += owned
        try:
            parts = [name]
            for what, inside in (("defaults", function.__defaults__), ("kwdefaults", function.__kwdefaults__)):
                if inside:
                    parts.append(f"{what}={self.describe(inside, f'{path}.{what}')}")
            for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
                parts.append(f"{variable}={self._cell(cell, f'{path}.{variable}')}")
            if owned:
                parts.extend(self._read_globals(function, path))
                if function.__dict__:
                    parts.append(self.describe(function.__dict__, path))
        finally:
            self._in_own_code -= owned
        return " ".join(parts)

    def _cell(self, cell: types.CellType, path: str) -> str:
        try:
            inside = cell.cell_contents
        except ValueError:  # a variable that has no value yet
            return "empty"
        return self.describe(inside, path)

    def _read_globals(self, function: types.FunctionType, path: str) -> Iterable[str]:
        facts = facts_of(function.__code__)
        for name in facts.globals_read:
            if name not in function.__globals__:
                continue  # a builtin
            value = function.__globals__[name]
            if isinstance(value, types.ModuleType):
                yield f"{name}={self._module_as_read(value, facts.names, path)}"
            else:
                yield f"{name}={self.describe(value, f'{path}.{name}')}"

    def _module_as_read(self, module: types.ModuleType, names: frozenset[str], path: str) -> str:
        """Describe the values that code with these ``names`` can read in a module and in the modules inside it."""
        if id(module) in self._open:
            return f"<{self._open[id(module)]}>"
        self._open[id(module)] = len(self._open)
        try:
            words = [module.__name__]
            inside = vars(module)
            if module is torch and "ops" in names:
                for space in sorted(names.intersection(vars(torch.ops)) - _BUILT_IN_OPERATORS):
                    if isinstance(vars(torch.ops)[space], torch._ops._OpNamespace):
                        raise Undescribable(path, f"an operator of torch.ops.{space}")
            for name in sorted(names.intersection(inside)):
                value = inside[name]
                if isinstance(value, types.ModuleType):
                    words.append(self._module_as_read(value, names, path))
                elif not (name.startswith("__") and name.endswith("__")) and not _is_released(value):
                    words.append(f"{name}={self.describe(value, f'{path}.{module.__name__}.{name}')}")
        finally:
            del self._open[id(module)]
        return f"({' '.join(words)})"

    def _module(self, module: types.ModuleType, path: str) -> str:
        if origin_of_module(module) is Origin.OWN:
            raise Undescribable(path, f"the module {module.__name__}, of which anything may be read")
        return f"module {module.__name__}"

    # --- classes and objects ----------------------------------------------------------------------------------------

    def _class(self, kind: type, path: str) -> str:
        self.classes.add(kind)
        words = class_words(kind)
        if words is not None:
            return words
        self._in_own_code += 1
        try:
            digest = hashlib.sha256()
            for base in kind.__mro__[1:]:
                digest.update(self.describe(base, path).encode())
            for key, value in class_content(kind):
                digest.update(f"{key}={self.describe(value, f'{path}.{kind.__qualname__}.{key}')};".encode())
        finally:
            self._in_own_code -= 1
        return f"{class_name(kind)} {digest.hexdigest()}"

    def _object(self, value: Any, kind: type, path: str) -> str:
        """Describe an object by its class and its attributes; objects of other code, by how pickle rebuilds them."""
        words, method = self.describe(kind, path), reduction(kind)
        if method == "attributes" and any(map(has_hidden_memory, kind.__mro__)):
            raise Undescribable(path, kind.__qualname__)
        if method != "attributes":
            try:
                made: Any = copyreg.dispatch_table[kind](value) if method == "table" else value.__reduce_ex__(4)
            except Exception as error:
                raise Undescribable(path, kind.__qualname__) from error
            if isinstance(made, str):
                return f"{words} {made}"
            if method in ("pickle", "table"):
                parts = [list(part) if i > 2 and part is not None else part for i, part in enumerate(made)]
                words += self.describe(parts, path)
                if origin_of_class(kind) is not Origin.OWN:
                    return words
        return words + self._content(value, path)

    def _content(self, value: Any, path: str) -> str:
        inside = attributes_of(value)
        return self.describe(inside, path) if inside else ""


def _is_released(value: Any) -> bool:
    """Whether a value is unpatched code of a released package."""
    if isinstance(value, type):
        return origin_of_class(value) is Origin.RELEASED
    if isinstance(value, types.FunctionType):
        return not value.__closure__ and origin_of_function(value) is Origin.RELEASED
    return isinstance(value, WRITTEN_IN_C)


def _key(key: Any) -> str:
    return key if type(key) is str else type(key).__name__
