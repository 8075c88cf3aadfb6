"""EncodedPages: cold pages of one layer that went through a codec, in host memory or in a file."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from kvtier.errors import StreamError
from kvtier.kv.codecs import Codec, Raw
from kvtier.kv.codecs.base import Bytes
from kvtier.kv.page import Page, PageView
from kvtier.kv.spec import LayerSpec
from kvtier.offload.accounting import MemoryBudget
from kvtier.offload.storage.page_file import READ_FLAGS, WRITE_FLAGS, transfer_all
from kvtier.offload.storage.spill_folder import SpillFolder
from kvtier.platform.descriptors import OF_THIS_PROCESS

_RAW = Raw()
Fetch = Callable[[], Bytes]
"""Returns a payload again. Raises ``OSError`` where it is gone."""


class Payloads(Protocol):
    """Keeps payloads for as long as it lives. Thread-safe.

    Attributes:
        tier: ``host`` or ``disk``.
    """

    tier: str

    def keep(self, payload: Bytes, raw_nbytes: int) -> Fetch:
        """Keep a copy of ``payload``, which is at most ``raw_nbytes`` long.

        Raises:
            OSError: it cannot be kept.
        """


class HostPayloads:
    """Payloads in host memory. A budget counts their raw size until they are kept, and then their own size."""

    tier = "host"

    def __init__(self, budget: MemoryBudget, raw_nbytes: int) -> None:
        self._budget = budget
        self._counted = raw_nbytes
        self._lock = threading.Lock()
        self._key = key = object()
        budget.set(key, raw_nbytes)
        weakref.finalize(self, budget.set, key, 0).atexit = False

    def keep(self, payload: Bytes, raw_nbytes: int) -> Fetch:
        """Copy it: an encoder may return a view of the page."""
        kept = payload.copy()
        with self._lock:
            self._counted -= raw_nbytes - kept.nbytes
            self._budget.set(self._key, self._counted)
        return lambda: kept


class FilePayloads:
    """Payloads in a file, one after another. The file is deleted with this object; the index is in memory."""

    tier = "disk"

    def __init__(self, folder: SpillFolder) -> None:
        self._end = 0
        self._lock = threading.Lock()
        self.path = path = folder.new_file("pages")
        weakref.finalize(self, folder.forget, path).atexit = False

    def keep(self, payload: Bytes, raw_nbytes: int) -> Fetch:
        """Append it to the file.

        Raises:
            OSError: it cannot be written.
        """
        with self._lock:
            offset, self._end = self._end, self._end + payload.nbytes
        self._transfer(os.pwritev, WRITE_FLAGS, payload, offset)
        return partial(self._fetch, offset, payload.nbytes)

    def _fetch(self, offset: int, nbytes: int) -> Bytes:
        payload = np.empty(nbytes, dtype=np.uint8)
        self._transfer(os.preadv, READ_FLAGS, payload, offset)
        return payload

    def _transfer(
        self, transfer: Callable[[int, list[memoryview], int], int], flags: int, payload: Bytes, offset: int
    ) -> None:
        if not payload.nbytes:
            return
        fd = OF_THIS_PROCESS.open(partial(os.open, self.path, flags, 0o600))
        try:
            transfer_all(transfer, fd, [memoryview(payload)], offset)
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class _Piece:
    """The tokens ``[first, last)`` of one row: the payloads of K and V, and the codecs that decode them."""

    first: int
    last: int
    k: tuple[Codec, Fetch]
    v: tuple[Codec, Fetch]


class EncodedPages:
    """K ``[rows, k_heads, tokens, k_dim]`` and V ``[rows, v_heads, tokens, v_dim]``, each page of a row by itself.

    Written once, piece by piece; read in pieces by any thread. A tensor that the codec would enlarge is kept raw, and
    so are integers where the codec is lossy.
    """

    def __init__(
        self, rows: int, tokens: int, spec: LayerSpec, codec: Codec, page_tokens: int, payloads: Payloads
    ) -> None:
        self.rows, self.tokens, self.spec = rows, tokens, spec
        self.tier = payloads.tier
        self._codec = codec
        self._page_tokens = page_tokens
        self._payloads = payloads
        self._pieces: dict[tuple[int, int], list[_Piece]] = {}  # by row and number of the page
        self._lock = threading.Lock()

    def write(self, first: int, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> None:
        """Encode the tokens from ``first`` on; both tensors are on the host.

        Raises:
            StreamError: they cannot be encoded, the disk is full, or fails.
        """
        for page, begin, end in self._split(first, first + k_bhtd.shape[2]):
            for row in range(self.rows):
                k, v = (each[row, :, begin - first : end - first] for each in (k_bhtd, v_bhtd))
                try:
                    piece = _Piece(begin, end, self._keep(k), self._keep(v))
                except Exception as error:  # of the disk, or of a custom codec
                    raise StreamError(f"cannot keep cold pages with the codec {self._codec.name}: {error}") from error
                with self._lock:
                    self._pieces.setdefault((row, page), []).append(piece)

    def _split(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Return the number of each page in ``[first, last)``, and its tokens."""
        for page in range(first // self._page_tokens, -(-last // self._page_tokens)):
            begin = page * self._page_tokens
            yield page, max(first, begin), min(last, begin + self._page_tokens)

    def _keep(self, tensor_htd: torch.Tensor) -> tuple[Codec, Fetch]:
        codec = self._codec if self._codec.is_lossless or tensor_htd.is_floating_point() else _RAW
        payload = codec.encode(tensor_htd)
        if payload.nbytes > tensor_htd.nbytes:
            codec, payload = _RAW, _RAW.encode(tensor_htd)
        return codec, self._payloads.keep(payload, tensor_htd.nbytes)

    def read(self, row: int, first: int, last: int, view: PageView) -> None:
        """Put the tokens ``[first, last)`` of a row into ``view``, which has their size.

        Raises:
            StreamError: a page is gone, or cannot be decoded.
        """
        g = self.spec
        for page, begin, end in self._split(first, last):
            for piece in self._pieces[row, page]:
                a, b = max(begin, piece.first), min(end, piece.last)
                if a >= b:
                    continue
                tokens = piece.last - piece.first
                try:
                    found = Page(
                        _decoded(*piece.k, (g.k_heads, tokens, g.k_dim), g.dtype),
                        _decoded(*piece.v, (g.v_heads, tokens, g.v_dim), g.values_dtype),
                    )
                except Exception as error:  # of the disk, or of a custom codec
                    raise StreamError(
                        f"cannot read cold pages with the codec {self._codec.name}: {error}; their K and V are lost"
                    ) from error
                view.cut(a - first, b - first).take(found, a - piece.first, b - piece.first)


def _decoded(codec: Codec, fetch: Fetch, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    tensor = codec.decode(fetch(), shape, dtype)
    if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
        raise ValueError(f"{tuple(tensor.shape)} of {tensor.dtype} came back where {shape} of {dtype} was encoded")
    return tensor.contiguous()
