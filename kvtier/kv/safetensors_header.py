"""The header of a safetensors file: names of dtypes, and where the bytes of each tensor begin."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",  # positions, which some indexers keep
}
_NAMES = {f"torch.{torch_name}": name for name, torch_name in _TORCH_NAMES.items()}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8}
"""Bytes of one number, by the dtypes that K and V can have."""


def dtype_name(dtype: torch.dtype) -> str | None:
    """Return what files call ``dtype``; None if they cannot hold it."""
    return _NAMES.get(str(dtype))


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype that files call ``name``, one of ``ITEM_BYTES``."""
    import torch  # here, so that headers can be read without it

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype


def encode_header(
    tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str], at_least: int = 0
) -> bytes:
    """Return the header of a file of ``tensors`` without gaps: name, dtype name, shape and bytes of each.

    It is padded to ``at_least`` bytes, so that a header can leave room for numbers that are not known yet.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(at_least - 8)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
