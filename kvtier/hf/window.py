"""The window: contiguous K and V of one layer, appended in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtier.errors import RestoreError
from kvtier.geometry import LayerGeometry

_GROWTH = 1.5  # geometric, so that appending n tokens one by one copies O(n)
_HEADROOM_TOKENS = 256


@dataclass(frozen=True, slots=True)
class WindowRun:
    """Columns ``[start, stop)`` of a new window, taken from ``source_start`` on of row ``source_row`` of the old."""

    start: int
    stop: int
    source_row: int
    source_start: int


@dataclass(frozen=True, slots=True, eq=False)
class PageRun:
    """Columns ``[start, stop)`` of a new window, taken from a page: ``[heads, tokens, dim]``."""

    start: int
    stop: int
    k_htd: torch.Tensor
    v_htd: torch.Tensor


class Window:
    """K ``[rows, k_heads, capacity, k_dim]`` and V ``[rows, v_heads, capacity, v_dim]``.

    Owns both buffers. Memory beyond what was written is only reserved:
    on the CPU it costs address space.
    """

    def __init__(self, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, capacity: int) -> None:
        """Make room for ``capacity`` columns of K and V like these."""
        self.k = k_bhtd.new_empty(*k_bhtd.shape[:2], capacity, k_bhtd.shape[3])
        self.v = v_bhtd.new_empty(*v_bhtd.shape[:2], capacity, v_bhtd.shape[3])

    @staticmethod
    def capacity_for(columns: int) -> int:
        """Return the capacity to reserve for a window that needs ``columns`` now."""
        return max(int(columns * _GROWTH), columns + _HEADROOM_TOKENS)

    @property
    def rows(self) -> int:
        """Sequences held."""
        return self.k.shape[0]

    @property
    def geometry(self) -> LayerGeometry:
        """Shapes of K and V of one token."""
        return LayerGeometry.of(self.k, self.v)

    def takes(self, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> bool:
        """Whether K and V like these can be appended as they are."""
        return (
            self.rows == k_bhtd.shape[0]
            and self.k.device == k_bhtd.device
            and self.geometry == LayerGeometry.of(k_bhtd, v_bhtd)
        )

    def reserve(self, columns: int, live: int) -> None:
        """Have room for ``columns``; the first ``live`` keep their values."""
        if columns <= self.k.shape[2]:
            return
        old_k, old_v = self.k, self.v
        grown = Window(old_k, old_v, self.capacity_for(columns))
        grown.k[:, :, :live] = old_k[:, :, :live]
        grown.v[:, :, :live] = old_v[:, :, :live]
        self.k, self.v = grown.k, grown.v

    def write(self, begin: int, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> None:
        """Put K and V into the columns from ``begin`` on."""
        end = begin + k_bhtd.shape[2]
        self.k[:, :, begin:end] = k_bhtd
        self.v[:, :, begin:end] = v_bhtd

    def write_page(self, row: int, run: PageRun) -> None:
        """Put a page into its columns of ``row``.

        Raises:
            RestoreError: the page has other heads, head sizes or another type.
        """
        for page, window in ((run.k_htd, self.k), (run.v_htd, self.v)):
            if (page.dtype, page.shape[0], page.shape[2]) != (window.dtype, window.shape[1], window.shape[3]):
                raise RestoreError(
                    f"a stored page of {page.dtype} {tuple(page.shape)} does not fit the model's K and V"
                )
            window[row, :, run.start : run.stop].copy_(page)

    def copy_run(self, row: int, run: WindowRun, source: Window) -> None:
        """Put columns of another window into ``row``."""
        columns = slice(run.source_start, run.source_start + run.stop - run.start)
        self.k[row, :, run.start : run.stop] = source.k[run.source_row, :, columns]
        self.v[row, :, run.start : run.stop] = source.v[run.source_row, :, columns]

    def clear(self, row: int, begin: int, end: int) -> None:
        """Zero columns that stand for padding: masked out, but they must be finite."""
        self.k[row, :, begin:end] = 0
        self.v[row, :, begin:end] = 0

    def select(self, rows: torch.Tensor, live: int) -> None:
        """Make row ``i`` the former row ``rows[i]``, for the first ``live`` columns.

        ``rows`` are indices, or one truth value for each row.
        """
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        self.k, self.v = (_select(buffer, rows.to(buffer.device), live) for buffer in (self.k, self.v))


def _select(buffer: torch.Tensor, rows: torch.Tensor, live: int) -> torch.Tensor:
    selected = buffer[:, :, :live].index_select(0, rows)
    if len(rows) != buffer.shape[0]:
        buffer = buffer.new_empty(len(rows), *buffer.shape[1:])
    buffer[:, :, :live] = selected
    return buffer
