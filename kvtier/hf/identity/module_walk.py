"""ModelWalk: one walk over the modules of a model, for eligibility and fingerprint."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvtier.hf.identity.attribute_reads import ReadsOfModel
from kvtier.hf.identity.code import Origin, origin_of_class, package_of
from kvtier.hf.identity.contents import class_name
from kvtier.hf.identity.patches import describe_patches
from kvtier.hf.identity.stable_repr import PLAIN, Describer, Found

# Attributes that every module has, and bookkeeping that no forward pass reads.
_SKIPPED = frozenset(vars(torch.nn.Module())) | {
    "_hf_hook",  # accelerate's, which eligibility judges
    "_is_hf_initialized",
    "_output_capturing_hooks_installed",  # transformers' hooks, which eligibility judges
    "all_tied_weights_keys",
    "dynamo_ctx",  # how torch.compile made the module
    "generation_config",
    "gradient_checkpointing",
    "hf_device_map",
    "hf_quantizer",  # how weights were loaded
    "loss_type",
    "name_or_path",
    "peft_config",  # its effect is in the tuner layers
    "rope_deltas",  # of the last prompt: a turn counts its positions itself, or forgets them
    "warnings_issued",
}
_SPECIAL = frozenset({"_hf_hook", "_compiled_call_impl", "rope_type"})
_WHOLE = (torch.Tensor, torch.nn.Parameter)


class ModuleInfo(NamedTuple):
    """A module of the model."""

    name: str
    module: torch.nn.Module
    attributes: dict[str, Any]
    """The live ``vars(module)``."""


class _Line(NamedTuple):
    """Description of a module in the last turn, and the values that it describes, to compare by identity."""

    name: str
    number: int
    """Number of the class among the model's classes."""
    kind: type
    keys: tuple[str, ...]
    values: tuple[Any, ...]
    words: str
    rest: tuple[str, ...]
    """Attributes to read in every turn."""
    plain: Callable[[dict[str, Any]], tuple[Any, ...]]
    """Returns the current attribute values to compare with ``values``."""
    is_special: bool
    """Whether eligibility must examine the module in any case."""
    inherited: tuple[str, ...]
    """Attributes that hold the class's value, and are left out of the description."""


class _Last(NamedTuple):
    """The last walk over a model: the names of its configs, and its lines."""

    configs: dict[int, str]
    kept: list[PreTrainedConfig]
    """Keeps the ids of configs from being reused."""
    lines: list[_Line]
    reads: ReadsOfModel


_last: weakref.WeakKeyDictionary[torch.nn.Module, _Last] = weakref.WeakKeyDictionary()


