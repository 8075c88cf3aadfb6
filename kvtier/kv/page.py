"""Pages: K and V of one layer on the host, and views that pages are copied into."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """K and V of one layer for the tokens of one block, on the host: ``[heads, tokens, dim]`` each."""

    k_htd: torch.Tensor
    v_htd: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return self.k_htd.nbytes + self.v_htd.nbytes


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
        return cls(k_htd.view(torch.uint8).numpy(), v_htd.view(torch.uint8).numpy())

    def cut(self, first: int, last: int) -> PageView:
        """Return the part for the tokens ``[first, last)``."""
        return PageView(self.k_htb[:, first:last], self.v_htb[:, first:last])

    def take(self, page: Page, first: int, last: int) -> None:
        """Copy the tokens ``[first, last)`` of ``page`` here."""
        np.copyto(self.k_htb, page.k_htd.view(torch.uint8).numpy()[:, first:last])
        np.copyto(self.v_htb, page.v_htd.view(torch.uint8).numpy()[:, first:last])
