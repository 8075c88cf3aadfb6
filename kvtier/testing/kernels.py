"""The compute stream, watched: what every kernel reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvtier.testing.races import Detector

# They take shape and dtype of their argument, no values.
_SHAPE_ONLY = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_")


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it few types
    """Shows each kernel that this thread runs to a detector, in eager code under any of torch's grad modes.

    A view is no access. An operator that may return a view or a copy (``reshape``) is judged by what it returned.
    """

    def __init__(self, detector: Detector, is_paused: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._detector = detector
        self._is_paused = is_paused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, between a look at its arguments and one at its results."""
        kwargs = kwargs or {}
        if self._is_paused() or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        name = str(func)
        reads, writes, viewed = _arguments(func, args, kwargs)
        if reads or writes:
            on_host = self._detector.kernel(name, reads, writes)
            result = func(*args, **kwargs)
            new = _new(result, (*reads, *writes, *viewed))
        else:
            result = func(*args, **kwargs)
            new = _new(result, viewed)
            if not new:
                return result
            # a view that became a copy has been read; without arguments, memory was allocated
            on_host = self._detector.kernel(name, viewed, ())
        self._detector.produced(name, new, on_host=on_host)
        return result


def _arguments(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Return the tensors that ``func`` reads, those that it writes, and those that it may return views of."""
    reads: list[torch.Tensor] = []
    writes: list[torch.Tensor] = []
    viewed: list[torch.Tensor] = []
    shape_only = func._opname.startswith(_SHAPE_ONLY)
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        tensors = list(_tensors(value))
        if not tensors or shape_only:
            continue
        if argument.alias_info is None:
            reads += tensors
        elif not argument.alias_info.is_write:
            viewed += tensors
        else:
            writes += tensors
    return reads, writes, viewed


def _new(result: Any, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors of ``result`` that are in none of the storages of ``arguments``."""
    known = {tensor.untyped_storage()._cdata for tensor in arguments}
    return [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in known]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
