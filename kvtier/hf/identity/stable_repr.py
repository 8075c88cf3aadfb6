"""Stable descriptions of values: equal in every process in which the values compute the same."""

from __future__ import annotations

import copyreg
import enum
import functools
import hashlib
import logging
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from kvtier.hf.identity.code import (
    READS_ANYTHING,
    Origin,
    facts_of,
    is_compiled,
    origin_of_class,
    origin_of_function,
    origin_of_module,
    package_of_function,
    top_package,
)

# Types whose repr is complete.
PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None)})
_REPRS = PLAIN | {types.EllipsisType, types.NotImplementedType, torch.dtype, torch.layout, torch.memory_format}
_NUMBERS = (int, float, complex, str, bytes, bytearray)
_BUILTINS = (
    types.BuiltinFunctionType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
# Entries of classes that no computation reads.
_NO_CONTENT = frozenset(
    {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__annotate__"}
    | {"__annotate_func__", "__annotations_cache__", "__static_attributes__", "__firstlineno__", "__slots__"}
    | {"__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__", "__dataclass_fields__"}
    | {"__dataclass_params__", "__match_args__", "__signature__", "__hash__", "__slotnames__"}
)
# Methods that may be replaced without changing what a forward pass computes.
NOT_FORWARD = frozenset(
    {"extra_repr", "generate", "load_state_dict", "push_to_hub", "save_pretrained", "state_dict"}  # torchao: extra_repr
)
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
        if value.dtype.char in "gGV" or value.dtype.hasobject:  # its bytes include padding or addresses
            return f"{words} {self._numbers(value, path)}"
        return f"{words} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"

    def _numbers(self, value: Any, path: str) -> str:
        if value.dtype.char in "gG":
            return str([repr(number) for number in np.ravel(value)])
        return self.describe(value.tolist(), path)

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
        if isinstance(value, _BUILTINS):
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
        name, origin = class_name(kind), origin_of_class(kind)
        if origin is not Origin.OWN:
            return name if origin is Origin.RELEASED else f"{name} {installed_version(top_package(kind.__module__))}"
        self._in_own_code += 1
        try:
            digest = hashlib.sha256()
            for base in kind.__mro__[1:]:
                digest.update(self.describe(base, path).encode())
            for key, value in class_content(kind):
                digest.update(f"{key}={self.describe(value, f'{path}.{kind.__qualname__}.{key}')};".encode())
        finally:
            self._in_own_code -= 1
        return f"{name} {digest.hexdigest()}"

    def _object(self, value: Any, kind: type, path: str) -> str:
        """Describe an object by its class and its attributes; objects of other code, by how pickle rebuilds them."""
        words, method = self.describe(kind, path), _reduction(kind)
        if method == "attributes" and any(not _is_heap(base) for base in kind.__mro__[:-1]):
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
        """Describe the attributes of an object, those in slots included."""
        inside = dict(getattr(value, "__dict__", None) or {})
        for base in type(value).__mro__:
            slots = base.__dict__.get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                mangled = f"_{base.__name__.lstrip('_')}{slot}" if slot[:2] == "__" != slot[-2:] else slot
                member = base.__dict__.get(mangled)
                if isinstance(member, types.MemberDescriptorType):
                    try:
                        inside[slot] = member.__get__(value)
                    except AttributeError:  # a slot without a value
                        continue
        return self.describe(inside, path) if inside else ""


def _is_heap(kind: type) -> bool:
    return bool(kind.__flags__ & (1 << 9))  # Py_TPFLAGS_HEAPTYPE: other types are written in C


def _reduction(kind: type) -> str:
    """Return how to read the content of an object of a class.

    ``default``: by its attributes, if it holds nothing else, which Python checks. ``pickle``: by the pickle methods of
    C code or a released package. ``attributes``: by its attributes, since its own pickle methods might leave something
    out. ``table``: by the function registered for pickle.
    """
    if kind in copyreg.dispatch_table:
        return "table"
    methods = [kind.__reduce_ex__, kind.__reduce__, getattr(kind, "__getstate__", None)]
    plain = [object.__reduce_ex__, object.__reduce__, getattr(object, "__getstate__", None)]
    if methods == plain:
        return "default"
    if any(isinstance(method, types.FunctionType) for method in methods) and origin_of_class(kind) is Origin.OWN:
        return "attributes"
    return "pickle"


def _is_released(value: Any) -> bool:
    """Whether a value is unpatched code of a released package."""
    if isinstance(value, type):
        return origin_of_class(value) is Origin.RELEASED
    if isinstance(value, types.FunctionType):
        return not value.__closure__ and origin_of_function(value) is Origin.RELEASED
    return isinstance(value, _BUILTINS)


def _key(key: Any) -> str:
    return key if type(key) is str else type(key).__name__


def class_name(kind: type) -> str:
    """Return a class's module and name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def class_content(kind: type) -> Iterable[tuple[str, Any]]:
    """Yield the entries of a class in a fixed order, except entries that no computation reads."""
    inside = dict(vars(kind))
    for key in sorted(inside):
        value = inside[key]
        own_slot = isinstance(value, types.MemberDescriptorType)
        is_member = isinstance(value, kind) and issubclass(kind, enum.Enum)
        if key not in _NO_CONTENT and not own_slot and not is_member and not key.endswith("_map_"):
            yield key, value


@functools.lru_cache(maxsize=256)
def installed_version(package: str) -> str:
    """Return the version of a loaded package, or an empty string."""
    return str(getattr(sys.modules.get(package), "__version__", ""))


# Config values about files, tokens and defaults, not about the computation.
_VOLATILE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "transformers_version",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
)


def config_values(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the values of ``config`` that affect the computation."""
    return {name: value for name, value in config.to_dict().items() if name not in _VOLATILE}
