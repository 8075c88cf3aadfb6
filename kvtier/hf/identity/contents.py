"""Names and contents of classes, objects and configs, as descriptions of them need."""

from __future__ import annotations

import copyreg
import enum
import functools
import sys
import types
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig

from kvtier.hf.identity.code import Origin, origin_of_class, top_package

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


def class_name(kind: type) -> str:
    """Return a class's module and name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def class_words(kind: type) -> str | None:
    """Return the name of a class, with its package's version if it is installed; None for a class of user code."""
    origin = origin_of_class(kind)
    version = f" {installed_version(top_package(kind.__module__))}" if origin is Origin.INSTALLED else ""
    return None if origin is Origin.OWN else class_name(kind) + version


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


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots included."""
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
    return inside


def reduction(kind: type) -> str:
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
