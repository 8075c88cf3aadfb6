"""Model → root: everything besides tokens that must be equal for K and V to be equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy.typing as npt
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvtier.hf.anatomy import Anatomy
from kvtier.hf.description import config_values, describe, describe_code
from kvtier.hf.soundness import Unsound, why_unsound
from kvtier.hf.weights import Unread, digest_weights
from kvtier.store.format import FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class Identity:
    """A root and, in words, what it stands for."""

    root: str
    manifest: Mapping[str, Any]


def identify(model: PreTrainedModel, namespace: str, block_size: int, tokens: npt.ArrayLike = ()) -> Identity | Unsound:
    """Return the identity of ``model`` as it is now, or why its K and V must not be reused.

    Called every turn, so that a training step, an adapter switch or an edited config gives another root. The root
    covers the config; class, forward function and attributes of every module; names, shapes, dtypes and values of all
    tensors (``kvtier.hf.weights`` says which edits between two turns of a process can be missed); active adapters of
    every kind, their scaling, merged and disabled ones; how attention and experts are computed; autocast and the
    precision of matrix products; the minor version of transformers; namespace and block size. It is equal in every
    process and on every device.

    ``tokens`` are no part of it: their rows of embeddings are checked for edits that PyTorch does not count.

    Of code, it covers where functions come from, and what those outside the well-known libraries do; not what they
    call. Private attributes of modules that hold no tensors are not covered.
    """
    anatomy = Anatomy(model)
    unsound = why_unsound(model, anatomy)
    if unsound is not None:
        return unsound
    weights = digest_weights(model, anatomy.tensors, tokens)
    if isinstance(weights, Unread):
        return Unsound(f"the values of {weights.name} cannot be read: {weights.error}")
    manifest: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "model": type(model).__name__,
        "config": config_values(model.config),
        "attention": dict(_implementations(model.config)),
        "modules": hashlib.sha256("\n".join(anatomy.text).encode()).hexdigest(),
        "weights": weights,
        "adapters": _adapters(anatomy),
        "transformers": ".".join(transformers.__version__.split(".")[:2]),
        "autocast": _autocast(),
        "matmul": torch.get_float32_matmul_precision(),
        "namespace": namespace,
        "block_size": block_size,
    }
    text = json.dumps(manifest, sort_keys=True, default=str)
    return Identity(hashlib.sha256(text.encode()).hexdigest(), MappingProxyType(manifest))


def _autocast() -> dict[str, str]:
    """Return the dtype of autocast on each kind of device where it is on."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", accelerator.type} if accelerator is not None else {"cpu"}
    return {kind: str(torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)}


def _implementations(config: PreTrainedConfig, name: str = "") -> Iterable[tuple[str, Any]]:
    """Yield how each config of a model computes attention, masks and experts."""
    attention = getattr(config, "_attn_implementation", None)
    functions = [
        describe_code(registry[attention])
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
        if attention in registry
    ]
    yield name, [attention, *functions, getattr(config, "_experts_implementation", None)]
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _implementations(value, f"{name}.{key}")


def _adapters(anatomy: Anatomy) -> list[str]:
    """Return each combination of active, merged and disabled adapters and scaling (PEFT's attribute names)."""
    found = set()
    for part in anatomy.parts:
        if "_active_adapter" in part.attributes or "_disable_adapters" in part.attributes:
            module: Any = part.module
            state = {
                "active": getattr(module, "_active_adapter", None),
                "scaling": getattr(module, "scaling", None),
                "merged": getattr(module, "merged_adapters", None),
                "disabled": getattr(module, "_disable_adapters", None),
            }
            found.add(f"{type(module).__name__} {describe(state, '', [])}")
    return sorted(found)
