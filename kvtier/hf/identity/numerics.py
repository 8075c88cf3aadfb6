"""PyTorch settings that affect the bits of K and V."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

# Attributes of torch.backends; attributes that this version of PyTorch lacks are left out. ``benchmark`` counts too:
# cuDNN then chooses algorithms by measured speed.
_FLAGS = (
    "fp32_precision",
    "cuda.matmul.fp32_precision",
    "cuda.matmul.allow_tf32",
    "cuda.matmul.allow_fp16_accumulation",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_reduced_precision_reduction_split_k",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction_split_k",
    "cudnn.enabled",
    "cudnn.allow_tf32",
    "cudnn.benchmark",
    "cudnn.deterministic",
    "cudnn.depthwise_kernel",
    "cudnn.fp32_precision",
    "cudnn.conv.fp32_precision",
    "cudnn.rnn.fp32_precision",
    "miopen.immediate",
    "mkldnn.enabled",
    "mkldnn.allow_tf32",
    "mkldnn.deterministic",
    "mkldnn.fp32_precision",
    "mkldnn.matmul.fp32_precision",
    "mkldnn.conv.fp32_precision",
    "mkldnn.rnn.fp32_precision",
    "opt_einsum.enabled",
    "opt_einsum.strategy",
)
# Called as functions, by their path in torch.
_CALLS = (
    "get_default_dtype",
    "get_float32_matmul_precision",
    "are_deterministic_algorithms_enabled",
    "backends.cuda.flash_sdp_enabled",
    "backends.cuda.mem_efficient_sdp_enabled",
    "backends.cuda.math_sdp_enabled",
    "backends.cuda.cudnn_sdp_enabled",
    "backends.cuda.fp16_bf16_reduction_math_sdp_allowed",
    "backends.cuda.preferred_blas_library",
    "backends.cuda.preferred_linalg_library",
    "backends.cuda.preferred_rocm_fa_library",
    "backends.mha.get_fastpath_enabled",
    "_C._get_cpu_allow_fp16_reduced_precision_reduction",
    "_C._get_fa3_sdp_enabled",
    "_C._get_nnpack_enabled",
    "_C._get_overrideable_sdp_enabled",
    "_C._get_sdp_priority_order",
    "_C._get_sm_carveout_experimental",
)


@functools.lru_cache(maxsize=1)
def _readers() -> tuple[tuple[str, Callable[[], Any]], ...]:
    """Return how to read each setting that this version of PyTorch has."""
    readers: list[tuple[str, Callable[[], Any]]] = []
    for name in _FLAGS:
        owner, _, last = name.rpartition(".")
        with contextlib.suppress(AttributeError):
            readers.append((name, functools.partial(getattr, _find(torch.backends, owner), last)))
    for name in _CALLS:
        with contextlib.suppress(AttributeError):
            readers.append((name, _find(torch, name)))
    return tuple(readers)


def settings() -> dict[str, str]:
    """Return each of these settings as text, autocast included."""
    found = {name: _read(reader) for name, reader in _readers()}
    for name, value in found.items():
        if name.endswith("fp32_precision") and value == "none":
            found[name] = "ieee"  # "none" was never set; resetting an older setting leaves "ieee" behind
    accelerator = torch.accelerator.current_accelerator()
    kinds = sorted({"cpu", accelerator.type}) if accelerator is not None else ["cpu"]
    found["autocast"] = str([(k, str(torch.get_autocast_dtype(k))) for k in kinds if torch.is_autocast_enabled(k)])
    return {name: value for name, value in found.items() if value}


def _find(owner: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        owner = getattr(owner, name)
    return owner


def _read(read: Callable[[], Any]) -> str:
    try:
        return str(read())
    except AttributeError:
        return ""
    except RuntimeError:
        # Older settings cannot be read where newer settings contradict them; the newer settings are still read.
        return "contradicted"
