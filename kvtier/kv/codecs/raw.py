"""Raw: bytes as they are. Blocks in this codec are read directly into their destination."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvtier.errors import BlockError
from kvtier.kv.codecs.base import Bytes, as_bytes, as_tensor

if TYPE_CHECKING:
    import torch


class Raw:
    """The bytes of a tensor as they are."""

    name = "raw"
    is_lossless = True

    def encoded_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Return the size of the tensor."""
        return math.prod(shape) * dtype.itemsize

    def encode(self, tensor: torch.Tensor) -> Bytes:
        """Return the bytes of a tensor, without a copy where it is contiguous."""
        return as_bytes(tensor.contiguous())

    def decode(self, payload: Bytes, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the tensor, which shares the payload's memory.

        Raises:
            BlockError: the payload has another size.
        """
        size = self.encoded_nbytes(shape, dtype)
        if payload.nbytes != size:
            raise BlockError(f"payload has {payload.nbytes} bytes where {shape} of {dtype} takes {size}")
        return as_tensor(payload, shape, dtype)