class ModelWalk:
    """A model's modules, tensors and attributes as they are at this moment.

    Plain attributes that no code of the model names cannot affect K and V. They are left out, with their content. So
    are attributes about how the model was loaded.

    Attributes:
        parts: every module once, the model first. Modules that are hidden in lists and dicts are found too.
        examined: modules that are in training mode, have hooks, or may depend on the length of a sequence.
        tensors: parameters, buffers and tensors in attributes, by name. A tensor subclass that can be flattened is
            replaced by its inner tensors, an offloaded parameter by the tensor in memory.
        unreadable: names of tensors, modules and objects whose values cannot be read.
        processes: the most processes that one tensor is spread over; 1 if all tensors are whole.
        attention: attention and expert implementation of each config, by the config's name.
        callables: callables set on single modules: module, attribute, value.
        text: class, code and attributes of every module, line by line, without tensors' values.

    Raises:
        Undescribable: an attribute that code reads has no stable description.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.parts: list[ModuleInfo] = []
        self.examined: list[ModuleInfo] = []
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.unreadable: list[str] = []
        self.processes = 1
        self.callables: list[tuple[ModuleInfo, str, Any]] = []
        self.text: list[str] = []
        self._found: Found = []
        self.describer = Describer(self._found)
        configs = list(_configs(getattr(model, "config", None), ""))
        self._configs: dict[int, str] = {}
        """Names of the model's config and of the configs inside it, whose values the manifest holds."""
        for name, config in configs:
            self._configs.setdefault(id(config), f"config{name}")
        self._kinds: dict[type, int] = {}
        self._scripts: set[type] = set()
        self._unread: list[tuple[ModuleInfo, str]] = []
        self._lines: list[_Line] = []
        last = _last.get(model)
        self._reads = ReadsOfModel(last.reads if last is not None else None)
        self._before = last.lines if last is not None and last.configs == self._configs else []
        self._seen: set[int] = set()
        self._waiting: list[tuple[str, torch.nn.Module, _Offloaded | None]] = [("", model, None)]
        self._described: set[type] = set()
        self.attention = {name: self._implementations(config, name) for name, config in configs}
        self._walk()
        while self._look_again():
            self._walk()
        _last[model] = _Last(self._configs, [config for _, config in configs], self._lines, self._reads)

    def _walk(self) -> None:
        seen, waiting, numbers, before, text = self._seen, self._waiting, self._kinds, self._before, self.text
        parts, lines, tensors = self.parts, self._lines, self.tensors
        scripts = self._scripts
        index = len(lines)
        while waiting:
            name, module, offloaded = waiting.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            attributes, kind = vars(module), type(module)
            number = numbers.get(kind)
            if number is None:
                number = numbers[kind] = len(numbers)
                self._reads.add(kind)
                if issubclass(kind, torch.jit.ScriptModule):
                    scripts.add(kind)
            if kind in scripts:
                self.unreadable.append(f"{name or 'the model'} (compiled by torch.jit)")
                continue
            line = before[index] if index < len(before) else None
            if (
                line is None
                or line.name != name
                or line.kind is not kind
                or line.number != number
                or line.keys != tuple(attributes)
                or not all(map(is_, line.values, line.plain(attributes)))
                or (line.inherited and not all(_value_of_class(kind, k) is attributes[k] for k in line.inherited))
            ):
                line = self._describe_plain(name, number, kind, attributes)
            lines.append(line)
            index += 1
            text.append(line.words)
            part = ModuleInfo(name, module, attributes)
            parts.append(part)
            dot = f"{name}." if name else ""
            if line.is_special:
                if "_hf_hook" in attributes:
                    offloaded = _offloaded(attributes["_hf_hook"], dot) or offloaded
                self.examined.append(part)
            elif attributes.get("training") or attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
                self.examined.append(part)
            for held in (attributes["_parameters"], attributes["_buffers"]):
                if held:
                    for key, tensor in held.items():
                        if type(tensor) in _WHOLE and not tensor.is_meta:
                            tensors.append((dot + key, tensor))
                        elif tensor is not None:
                            self._add_tensor(dot + key, tensor, offloaded)
            if line.rest:
                for key in line.rest:
                    self._read(part, key, dot, offloaded)
            children = attributes["_modules"]
            if children:
                waiting += [(dot + key, child, offloaded) for key, child in children.items() if child is not None]

    def _describe_plain(self, name: str, number: int, kind: type, attributes: dict[str, Any]) -> _Line:
        """Describe the attributes of a module that no edit can change in place."""
        plain, rest, words = [], [], [f"{name}: {number}"]
        inherited = []
        for key, value in attributes.items():
            if key in _SKIPPED:
                continue
            if kind.__module__.startswith("torch._dynamo.") and key != "forward":
                continue  # how torch.compile wrapped a module that is examined by itself
            is_plain = type(value) in PLAIN or id(value) in self._configs
            if is_plain and _value_of_class(kind, key) is value:
                plain.append(key)  # a disabled and re-enabled adapter holds its class's value, as before
                inherited.append(key)
            elif is_plain and self._is_read(kind, key):
                plain.append(key)
                words.append(f"{key}={self._configs.get(id(value)) or repr(value)}")
            else:
                rest.append(key)
        get = itemgetter(*plain, "_modules", "_modules")  # two extra names, so that it always returns a tuple
        values = tuple(attributes[key] for key in plain)
        special = not _SPECIAL.isdisjoint(attributes) or kind.__module__.startswith("bitsandbytes.")
        keys = tuple(attributes)
        return _Line(name, number, kind, keys, values, " ".join(words), tuple(rest), get, special, tuple(inherited))

    def _is_read(self, kind: type, key: str) -> bool:
        """Whether the code of a module's own class, or of other classes known by now, may read an attribute."""
        if origin_of_class(kind) is not Origin.RELEASED:
            return True
        return self._reads.may_read(key) or self.describer.met.may_read(key)

    def _read(self, part: ModuleInfo, key: str, dot: str, offloaded: _Offloaded | None) -> None:
        """Describe an attribute that is no tensor, child or plain value; postpone it while no known code reads it."""
        value = part.attributes[key]
        is_method = callable(value) and (key == "_old_forward" or hasattr(type(part.module), key))
        if not is_method and not self._is_read(type(part.module), key):
            self._unread.append((part, key))
            return
        if callable(value):
            self.callables.append((part, key, value))
        start = len(self._found)
        self.text.append(f"{dot}{key}={self.describer.describe(value, dot + key)}")
        self._add_found(start, offloaded)

    def _add_found(self, start: int, offloaded: _Offloaded | None) -> None:
        """Add the tensors, modules and script objects that were found inside values since ``start``."""
        for path, inner in self._found[start:]:
            if isinstance(inner, torch.Tensor):
                self._add_tensor(path, inner, None)
            elif isinstance(inner, torch.nn.Module):
                self._waiting.append((path, inner, offloaded))
            else:
                self.unreadable.append(path)

    def _look_again(self) -> bool:
        """Describe the code of new classes, then the attributes that it reads; return whether anything was added."""
        start = len(self._found)
        for part in self.examined:
            self._describe_hooks(part)
        while new := {*self._kinds, *self.describer.classes} - self._described:
            self._described |= new
            own = [kind for kind in self._kinds if kind in new and origin_of_class(kind) is not Origin.RELEASED]
            self.text += [f"{class_name(kind)}: {self.describer.describe(kind, class_name(kind))}" for kind in own]
            self.text += describe_patches(new, self.describer.met.modules, self.describer)
        unread, self._unread = self._unread, []
        before = len(self.text)
        for part, key in unread:
            self._read(part, key, f"{part.name}." if part.name else "", None)
        self._add_found(start, None)
        return bool(self._waiting) or len(self.text) > before

    def _describe_hooks(self, part: ModuleInfo) -> None:
        """Describe PyTorch's own hooks, which compute weights; eligibility judges the other hooks."""
        for hooks in (part.attributes["_forward_pre_hooks"], part.attributes["_forward_hooks"]):
            for hook in list(hooks.values()):  # another thread's turn may add hooks
                if package_of(hook) == "torch":
                    self.text.append(f"{part.name}: {self.describer.describe(hook, part.name)}")

    def _implementations(self, config: PreTrainedConfig, name: str) -> list[Any]:
        """Return the attention and expert implementation of a config; describe the attention functions."""
        attention = getattr(config, "_attn_implementation", None)
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            if attention in registry:
                self.text.append(f"{name}: {self.describer.describe(registry[attention], f'{attention} attention')}")
        return [attention, getattr(config, "_experts_implementation", None)]

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
            self.text.append(f"{name}: {type(tensor).__qualname__} {self.describer.describe(context, name)}")
            for key in keys:
                part = getattr(tensor, key)
                if isinstance(part, torch.Tensor):
                    self._add_tensor(f"{name}.{key}", part, None)
            if hasattr(tensor, "device_mesh"):
                self._note_mesh(name, tensor)
        else:
            start = len(self._found)
            self.text.append(f"{name}: {type(tensor).__qualname__} {self.describer.describe(vars(tensor), name)}")
            self.tensors.append((name, tensor))
            inside = self._found[start:]
            self.tensors.extend((path, inner) for path, inner in inside if isinstance(inner, torch.Tensor))

    def _note_mesh(self, name: str, tensor: Any) -> None:
        """Note which part of a distributed tensor this process holds."""
        mesh = tensor.device_mesh
        self.processes = max(self.processes, int(mesh.size()))
        self.text.append(f"{name}: {tensor.placements} of {tuple(mesh.shape)} at {mesh.get_coordinate()}")


