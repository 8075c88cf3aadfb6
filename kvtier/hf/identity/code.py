"""Origin of code: released, installed or own, judged by files and code objects, never by names."""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import os
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Packages whose version stands for their code.
RELEASED = frozenset({"transformers", "torch", "peft", "accelerate", "kernels", "numpy", "kvtier"})
WRITTEN_IN_C = (
    types.BuiltinFunctionType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
_STDLIB_FOLDER = str(Path(os.__file__).parent)
_INSTALLED_FOLDERS = frozenset({"site-packages", "dist-packages"})
# Opcode of a name lookup → bits by which its index is shifted: since Python 3.11, one opcode also holds a flag.
_GLOBAL_READS = {
    dis.opmap[name]: bits
    for name, bits in {
        "LOAD_GLOBAL": int(sys.version_info >= (3, 11)),
        "LOAD_NAME": 0,
        "LOAD_FROM_DICT_OR_GLOBALS": 0,
    }.items()
    if name in dis.opmap
}


class Origin(enum.Enum):
    """Origin of a piece of code.

    RELEASED: a package of ``RELEASED`` or Python itself; its version stands for its code.
    INSTALLED: another package in site-packages, or code that a released package generates; its code is read, but not
        the code that it calls.
    OWN: everything else ("user code"); its code is read, and everything that it reads.
    """

    RELEASED = "released"
    INSTALLED = "installed"
    OWN = "own"


def top_package(module: object) -> str:
    """Return the top-level package of a module name (``torch`` of ``torch.nn.functional``); empty if not a string."""
    return module.partition(".")[0] if isinstance(module, str) else ""


@functools.lru_cache(maxsize=4096)
def _origin_of_file(filename: str, package: str) -> Origin:
    if package in sys.stdlib_module_names or package == "builtins":
        in_installed = _INSTALLED_FOLDERS.intersection(Path(filename).parts)
        if filename.startswith("<frozen ") or (filename.startswith(_STDLIB_FOLDER + os.sep) and not in_installed):
            return Origin.RELEASED
    elif package in RELEASED:
        home = getattr(sys.modules.get(package), "__file__", None)
        if home is not None and filename.startswith(str(Path(home).parent) + os.sep):
            return Origin.RELEASED
        if filename.startswith("<"):  # generated, as by dataclasses
            return Origin.INSTALLED
    if package != "__main__" and _INSTALLED_FOLDERS.intersection(Path(filename).parts):
        return Origin.INSTALLED
    return Origin.OWN


def origin_of_function(function: types.FunctionType) -> Origin:
    """Return the origin of a Python function: its file must lie in the package of its globals."""
    return _origin_of_file(function.__code__.co_filename, package_of_function(function))


def package_of_function(function: types.FunctionType) -> str:
    """Return the top-level package in whose globals a Python function runs."""
    return top_package(function.__globals__.get("__name__"))


def origin_of_class(kind: type) -> Origin:
    """Return the origin of a class: a released class is found under its name in its module.

    Single methods may still be patched: see ``origin_of_function``.
    """
    module = sys.modules.get(kind.__module__)
    found: Any = module
    for part in kind.__qualname__.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    if found is not kind:
        is_bound = type(kind).__name__ == "pybind11_type" and top_package(kind.__module__) in RELEASED
        return Origin.RELEASED if is_bound or not is_heap(kind) else Origin.OWN
    return origin_of_module(module)


def is_heap(kind: type) -> bool:
    """Whether a class is not written in C."""
    return bool(kind.__flags__ & (1 << 9))  # Py_TPFLAGS_HEAPTYPE


def has_hidden_memory(kind: type) -> bool:
    """Whether C code gave objects of ``kind``, a class or its base, memory that is no attribute.

    A class statement adds a pointer for each slot, and up to two for ``__dict__`` and ``__weakref__``.
    """
    base = kind.__base__
    if base is None or not is_heap(kind):
        return base is not None
    inside = vars(kind)
    pointers = sum(name in inside for name in ("__dict__", "__weakref__"))
    if "__slots__" in inside:
        pointers += sum(isinstance(value, types.MemberDescriptorType) for value in inside.values())
    return kind.__basicsize__ - base.__basicsize__ > pointers * tuple.__itemsize__


def origin_of_module(module: types.ModuleType | None) -> Origin:
    """Return the origin of a module."""
    name = str(getattr(module, "__name__", ""))
    file = getattr(module, "__file__", None)
    if file is None:  # built into Python, or C code without a file of its own
        known = top_package(name) in RELEASED | sys.stdlib_module_names
        return Origin.RELEASED if known and top_package(name) != "__main__" else Origin.OWN
    if top_package(name) in sys.stdlib_module_names and "lib-dynload" in file:
        return Origin.RELEASED
    return _origin_of_file(file, top_package(name))


def behind(function: Any) -> Any:
    """Return the function behind partials, bound methods and ``torch.compile``."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, types.MethodType):
            function = function.__func__
        elif is_compiled(function):
            function = function.__dict__["_torchdynamo_orig_callable"]
        else:
            return function


def is_compiled(function: Any) -> bool:
    """Whether ``torch.compile`` made a function."""
    return (
        isinstance(function, types.FunctionType)
        and "_torchdynamo_orig_callable" in function.__dict__
        and package_of_function(function) == "torch"
        and origin_of_function(function) is Origin.RELEASED
    )


def package_of(function: Any) -> str:
    """Return the released package of a callable, or of a callable object's class; else an empty string."""
    function = behind(function)
    if isinstance(function, types.FunctionType):
        return package_of_function(function) if origin_of_function(function) is Origin.RELEASED else ""
    kind = function if isinstance(function, type) else type(function)
    return top_package(kind.__module__) if origin_of_class(kind) is Origin.RELEASED else ""


def closed_over(function: types.FunctionType) -> Iterator[Any]:
    """Yield the values of a function's closure variables, except variables that have no value yet."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            continue


def nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and all code objects defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from nested(constant)


class CodeFacts:
    """Facts about a code object and the code objects inside it, each computed on first use."""

    def __init__(self, code: types.CodeType) -> None:
        self.code = code  # keeps its id from being reused

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over everything but file names and line numbers."""
        return _digest(self.code)

    @functools.cached_property
    def _parts(self) -> tuple[types.CodeType, ...]:
        return tuple(nested(self.code))

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Globals, attributes and string constants that it names."""
        found: set[str] = set()
        for one in self._parts:
            found.update(one.co_names)
            _add_strings(one.co_consts, found)
        return frozenset(found)

    @functools.cached_property
    def globals_read(self) -> tuple[str, ...]:
        """The names that it looks up in its globals, sorted."""
        return tuple(sorted({name for one in self._parts for name in _globals_read(one)}))

    @functools.cached_property
    def fragments(self) -> frozenset[str]:
        """String pieces from which it may build attribute names."""
        dynamic = (one for one in self._parts if not _DYNAMIC.isdisjoint(one.co_names))
        return frozenset(piece for one in dynamic for piece in _fragments(one))


# Ways to reach an attribute whose name is not a constant.
_DYNAMIC = frozenset({"getattr", "setattr", "hasattr", "attrgetter", "__getattribute__"})
# User code that names one of these may read any attribute.
READS_ANYTHING = frozenset(
    {"__dict__", "__getattribute__", "__getstate__", "__reduce_ex__", "attrgetter", "deepcopy", "eval", "exec"}
    | {"getattr", "getmembers", "pickle", "vars"}
)
_SHORTEST_FRAGMENT = 4
_ADDITIONS = frozenset({"BINARY_OP", "BINARY_ADD", "BINARY_MODULO"})
_BUILD_STRING, _LOAD_CONST = dis.opmap["BUILD_STRING"], dis.opmap["LOAD_CONST"]
_NO_OPERATION = frozenset({dis.EXTENDED_ARG, dis.opmap.get("CACHE", dis.EXTENDED_ARG)})  # caches: since Python 3.11
_JOINING = frozenset(dis.opmap[name] for name in (*_ADDITIONS, "BUILD_STRING") if name in dis.opmap)
_facts: dict[int, CodeFacts] = {}
_MOST_FACTS = 50_000


def facts_of(code: types.CodeType) -> CodeFacts:
    """Return the facts about a code object. Cached by object, since code never changes."""
    found = _facts.get(id(code))
    if found is None:
        if len(_facts) >= _MOST_FACTS:
            _facts.clear()
        found = _facts[id(code)] = CodeFacts(code)
    return found


def _fragments(code: types.CodeType) -> Iterator[str]:
    """Yield the constants from which a code object builds strings."""
    instructions = _Instructions(code)
    for operation in _JOINING:
        for index in instructions.where(operation):
            reach = 4 * instructions.argument(index) if operation == _BUILD_STRING else 4
            for constant in (code.co_consts[n] for n in instructions.before(index, reach, _LOAD_CONST)):
                is_name = isinstance(constant, str) and constant.isidentifier()
                if is_name and len(constant.strip("_")) >= _SHORTEST_FRAGMENT:
                    yield constant


def _globals_read(code: types.CodeType) -> Iterator[str]:
    instructions = _Instructions(code)
    for operation, shift in _GLOBAL_READS.items():
        for index in instructions.where(operation):
            yield code.co_names[instructions.argument(index) >> shift]


class _Instructions:
    """Searches the instructions of a code object, and decodes the few that are found.

    Decoding all of them made most of the first identity of a process. (``dis`` takes ten times as long again.)
    """

    def __init__(self, code: types.CodeType) -> None:
        whole = code.co_code
        self._operations, self._arguments = whole[::2], whole[1::2]

    def where(self, operation: int) -> Iterator[int]:
        """Yield the indices of an operation."""
        index = self._operations.find(operation)
        while index >= 0:
            yield index
            index = self._operations.find(operation, index + 1)

    def argument(self, index: int) -> int:
        """Return the argument of the operation at ``index``, with the extensions before it."""
        argument, shift = self._arguments[index], 8
        while index and self._operations[index - 1] == dis.EXTENDED_ARG:
            index -= 1
            argument |= self._arguments[index] << shift
            shift += 8
        return argument

    def before(self, index: int, count: int, operation: int) -> Iterator[int]:
        """Yield the arguments of ``operation`` among the last ``count`` operations before ``index``."""
        while count and index:
            index -= 1
            found = self._operations[index]
            if found in _NO_OPERATION:
                continue
            count -= 1
            if found == operation:
                yield self.argument(index)


def _add_strings(constants: Iterable[Any], found: set[str]) -> None:
    for constant in constants:
        if isinstance(constant, str):
            found.add(constant)
        elif isinstance(constant, (tuple, frozenset)):
            _add_strings(constant, found)


_KINDS_OF_CODE = 0x3FF  # flags besides those of __future__, which do not matter once code is compiled


def _digest(code: types.CodeType) -> str:
    shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _KINDS_OF_CODE)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    digest = hashlib.sha256(repr((shape, names, getattr(code, "co_exceptiontable", b""))).encode())
    digest.update(code.co_code)
    for constant in code.co_consts:
        digest.update(_constant(constant).encode())
    return digest.hexdigest()


def _constant(constant: Any) -> str:
    if isinstance(constant, types.CodeType):
        return _digest(constant)
    if isinstance(constant, frozenset):
        return f"frozenset({sorted(map(_constant, constant))})"
    if isinstance(constant, tuple):
        return f"tuple({list(map(_constant, constant))})"
    return f"{type(constant).__name__} {constant!r}"
