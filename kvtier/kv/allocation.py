"""Allocation of tensors that stay writable, in inference mode and outside of it.

PyTorch refuses to write a tensor made in inference mode in place once that mode has ended. A cache outlives the call
that made its buffers, so every tensor that kvtier writes later is made here. torch is imported when the first
tensor is made: looking after a store's files needs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def writable_results() -> Iterator[None]:
    """Make tensors created inside writable outside of inference mode too; no gradients are recorded."""
    import torch

    if not torch.is_inference_mode_enabled():
        yield
        return
    # Leaving inference mode turns gradients on.
    with torch.inference_mode(False), torch.no_grad():
        yield


def new_buffer(
    *shape: int, dtype: torch.dtype, device: torch.device | str = "cpu", pin_memory: bool = False
) -> torch.Tensor:
    """Return an uninitialized tensor of ``shape`` that stays writable.

    Raises:
        RuntimeError: the memory cannot be allocated or pinned.
    """
    import torch

    with writable_results():
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=pin_memory)


def as_writable(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor``, or a copy of it if it was made in inference mode."""
    if not tensor.is_inference():
        return tensor
    with writable_results():
        return tensor.clone()


def empty_rows(like: torch.Tensor, rows: int, trailing: Sequence[int]) -> torch.Tensor:
    """Return an uninitialized ``[rows, *trailing]`` of the dtype and device of ``like`` that stays writable."""
    return new_buffer(rows, *trailing, dtype=like.dtype, device=like.device)