def _configs(config: Any, name: str) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield a model's config and the configs inside it, each with the path to it."""
    if isinstance(config, PreTrainedConfig):
        yield name, config
        for key, value in vars(config).items():
            if isinstance(value, PreTrainedConfig):
                yield from _configs(value, f"{name}.{key}")


_NOTHING = object()


def _value_of_class(kind: type, key: str) -> Any:
    """Return the class attribute that an instance sees where it has no attribute ``key`` of its own."""
    return next((vars(base)[key] for base in kind.__mro__ if key in vars(base)), _NOTHING)


class _Offloaded(NamedTuple):
    """Accelerate's storage for parameters that are on the meta device between forward passes."""

    weights: Any
    prefix: str

    def find(self, name: str) -> torch.Tensor | None:
        """Return the tensor behind a meta parameter; None when it is not in memory."""
        weights, key = self.weights, name.removeprefix(self.prefix)
        while hasattr(weights, "prefix") and hasattr(weights, "dataset"):
            weights, key = weights.dataset, weights.prefix + key
        weights = getattr(weights, "state_dict", weights)  # the rest is in files, which a turn cannot compare
        tensor = weights.get(key) if isinstance(weights, Mapping) else None
        return tensor if isinstance(tensor, torch.Tensor) else None


def _offloaded(hook: Any, prefix: str) -> _Offloaded | None:
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "weights_map", None) is not None:
            return _Offloaded(one.weights_map, prefix)
    return None
