"""LayerMemory: the memory of one layer, which attention appends to and reads."""

from __future__ import annotations

from typing import Protocol

import torch

from kvtier.kv.page import Page
from kvtier.kv.spec import LayerSpec


def first_visible(begin: int, sliding_window: int) -> int:
    """Return the first column that new tokens at column ``begin`` see through a sliding window."""
    return max(0, begin - sliding_window + 1)


class LayerMemory(Protocol):
    """K and V of one layer for all rows, in any tier, from column ``base`` on.

    Attributes:
        spec: shapes and dtypes of K and V.
    """

    spec: LayerSpec

    @property
    def base(self) -> int:
        """The first column held: a sliding layer drops those that no later token sees."""

    def begin_at(self, base: int) -> None:
        """Let an empty memory hold columns from ``base`` on."""

    def trim(self, base: int, live: int) -> LayerMemory:
        """Return a memory that holds the columns ``[base, live)`` alone: this one, or a new one that replaces it."""

    @property
    def rows(self) -> int:
        """Sequences held."""

    @property
    def device(self) -> torch.device:
        """The device on which attention reads."""

    def takes(self, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> bool:
        """Whether K and V like these can be appended as they are."""

    def append(
        self, begin: int, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put K and V into the columns from ``begin`` on; return all K and V from column ``first`` on."""

    def select(self, rows: torch.Tensor, live: int) -> None:
        """Make row ``i`` the former row ``rows[i]``, for the columns before ``live``."""

    def page(self, row: int, begin: int, end: int) -> Page:
        """Return a host copy of the columns ``[begin, end)`` of ``row``."""

    def contents(self, columns: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of the columns from ``first`` on that are held, before column ``columns``."""

    def close(self) -> None:
        """Release all K and V."""
