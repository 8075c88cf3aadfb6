"""Pages: K and V of one layer on the host, and views that pages are copied into."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvtier.kv.allocation import new_buffer
from kvtier.kv.spec import LayerSpec

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """K and V of one layer for the tokens of one block, on the host: ``[heads, tokens, dim]`` each."""

    k_htd: torch.Tensor
    v_htd: torch.Tensor

    @classmethod
    def empty(cls, tokens: int) -> Page:
        """Return the page of a layer that has nothing for ``tokens`` tokens."""
        import torch  # here and below: looking after a store's files needs no tensors, and torch takes a second

        nothing = torch.empty(0, tokens, 0, dtype=torch.float32, device="cpu")
        return cls(nothing, nothing)

    @classmethod
    def like(cls, spec: LayerSpec, tokens: int) -> Page:
        """Return a page without values for ``tokens`` tokens of a layer of ``spec``."""
        return cls(
            new_buffer(spec.k_heads, tokens, spec.k_dim, dtype=spec.dtype),
            new_buffer(spec.v_heads, tokens, spec.v_dim, dtype=spec.values_dtype),
        )

    def put(self, first: int, page: Page) -> None:
        """Copy ``page`` to the tokens from ``first`` on."""
        tokens = slice(first, first + page.k_htd.shape[1])
        self.k_htd[:, tokens], self.v_htd[:, tokens] = page.k_htd, page.v_htd

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return self.k_htd.nbytes + self.v_htd.nbytes

    @property
    def spec(self) -> LayerSpec:
        """The spec of its layer."""
        k, v = self.k_htd, self.v_htd
        return _spec_of(k.shape, k.dtype, v.shape, v.dtype)


@functools.lru_cache(maxsize=64)  # a block has a page for each layer, and nearly all are alike
def _spec_of(k_htd: torch.Size, k_dtype: torch.dtype, v_htd: torch.Size, v_dtype: torch.dtype) -> LayerSpec:
    return LayerSpec(k_htd[0], k_htd[2], v_htd[0], v_htd[2], k_dtype, None if v_dtype is k_dtype else v_dtype)


@dataclass(frozen=True, slots=True, eq=False)
class PageView:
    """Destination for K and V of one layer and one sequence: ``[heads, tokens, bytes]`` each, on the host.

    ``bytes`` are those of one token in one head. The tokens of a head are contiguous; heads may lie apart, so that a
    view can be a part of a buffer.
    """

    k_htb: Bytes
    v_htb: Bytes

    @classmethod
    def on(cls, k_htd: torch.Tensor, v_htd: torch.Tensor) -> PageView:
        """Return a view of host tensors ``[heads, tokens, dim]``."""
        return cls(_bytes_of(k_htd), _bytes_of(v_htd))

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return self.k_htb.nbytes + self.v_htb.nbytes

    def cut(self, first: int, last: int) -> PageView:
        """Return the part for the tokens ``[first, last)``."""
        return PageView(self.k_htb[:, first:last], self.v_htb[:, first:last])

    def take(self, page: Page, first: int, last: int) -> None:
        """Copy the tokens ``[first, last)`` of ``page`` here."""
        self.copy(PageView.on(page.k_htd, page.v_htd).cut(first, last))

    def copy(self, source: PageView) -> None:
        """Copy what ``source``, which has the same size, has."""
        np.copyto(self.k_htb, source.k_htb)
        np.copyto(self.v_htb, source.v_htb)


def _bytes_of(tensor_htd: torch.Tensor) -> Bytes:
    """Return a host tensor ``[heads, tokens, dim]`` as ``[heads, tokens, bytes]``, without a copy."""
    import torch

    array: Bytes = tensor_htd.view(torch.uint8).numpy()
    return array
