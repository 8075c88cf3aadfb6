"""Model → root: everything besides tokens that must be equal for K and V to be equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from kvtier.store.format import FORMAT_VERSION

# Tensors up to this many elements are hashed whole; of larger ones, this many evenly spaced elements.
SAMPLED_ELEMENTS = 256
# What a config says about files and defaults, not about the computation.
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "use_cache", "pad_token_id", "bos_token_id"})


@dataclass(frozen=True, slots=True)
class Identity:
    """A root and, in words, what it stands for."""

    root: str
    manifest: Mapping[str, Any]


def identify(model: PreTrainedModel, namespace: str, block_size: int) -> Identity:
    """Return the identity of ``model`` as it is now.

    Recomputed every turn, so that a training step or an adapter switch gives another root. Weights are *sampled*: an
    edit that touches none of the sampled elements is not noticed.
    """
    config = model.config.to_dict()
    for name in _VOLATILE:
        config.pop(name, None)
    manifest: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "model": type(model).__name__,
        "config": config,
        "attention": getattr(model.config, "_attn_implementation", None),
        "weights": fingerprint(model),
        "adapters": list(_adapters(model)),
        "transformers": ".".join(transformers.__version__.split(".")[:2]),
        "autocast": _autocast(model.device.type),
        "namespace": namespace,
        "block_size": block_size,
    }
    text = json.dumps(manifest, sort_keys=True, default=str)
    return Identity(hashlib.sha256(text.encode()).hexdigest(), MappingProxyType(manifest))


def _autocast(device_type: str) -> str | None:
    return str(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else None


def fingerprint(model: torch.nn.Module) -> str:
    """Return SHA-256 over names, shapes, dtypes and sampled values of all parameters and buffers, as hex."""
    digest = hashlib.sha256()
    samples: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for name, tensor in _tensors(model):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        if tensor.device.type == "meta" or tensor.layout != torch.strided or tensor.numel() == 0:
            continue
        samples.setdefault((tensor.device, tensor.dtype), []).append(_sample(tensor.detach()))
    for group in samples.values():
        digest.update(torch.cat(group).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _tensors(model: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
    step = max(1, flat.numel() // SAMPLED_ELEMENTS)
    return flat[::step]


def _adapters(model: torch.nn.Module) -> Iterable[Any]:
    """Yield name, active adapters, scaling and merge state of every adapted layer (PEFT's own attribute names)."""
    for name, module in model.named_modules():
        if not hasattr(module, "active_adapters") or not hasattr(module, "scaling"):
            continue
        active = module.active_adapters() if callable(module.active_adapters) else module.active_adapters
        yield [
            name,
            list(active),
            {key: str(value) for key, value in dict(module.scaling).items()},
            bool(getattr(module, "disable_adapters", False)),
            list(getattr(module, "merged_adapters", ())),
        ]
