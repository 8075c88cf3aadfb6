"""What a model is made of: one walk over its modules, that soundness and identity both read."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from kvtier.hf.description import PLAIN, Found, describe, describe_code

# Attributes that every module has, and bookkeeping that no forward pass reads.
_SKIPPED = frozenset(vars(torch.nn.Module())) | {
    "_hf_hook",  # accelerate's: soundness judges it
    "_is_hf_initialized",
    "all_tied_weights_keys",
    "generation_config",
    "gradient_checkpointing",
    "hf_device_map",
    "loss_type",
    "name_or_path",
    "peft_config",  # what it decides is in the tuner layers
    "rope_deltas",  # of the last prompt: a turn counts its positions itself, or forgets them
    "warnings_issued",
}
# Private attributes that decide what a tuner layer computes.
_TUNER = frozenset({"_active_adapter", "_disable_adapters"})
_WHOLE = (torch.Tensor, torch.nn.Parameter)


class Part(NamedTuple):
    """A module of the model."""

    name: str
    module: torch.nn.Module
    attributes: dict[str, Any]
    """The live ``vars(module)``."""


class Anatomy:
    """A model's modules, tensors and attributes as they are at this moment.

    Attributes:
        parts: every module once, the model first. Modules that are hidden in lists and dicts are found too.
        tensors: parameters, buffers and tensors in plain attributes by name; of tensor subclasses that say how they
            are built, the tensors inside; of offloaded parameters, the tensor in memory.
        unreadable: what holds values that cannot be read.
        processes: how many hold a part of one tensor each, at most; 1 where all tensors are whole.
        callables: what was set on single modules and can be called: module, attribute, value.
        text: class, forward function and attributes of every module, line by line, without tensors' values.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.parts: list[Part] = []
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.unreadable: list[str] = []
        self.processes = 1
        self.callables: list[tuple[Part, str, Any]] = []
        self.text: list[str] = []
        self._configs: dict[int, str] = {}
        self._classes: dict[type, str] = {}
        self._note_configs(getattr(model, "config", None), "config")
        self._walk(model)

    def _note_configs(self, config: Any, name: str) -> None:
        """Name the model's config and the configs inside it: the manifest says what is in them."""
        if not isinstance(config, PreTrainedConfig) or id(config) in self._configs:
            return
        self._configs[id(config)] = name
        for key, value in vars(config).items():
            if isinstance(value, PreTrainedConfig):
                self._note_configs(value, f"{name}.{key}")

    def _walk(self, model: torch.nn.Module) -> None:
        seen = set()
        waiting: list[tuple[str, torch.nn.Module, _Offloaded | None]] = [("", model, None)]
        while waiting:
            name, module, offloaded = waiting.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            attributes = vars(module)
            part = Part(name, module, attributes)
            self.parts.append(part)
            dot = f"{name}." if name else ""
            if "_hf_hook" in attributes:
                offloaded = _offloaded(attributes["_hf_hook"], dot) or offloaded
            compiled = " compiled" if attributes.get("_compiled_call_impl") is not None else ""  # by module.compile()
            self.text.append(f"{name}: {self._class_words(type(module))}{compiled}")
            for tensors in (attributes["_parameters"], attributes["_buffers"]):
                if tensors:
                    for key, tensor in tensors.items():
                        if tensor is not None:
                            self._add_tensor(dot + key, tensor, offloaded)
            if attributes["_modules"]:
                for key, child in attributes["_modules"].items():
                    if child is not None:
                        waiting.append((dot + key, child, offloaded))
            keys = _read_keys(tuple(attributes))
            if keys:
                for child_name, child in self._read_attributes(part, keys, dot):
                    waiting.append((child_name, child, offloaded))

    def _class_words(self, kind: type) -> str:
        if kind not in self._classes:
            self._classes[kind] = f"{kind.__module__}.{kind.__qualname__} {describe_code(kind.forward)}"  # type: ignore[attr-defined]
        return self._classes[kind]

    def _read_attributes(self, part: Part, keys: tuple[str, ...], dot: str) -> Iterable[tuple[str, torch.nn.Module]]:
        """Note what was set on a module besides tensors and children; return the modules found there."""
        modules: list[tuple[str, torch.nn.Module]] = []
        attributes, text = part.attributes, self.text
        for key in keys:
            value = attributes[key]
            if type(value) in PLAIN:
                if key[0] != "_" or (key in _TUNER and value is not False):  # False is what the class says
                    text.append(f"{key}={value!r}")
                continue
            if id(value) in self._configs:
                text.append(f"{key}={self._configs[id(value)]}")
                continue
            found: Found = []
            words = describe(value, dot + key, found)
            if key[0] != "_" or key in _TUNER:
                text.append(f"{key}={words}")
            if callable(value):
                self.callables.append((part, key, value))
            for path, inner in found:
                if isinstance(inner, torch.Tensor):
                    self._add_tensor(path, inner, None)
                elif isinstance(inner, torch.nn.Module):
                    modules.append((path, inner))
                elif isinstance(inner, torch.ScriptObject):
                    self.unreadable.append(path)
        return modules

    def _add_tensor(self, name: str, tensor: torch.Tensor, offloaded: _Offloaded | None) -> None:
        if tensor.is_meta:
            held = offloaded.find(name) if offloaded is not None else None
            if held is None or held.is_meta:
                self.unreadable.append(name)
                return
            tensor = held
        if type(tensor) in _WHOLE:
            self.tensors.append((name, tensor))
        elif hasattr(tensor, "__tensor_flatten__"):
            keys, context = tensor.__tensor_flatten__()
            self.text.append(f"{name}: {type(tensor).__qualname__} {describe(context, name, [])}")
            for key in keys:
                part = getattr(tensor, key)
                if isinstance(part, torch.Tensor):
                    self._add_tensor(f"{name}.{key}", part, None)
            if hasattr(tensor, "device_mesh"):
                self._note_mesh(name, tensor)
        else:
            found: Found = []
            self.text.append(f"{name}: {type(tensor).__qualname__} {describe(vars(tensor), name, found)}")
            self.tensors.append((name, tensor))
            self.tensors.extend((path, inner) for path, inner in found if isinstance(inner, torch.Tensor))

    def _note_mesh(self, name: str, tensor: Any) -> None:
        """Note which part of a distributed tensor this process holds."""
        mesh = tensor.device_mesh
        self.processes = max(self.processes, int(mesh.size()))
        self.text.append(f"{name}: {tensor.placements} of {tuple(mesh.shape)} at {mesh.get_coordinate()}")


@functools.lru_cache(maxsize=4096)
def _read_keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Return the attributes to read of a module that has ``keys``; most modules of a model have the same few sets."""
    return tuple(key for key in keys if key not in _SKIPPED)


class _Offloaded(NamedTuple):
    """Where accelerate keeps parameters that are on the meta device between forward passes."""

    weights: Any
    prefix: str

    def find(self, name: str) -> torch.Tensor | None:
        """Return the tensor behind a meta parameter; None when it is not in memory."""
        weights, key = self.weights, name.removeprefix(self.prefix)
        while hasattr(weights, "prefix") and hasattr(weights, "dataset"):
            weights, key = weights.dataset, weights.prefix + key
        weights = getattr(weights, "state_dict", weights)  # its rest is files, which no turn can compare
        tensor = weights.get(key) if isinstance(weights, Mapping) else None
        return tensor if isinstance(tensor, torch.Tensor) else None


def _offloaded(hook: Any, prefix: str) -> _Offloaded | None:
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "weights_map", None) is not None:
            return _Offloaded(one.weights_map, prefix)
    return None
