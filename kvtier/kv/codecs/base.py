"""The seam of codecs: how K and V of one layer become bytes of a file or of a cold page, and K and V again."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from kvtier.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]
_NAME = re.compile(r"[a-z0-9][a-z0-9._/-]{0,39}")


class Codec(Protocol):
    """Encodes tensors one by one. Thread-safe, and without a state that changes.

    A file names its codec, so ``name`` must change whenever ``decode`` reads other bytes. Payloads come from files that
    anybody may have written: ``decode`` takes no more memory than the payload and the tensor have bytes, and
    whatever is wrong with a payload is a ``BlockError``.

    Attributes:
        name: what files call it: up to 40 lower-case letters, digits and ``. _ / -``.
        is_lossless: whether ``decode`` gives back every bit. K and V of a codec that loses some are kept under a root
            of their own, which names the codec.
    """

    name: str
    is_lossless: bool

    def encoded_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
        """Return the size of every payload of such a tensor; None where it depends on what the tensor holds."""

    def encode(self, tensor: torch.Tensor) -> Bytes:
        """Return the payload of a tensor on the host: of K ``[heads, tokens, dim]``, or of V."""

    def decode(self, payload: Bytes, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the tensor of a payload. It may share the payload's memory.

        Raises:
            BlockError: the payload does not hold a tensor of this shape and type.
        """


def as_bytes(tensor: torch.Tensor) -> Bytes:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    import torch  # here and in ``as_tensor``: looking after a store's files needs no tensors, and torch takes a second

    array: Bytes = tensor.reshape(-1).view(torch.uint8).numpy()
    return array


def as_tensor(payload: Bytes, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the CPU tensor whose bytes are ``payload``, which it shares. A tensor without elements shares nothing."""
    import torch

    if not payload.nbytes:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.from_numpy(payload).view(dtype).view(shape)


def is_name(text: str) -> bool:
    """Whether files can call a codec so."""
    return _NAME.fullmatch(text) is not None


def check_codec(codec: Codec, argument: str) -> Codec:
    """Return ``codec``, the value of ``argument``, if files can name it.

    Raises:
        ConfigurationError: it has no name that stands in files, or does not say whether it is lossless.
    """
    name = getattr(codec, "name", None)
    if not isinstance(name, str) or not is_name(name):
        raise ConfigurationError(
            f"{argument}={type(codec).__name__} has the name {name!r:.60}; files need up to 40 lower-case letters, "
            "digits and . _ / -. See kvtier.kv.codecs.base."
        )
    if not isinstance(getattr(codec, "is_lossless", None), bool):
        raise ConfigurationError(f"{argument}={type(codec).__name__} must say is_lossless, True or False.")
    return codec
