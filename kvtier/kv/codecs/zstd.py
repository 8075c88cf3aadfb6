"""ExponentZstd: compresses the exponents of K and V, which repeat, and leaves the mantissas, which do not.

Each word is rotated left by one bit, which puts the eight exponent bits of bf16 and fp32 into the top byte. That byte
of all words is one zstd frame. Payload: the frame's length (8 bytes, little-endian), the frame, the other bytes.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import numpy as np
import zstandard

from kvtier.errors import BlockError
from kvtier.kv.codecs.base import Bytes, as_bytes, as_tensor

if TYPE_CHECKING:
    import torch

_LEVEL = 1
_MIN_WINDOW = 8 * 2**20  # accepted by every decompressor; frames of smaller tensors need no more
_WORDS: dict[int, type[np.unsignedinteger]] = {2: np.uint16, 4: np.uint32}


class ExponentZstd:
    """About two thirds of the size for 16-bit floats. Types other than 16- and 32-bit floats are compressed whole."""

    name = "zstd"
    is_lossless = True

    def encoded_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Return None: the size depends on the values."""
        return

    def encode(self, tensor: torch.Tensor) -> Bytes:
        """Return the payload of a tensor."""
        data = as_bytes(tensor.contiguous())
        word = _WORDS.get(tensor.dtype.itemsize)
        if word is None or not tensor.dtype.is_floating_point:
            frame, rest = zstandard.ZstdCompressor(level=_LEVEL).compress(data.tobytes()), b""
        else:
            bits = 8 * tensor.dtype.itemsize
            words = data.view(word)
            rotated = ((words << word(1)) | (words >> word(bits - 1))).view(np.uint8).reshape(-1, tensor.dtype.itemsize)
            frame = zstandard.ZstdCompressor(level=_LEVEL).compress(np.ascontiguousarray(rotated[:, -1]).tobytes())
            rest = np.ascontiguousarray(rotated[:, :-1].T).tobytes()
        return np.frombuffer(struct.pack("<Q", len(frame)) + frame + rest, dtype=np.uint8)

    def decode(self, payload: Bytes, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the tensor of a payload.

        Raises:
            BlockError: the payload does not hold a tensor of this shape and type.
        """
        size = math.prod(shape) * dtype.itemsize
        word = _WORDS.get(dtype.itemsize)
        split = word is not None and dtype.is_floating_point
        plane = size // dtype.itemsize if split else size
        if payload.nbytes < 8:
            raise BlockError("compressed payload is cut short")
        (frame_bytes,) = struct.unpack("<Q", payload[:8].tobytes())
        frame, rest = payload[8 : 8 + frame_bytes], payload[8 + frame_bytes :]
        if len(frame) != frame_bytes or rest.nbytes != size - plane:
            raise BlockError("compressed payload is cut short")
        top = _decompressed(memoryview(frame), plane)
        if word is None or not split:
            return as_tensor(np.frombuffer(bytearray(top), dtype=np.uint8), shape, dtype)
        words = np.frombuffer(top, dtype=np.uint8).astype(word)
        for lower in reversed(rest.reshape(dtype.itemsize - 1, plane)):
            words <<= word(8)
            words |= lower
        lowest_bit = words << word(8 * dtype.itemsize - 1)
        words >>= word(1)
        words |= lowest_bit
        return as_tensor(words.view(np.uint8), shape, dtype)


def _decompressed(frame: memoryview, size: int) -> bytes:
    """Return the ``size`` bytes that ``frame`` holds.

    Raises:
        BlockError: it is no frame, or holds another number of bytes.
    """
    try:
        # The decompressor allocates the size that the frame claims, whatever the limit: even 2 ** 40 bytes.
        claimed = zstandard.get_frame_parameters(frame)
        if claimed.content_size != size:
            raise BlockError(f"compressed payload claims {claimed.content_size} bytes where the tensor has {size}")
        if claimed.window_size > max(size, _MIN_WINDOW):
            raise BlockError(f"compressed payload wants a window of {claimed.window_size} bytes for {size}")
        content: bytes = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BlockError(f"compressed payload cannot be read: {error}") from error
    return content
