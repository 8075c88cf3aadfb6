"""A value → words that are equal in every process where it computes the same."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

# Values whose repr says all there is.
PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None)})
# Packages whose version, not their code, stands for what their functions do.
_RELEASED = frozenset({"transformers", "torch", "peft", "accelerate", "kernels", "builtins", "functools", "math"})
_DEEPEST = 4

Found = list[tuple[str, Any]]
"""Tensors, modules and script objects met inside a value, with the path to each."""


def describe(value: Any, path: str, found: Found, depth: int = 0) -> str:
    """Return ``value`` in words; never an address, never an order that differs between processes.

    Tensors, modules and script objects are only named: they are appended to ``found``, for the caller to read.
    Objects of unknown classes are described by their class and by what they hold directly.
    """
    kind = type(value)
    if kind in PLAIN:
        return repr(value)
    if isinstance(value, (torch.Tensor, torch.nn.Module, torch.ScriptObject)):
        found.append((path, value))
        return kind.__name__
    if isinstance(value, (torch.dtype, torch.Size, enum.Enum)):
        return str(value)
    if isinstance(value, torch.device):
        return "device"  # the same model on another device is the same model
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    if isinstance(value, PreTrainedConfig):
        return describe(config_values(value), path, found, depth)
    if callable(value):
        return describe_code(value)
    if depth == _DEEPEST:
        return kind.__qualname__
    if isinstance(value, (dict, types.MappingProxyType)):  # other mappings may load what they show
        items = [f"{k}:{describe(v, f'{path}.{k}', found, depth + 1)}" for k, v in value.items()]
        return "{" + ",".join(sorted(items)) + "}"
    if isinstance(value, (set, frozenset)):
        return "{" + ",".join(sorted(describe(v, path, found, depth + 1) for v in value)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(describe(v, f"{path}.{i}", found, depth + 1) for i, v in enumerate(value)) + "]"
    inside = {k: v for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("_")}
    whole = dataclasses.is_dataclass(value)
    return kind.__qualname__ + describe(inside, path, found, depth + 1 if whole else max(depth + 1, _DEEPEST - 2))


# What a config says about files, tokens and defaults, not about the computation.
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
    """Return what ``config`` says about the computation."""
    return {name: value for name, value in config.to_dict().items() if name not in _VOLATILE}


def own_code(function: Any) -> Any:
    """Return the function behind partials, bound methods and ``torch.compile``."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, types.MethodType):
            function = function.__func__
        elif "_torchdynamo_orig_callable" in getattr(function, "__dict__", {}):
            function = function._torchdynamo_orig_callable
        else:
            return function


def package_of(function: Any) -> str:
    """Return the top-level package that defines ``function``; for an object, the one that defines its class."""
    function = own_code(function)
    owner = function if hasattr(function, "__code__") or isinstance(function, type) else type(function)
    return str(getattr(function, "__module__", None) or getattr(owner, "__module__", None) or "").split(".")[0]


def describe_code(function: Callable[..., Any]) -> str:
    """Return where a callable comes from; for code of one's own also what it does, so that an edit is noticed.

    Code that it calls is not followed.
    """
    inner = own_code(function)
    name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    if inner is not function and not isinstance(function, types.MethodType):
        name = f"{type(function).__name__} {name}"
    code = getattr(inner, "__code__", None)
    if code is None or package_of(inner) in _RELEASED:
        return name
    defaults = [repr(v) for v in inner.__defaults__ or () if type(v) in PLAIN]
    return f"{name} {_code_digest(code)} {defaults}"


def _code_digest(code: types.CodeType) -> str:
    digest = hashlib.sha256(code.co_code)
    digest.update(repr((code.co_names, code.co_varnames)).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            digest.update(_code_digest(constant).encode())
        elif isinstance(constant, frozenset):
            digest.update(repr(sorted(map(repr, constant))).encode())
        else:
            digest.update(repr(constant).encode())
    return digest.hexdigest()
