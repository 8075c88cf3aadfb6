"""Content-hash ids for images, audio, embeddings and custom positions in a block chain."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvtier.store.chain import TokenIds

_ABOVE = 1 << 62
"""Larger than any vocabulary's ids. The lower 62 bits hold a hash; int64 stays positive."""
WHOLE = 5
"""Number of consecutive ids that identify one digest of 256 bits."""


@dataclass(frozen=True, slots=True)
class ContentId:
    """An input that enters a sequence at the ids ``[start, stop)``; ``digest`` is SHA-256 of its whole content.

    ``is_position``: the input is the position of a token, and nothing else.
    """

    start: int
    stop: int
    digest: bytes
    is_position: bool = False

    @property
    def end(self) -> int:
        """Index at which the ids identify the digest: a prefix that ends between ``start`` and here does not."""
        return max(self.stop, self.start + WHOLE)


def marked(ids: TokenIds, marks: Iterable[ContentId], first: int = 0) -> TokenIds:
    """Return ``ids``, which begin at index ``first`` of a sequence, with the ids under ``marks`` replaced.

    An id under marks becomes a hash of itself, of the digests, and of its place in each mark: ``WHOLE`` equal ids in a
    row have equal digests, as surely as SHA-256 has no collisions.
    """
    hashes: dict[int, hashlib._Hash] = {}
    for mark in marks:
        for at in range(max(mark.start, first), min(mark.end, first + len(ids))):
            one = hashes.setdefault(at, hashlib.sha256(int(ids[at - first]).to_bytes(8, "little", signed=True)))
            one.update(mark.digest + (at - mark.start).to_bytes(8, "little"))
    out = ids.copy()
    for at, one in hashes.items():
        out[at - first] = _as_id(one)
    return out


def vector_ids(vectors: torch.Tensor) -> TokenIds:
    """Return an id for each of ``vectors [columns, width]``: 62 bits of a hash of it and of all before it.

    A single equal id proves little. If two sequences share it and the ``WHOLE - 1`` ids after it, they are equal up to
    it.
    """
    running = hashlib.sha256(f"{vectors.dtype} {vectors.shape[1]}".encode())
    out = np.empty(len(vectors), np.int64)
    for at, vector in enumerate(as_bytes(vectors)):
        running.update(vector.tobytes())
        out[at] = _as_id(running)
    return out


def digest_of(*parts: bytes) -> bytes:
    """Return SHA-256 of ``parts``, with the length of each, so that different splits differ."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def digest_tensors(tensors: Sequence[tuple[str, torch.Tensor]]) -> bytes:
    """Return SHA-256 of name, dtype, shape and every byte of ``tensors``, in any order."""
    parts = []
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        body = hashlib.sha256(memoryview(as_bytes(tensor.reshape(1, -1))[0])).digest()
        parts += [f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), body]
    return digest_of(*parts)


def as_bytes(tensor: torch.Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Return the bytes of each row of ``tensor [rows, width]``."""
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous().view(torch.uint8).numpy()


def _as_id(digest: hashlib._Hash) -> int:
    return _ABOVE | (int.from_bytes(digest.digest()[:8], "little") >> 2)
