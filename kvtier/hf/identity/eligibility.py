"""Eligibility of a model: why K and V that it computes now must not be reused."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from kvtier.hf.identity.attribute_reads import reads_of_class
from kvtier.hf.identity.code import Origin, behind, closed_over, origin_of_class, package_of
from kvtier.hf.identity.contents import NOT_FORWARD
from kvtier.hf.identity.module_walk import ModelWalk, ModuleInfo
from kvtier.hf.identity.trusted_hooks import NO_HOOKS, TrustedHooks, qualified_name
from kvtier.hf.not_reusable import NotReusable

# Hooks and patches of these packages move weights and record outputs; torch's own compute weights from parameters.
_TRUSTED = frozenset({"transformers", "accelerate", "kvtier"})
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_TRUSTED_MODULES = ("torch.nn.utils.", "torch.utils.")
# Reuse would gain little: the decoder's prompt is a few tokens, and the encoder runs in every call.
ENCODER_DECODER = "encoder-decoder models are not reused: K and V depend on the encoder's input too"


def why_unsound(model: torch.nn.Module, walk: ModelWalk, hooks: TrustedHooks = NO_HOOKS) -> NotReusable | None:
    """Return why ``model``, as it is now, computes K and V that must not be reused; None when they may be.

    ``hooks`` leave K and V as they are.
    """
    for reason in _reasons(model, walk, hooks):
        return NotReusable(reason, lasts=True)
    return None


def used_hooks(walk: ModelWalk, hooks: TrustedHooks) -> list[str]:
    """Return the qualified names of those of ``hooks`` that the model has, and that would turn reuse off otherwise."""
    if not hooks.given:
        return []
    everywhere = torch.nn.modules.module
    registered = [everywhere._global_forward_pre_hooks, everywhere._global_forward_hooks]
    registered += [part.attributes[key] for part in walk.examined for key in _HOOKS]
    found = [hook for each in registered for hook in list(each.values()) if not _trusted(hook)]
    found += [hook for part in walk.examined for hook in _hooks_of_accelerate(part) if not _is_accelerates(hook)]
    return sorted({qualified_name(hook) for hook in found if hooks.cover(hook)})


def _reasons(model: torch.nn.Module, walk: ModelWalk, trusted: TrustedHooks) -> Iterable[str]:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        yield ENCODER_DECODER
    processes = max(walk.processes, getattr(model, "_tp_size", None) or 1)
    if processes > 1:  # processes that reuse different tokens feed different shapes, and all wait forever
        yield f"the weights are spread over {processes} processes, which would have to agree on what they reuse"
    for name in walk.unreadable:
        yield f"the values of {name} cannot be read"
    prompt_learning = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    if prompt_learning and not getattr(model, "_adapters_disabled", False):
        yield "prompt learning feeds virtual tokens that no prompt names"
    everywhere = torch.nn.modules.module
    yield from _hooks("all modules", trusted, everywhere._global_forward_pre_hooks, everywhere._global_forward_hooks)
    for part in walk.examined:
        if part.module.training and _minds_training(type(part.module)):
            yield f"{_called(part)} is in training mode (call model.eval())"
        hooks = [part.attributes[key] for key in _HOOKS]
        if any(hooks):
            yield from _hooks(_called(part), trusted, *hooks)
        for hook in _hooks_of_accelerate(part):
            if not _is_accelerates(hook) and not trusted.cover(hook):
                yield _may_change(hook, _called(part))
        if "rope_type" in part.attributes:
            yield from _lengths(part.attributes["rope_type"])
        is_8_bit = type(part.module).__module__.startswith("bitsandbytes.")
        if is_8_bit and getattr(getattr(part.module, "state", None), "threshold", False):
            # It computes a column differently if any fed token is large in it.
            yield f"in 8 bits, {_called(part)} computes each token with regard to the tokens that are fed with it"
    yield from _patches(walk)
    yield from _config_reasons(getattr(model, "config", None))


def _called(part: ModuleInfo) -> str:
    return part.name or "the model"


def _minds_training(kind: type) -> bool:
    """Whether a module class may compute differently in training mode; assumed of code that is not released."""
    if origin_of_class(kind) is not Origin.RELEASED:
        return True
    reads = reads_of_class(kind)
    return reads.unknown or "training" in reads.names


def _trusted(function: Any) -> bool:
    """Whether a hook or method, and all code bound into it, comes from trusted packages."""
    return all(package_of(part) in _TRUSTED or _computes_weights(part) for part in _handed(function, set()))


def _computes_weights(part: Any) -> bool:
    part = behind(part)
    kind = part if isinstance(part, type) else type(part)
    module = part.__globals__.get("__name__") if isinstance(part, types.FunctionType) else kind.__module__
    return str(module).startswith(_TRUSTED_MODULES) and package_of(part) == "torch"


def _handed(function: Any, seen: set[int]) -> Iterable[Any]:
    """Yield a callable and the callables that it holds: bound objects, arguments, closure variables."""
    if id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, torch.nn.Module):  # examined by itself
        return
    inside: list[Any] = []
    if isinstance(function, types.MethodType):
        inside = [function.__func__, function.__self__]
    elif isinstance(function, functools.partial):
        inside = [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, types.FunctionType):
        yield function
        inside = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        inside += closed_over(function)
    elif callable(function):
        yield function
    for part in inside:
        if callable(part) and not (isinstance(part, type) and package_of(part)):
            yield from _handed(part, seen)


def _hook_name(hook: Any) -> str:
    hook = behind(hook)
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _hooks(where: str, trusted: TrustedHooks, *hooks: Mapping[int, Any]) -> Iterable[str]:
    for registered in hooks:
        for hook in list(registered.values()):  # another thread's turn may add hooks
            if not _trusted(hook) and not trusted.cover(hook):
                yield _may_change(hook, where)


def _may_change(hook: Any, where: str) -> str:
    name = qualified_name(hook)
    return f'the hook {name} on {where} may change K and V; if it does not: TieredCache(trusted_hooks=["{name}"])'


def _hooks_of_accelerate(part: ModuleInfo) -> Sequence[Any]:
    hook = part.attributes.get("_hf_hook")
    return () if hook is None else getattr(hook, "hooks", (hook,))


def _is_accelerates(hook: Any) -> bool:
    """Whether an object of accelerate, and all functions that were set on it, come from trusted packages."""
    methods = [value for value in vars(hook).values() if isinstance(value, types.FunctionType | types.MethodType)]
    return package_of(type(hook)) in _TRUSTED and all(map(_trusted, methods))


def _patches(walk: ModelWalk) -> Iterable[str]:
    """Find methods that were replaced on single modules."""
    for part, key, value in walk.callables:
        method = "forward" if key == "_old_forward" else key  # accelerate's name for the wrapped method
        own = getattr(type(part.module), method, None)
        if not callable(own) or method in NOT_FORWARD:
            continue
        if behind(value) is not behind(own) and not _trusted(value) and not _calls_compiled(part, method):
            yield f"{method} of {_called(part)} was replaced by {_hook_name(value)}, which may change K and V"


def _calls_compiled(part: ModuleInfo, method: str) -> bool:
    """Whether ``method`` is that of a ``torch.compile`` wrapper, whose wrapped module is examined by itself."""
    made_by = type(part.module).__module__
    return method == "forward" and made_by.startswith("torch._dynamo.") and "_orig_mod" in part.attributes["_modules"]


def _lengths(rope_type: Any) -> Iterable[str]:
    for kind in rope_type.values() if isinstance(rope_type, Mapping) else (rope_type,):
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            yield f"rotary positions of type {kind} depend on the length of the sequence"


def _config_reasons(config: Any) -> Iterable[str]:
    """Find reasons in a config, in the current form and in older forms that remote code still uses."""
    if not isinstance(config, PreTrainedConfig):
        return
    for parameters in (getattr(config, "rope_parameters", None), vars(config).get("rope_scaling")):
        if isinstance(parameters, Mapping):
            for one in (parameters, *(v for v in parameters.values() if isinstance(v, Mapping))):
                yield from _lengths(one.get("rope_type", one.get("type")))
    if getattr(config, "use_dynamic_ntk", False):
        yield from _lengths("dynamic")
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        yield "attention looks at later tokens too, so that K and V of a token depend on what comes after it"
    for value in vars(config).values():
        yield from _config_reasons(value)
