"""The header of a safetensors file: names of dtypes, and where the bytes of each tensor begin."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",  # positions, which some indexers keep
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


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
