"""Watch: reads and writes of every kernel on the compute stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvtier.testing.simulation.races import Detector

# Operators that take shape and dtype of their argument, but no values.
_SHAPE_ONLY = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_")


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it few types
    """Reports each kernel that this thread runs to a detector, in eager code under any of torch's grad modes.

    A view is no access. An operator that may return a view or a copy (``reshape``) is judged by its result.
    """

    def __init__(self, detector: Detector, is_paused: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._detector = detector
        self._is_paused = is_paused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; report its arguments before, and its results after."""
        kwargs = kwargs or {}
        operator = _operator(func)
        if operator.is_no_access or self._is_paused():
            return func(*args, **kwargs)
        reads, writes, viewed = operator.tensors(args, kwargs)
        if reads or writes:
            on_host = self._detector.kernel(operator.name, reads, writes)
            result = func(*args, **kwargs)
            new = _new(result, (*reads, *writes, *viewed))
        else:
            result = func(*args, **kwargs)
            new = _new(result, viewed)
            if not new:
                return result
            # a view that became a copy has been read; without arguments, memory was allocated
            on_host = self._detector.kernel(operator.name, viewed, ())
        self._detector.produced(operator.name, new, on_host=on_host)
        return result


class Operator:
    """Accesses of an operator to its arguments, as in its schema.

    Attributes:
        name: with its overload.
        is_no_access: whether it changes sizes and strides alone.
        positions: positions of the arguments that are tensors whose values it uses.
    """

    def __init__(self, func: Any) -> None:
        self.name = str(func)
        self.is_no_access = torch.Tag.inplace_view in func.tags
        self._arguments = [
            (position, argument.name, argument.alias_info)
            for position, argument in enumerate(func._schema.arguments)
            if "Tensor" in str(argument.type) and not func._opname.startswith(_SHAPE_ONLY)
        ]
        self.positions = [position for position, _, _ in self._arguments]

    def tensors(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Return the tensors that a call reads, the tensors that it writes, and those that it may return views of."""
        reads: list[torch.Tensor] = []
        writes: list[torch.Tensor] = []
        viewed: list[torch.Tensor] = []
        for position, name, alias in self._arguments:
            value = args[position] if position < len(args) else kwargs.get(name)
            (reads if alias is None else writes if alias.is_write else viewed).extend(_tensors(value))
        return reads, writes, viewed


_operator = lru_cache(maxsize=None)(Operator)


def _new(result: Any, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors of ``result`` that are in none of the storages of ``arguments``."""
    known = {tensor.untyped_storage()._cdata for tensor in arguments}
    return [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in known]


def _tensors(value: Any) -> Sequence[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, (list, tuple)):
        return [tensor for one in value for tensor in _tensors(one)]
    return ()
