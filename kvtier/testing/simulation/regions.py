"""Regions: the exact bytes that a strided tensor occupies."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class Region(NamedTuple):
    """The bytes of one tensor by address, gaps between its rows left out. Equal regions are equal layouts."""

    address: int
    itemsize: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Region:
        """Return the bytes that ``tensor`` reads or writes."""
        return cls(tensor.data_ptr(), tensor.element_size(), tuple(tensor.shape), tensor.stride())

    @classmethod
    def whole(cls, storage: torch.UntypedStorage) -> Region:
        """Return all bytes of ``storage``."""
        return cls(storage.data_ptr(), 1, (storage.nbytes(),), (1,))

    def bounds(self) -> tuple[int, int]:
        """Return the first address and the one after the last; 0 and 0 for no bytes."""
        span = self.itemsize
        for size, stride in zip(self.sizes, self.strides, strict=True):
            if size == 0:
                return 0, 0
            span += (size - 1) * stride * self.itemsize
        return self.address, self.address + span

    def overlaps(self, other: Region) -> bool:
        """Whether a byte belongs to both."""
        (low, high), (other_low, other_high) = self.bounds(), other.bounds()
        if low >= other_high or other_low >= high:
            return False
        ours, theirs = _runs(self), _runs(other)
        if len(ours.starts) == len(theirs.starts) == 1:
            return True
        # A run of theirs that begins after ``start - their length`` and before ``start + our length`` meets ours.
        first = np.searchsorted(theirs.starts, ours.starts - theirs.length, side="right")
        last = np.searchsorted(theirs.starts, ours.starts + ours.length, side="left")
        return bool((last > first).any())


class _Runs(NamedTuple):
    """Runs of contiguous bytes, all of one length, in the order of their addresses."""

    starts: npt.NDArray[np.int64]
    length: int


@lru_cache(maxsize=4096)
def _runs(region: Region) -> _Runs:
    axes = sorted(
        (stride * region.itemsize, size) for stride, size in zip(region.strides, region.sizes, strict=True) if size > 1
    )
    length = region.itemsize
    while axes and axes[0][0] <= length:  # the next piece begins where this one ends, or inside it
        step, size = axes.pop(0)
        length += step * (size - 1)
    starts = np.array([region.address], np.int64)
    for step, size in axes:
        starts = (starts[:, None] + step * np.arange(size, dtype=np.int64)).ravel()
    starts.sort()
    return _Runs(starts, length)
