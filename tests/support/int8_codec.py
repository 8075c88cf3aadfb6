"""A codec that loses bits: one new module, as a user would write it."""

from __future__ import annotations

import math

import numpy as np
import torch

from kvtier.errors import BlockError


class Int8:
    """Each head of each token as 8-bit integers and a scale."""

    name = "int8/1"
    is_lossless = False

    def encoded_nbytes(self, shape, dtype):
        return math.prod(shape[:-1]) * (shape[-1] + 4)

    def encode(self, tensor):
        values = tensor.float().nan_to_num()
        scale = values.abs().amax(-1, keepdim=True) / 127 if values.numel() else values.new_zeros(*values.shape[:-1], 1)
        whole = (values / scale.clamp_min(1e-30)).round().to(torch.int8)
        parts = (scale, whole)
        return np.concatenate([part.contiguous().reshape(-1).view(torch.uint8).numpy() for part in parts])

    def decode(self, payload, shape, dtype):
        if payload.nbytes != self.encoded_nbytes(shape, dtype):
            raise BlockError(
                f"payload has {payload.nbytes} bytes where {shape} takes {self.encoded_nbytes(shape, dtype)}"
            )
        rows = math.prod(shape[:-1])
        scale = torch.from_numpy(payload[: 4 * rows].view(np.float32).reshape(*shape[:-1], 1))
        return (torch.from_numpy(payload[4 * rows :].view(np.int8).reshape(shape)) * scale).to(dtype)
