"""Kernels of the test device: the CPU's, run on the memory of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import library as torch_library

from kvtier.testing.device.machine import Machine
from kvtier.testing.simulation.kernels import Operator

_aten: Any = torch.ops.aten
_dispatch: Any = torch._C
_CPU = _dispatch.DispatchKeySet(_dispatch.DispatchKey.CPU)
_VIEWS = (_aten.as_strided.default, _aten.view.default, _aten._reshape_alias.default)
_ALLOCATIONS = (_aten.empty.memory_format, _aten.empty_strided.default)
_new_empty = torch.empty  # as it was before the device replaced it
_ATTENTION_AS_MATH = 0  # SDPBackend::math: the fused kernels are chosen by device
# Tensors of these may lie on the CPU.
_ANY_DEVICE = ("aten::index", "aten::_index_put_impl_", "aten::index_put", "aten::set_")


class Kernels:
    """Runs every operator of PyTorch whose tensors are on the device.

    Args:
        machine: the device.
        device: its name.
    """

    def __init__(self, machine: Machine, device: torch.device) -> None:
        self._machine = machine
        self._device = device

    def register(self, fallback: Any, operators: Any) -> None:
        """Register the kernels in two libraries of PyTorch, for as long as these live."""
        fallback.fallback(self._fall_back, "PrivateUse1")
        for op in _VIEWS:  # the most frequent operators
            operators.impl(op, partial(op.redispatch, _CPU), "PrivateUse1")
        for op in _ALLOCATIONS:
            operators.impl(op, partial(self._allocate, op), "PrivateUse1")
        own: dict[Any, Callable[..., Any]] = {
            _aten._copy_from.default: self._copy,
            _aten._copy_from_and_resize.default: self._copy,
            _aten.record_stream.default: self._record_stream,
            _aten.resize_.default: self._resize,
            _aten.convolution_overrideable.default: self._convolve,
            _aten.histc.default: self._count,
            _aten._fused_sdp_choice.default: lambda *args, **kwargs: _ATTENTION_AS_MATH,
        }
        for op, kernel in own.items():
            operators.impl(op, kernel, "PrivateUse1")
        for key in ("Conjugate", "Negative"):  # a conjugated source would be copied before each copy, for ever
            operators.impl(_aten._copy_from.default, torch_library.fallthrough_kernel, key)

    def _fall_back(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        if _returns_views(op):
            return op.redispatch(_CPU, *args, **kwargs)
        return self._run(op, args, kwargs)

    def _convolve(self, *args: Any) -> Any:
        return self._run(_aten.convolution.default, args, {})

    def _count(self, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Count integers too, as accelerators do and CPUs do not."""
        if values.is_floating_point():
            return self._run(_aten.histc.default, (values, *args), kwargs)
        return self._run(_aten.histc.default, (values.double(), *args), kwargs).to(values.dtype)

    def _run(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``op`` on the CPU, on aliases of its arguments; move its results to the device."""
        with self._machine.streams.lock:
            return self._run_alone(op, args, kwargs)

    def _run_alone(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ours: list[tuple[torch.Tensor, torch.Tensor]] = []
        allows_host = op._schema.name.startswith(_ANY_DEVICE)
        args = self._aliases(args, ours, allows_host)
        kwargs = {name: self._aliases(value, ours, allows_host) for name, value in kwargs.items()}
        operator = _operator(op)
        for position in operator.positions if _refuses_numbers(op) else ():
            if position < len(args) and isinstance(args[position], (bool, int, float)):
                number = torch.tensor(args[position], device="cpu")
                args = (*args[:position], number, *args[position + 1 :])
        reads, writes, viewed = operator.tensors(args, kwargs)
        aliases = {id(mine) for _, mine in ours}
        reads, writes = ([x for x in some if id(x) in aliases] for some in ((*reads, *viewed), writes))
        self._machine.streams.launch(operator.name, reads, writes)
        result = op(*args, **kwargs)
        for tensor, mine in ours:
            if mine.size() != tensor.size():  # an output was resized
                self._become(tensor, mine)
        if _returns_numbers(op):
            self._machine.blocks()
        if isinstance(result, torch.Tensor):
            return self._result(result, ours)
        if isinstance(result, (list, tuple)):
            return type(result)([self._result(value, ours) for value in result])
        return result

    # No function inside: it would keep tensors alive, in a cycle.
    def _aliases(self, value: Any, ours: list[tuple[torch.Tensor, torch.Tensor]], allows_host: bool) -> Any:
        """Return ``value`` with CPU tensors in place of tensors of the device, and add both to ``ours``."""
        if isinstance(value, torch.Tensor):
            if value.device.type == self._device.type:
                ours.append((value, self._alias(value)))
                return ours[-1][1]
            if value.dim() and not allows_host:
                raise RuntimeError(f"a tensor is on {value.device}, others on {self._device}")
        elif isinstance(value, torch.device) and value.type == self._device.type:
            return torch.device("cpu")
        elif type(value) in (list, tuple):
            return type(value)([self._aliases(one, ours, allows_host) for one in value])
        return value

    def _result(self, value: Any, ours: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        for tensor, mine in ours:
            if value is mine:
                return tensor
        for tensor, mine in ours:
            if value.numel() and value.untyped_storage()._cdata == mine.untyped_storage()._cdata:
                return _strided(tensor, value.dtype, value)
        return self._moved(value)

    def _moved(self, value: torch.Tensor) -> torch.Tensor:
        """Return a result, which a kernel has left on the host, as it lies on the device."""
        value = value.resolve_conj().resolve_neg()
        moved = self._new(value.dtype, value)
        if value.numel():
            target = self._alias(moved)
            target.copy_(value)
            self._machine.streams.detector.produced("result", [target], on_host=False)
        return moved

    def _alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a CPU tensor over the memory of a tensor of the device."""
        mine = _new_empty(0, dtype=tensor.dtype, device="cpu")
        if not tensor.numel():
            return mine.resize_(tensor.size())
        storage = self._machine.memory.block(tensor).storage
        mine.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
        if tensor.is_conj():
            mine = torch._conj(mine)
        return torch._neg_view(mine) if tensor.is_neg() else mine

    def _allocate(self, op: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        layout = op(*args, **{**kwargs, "device": "meta", "pin_memory": None})
        with self._machine.streams.lock:
            return self._new(layout.dtype, layout)

    def _new(self, dtype: torch.dtype, layout: torch.Tensor) -> torch.Tensor:
        """Return an uninitialized tensor with the sizes and strides of ``layout``."""
        items = 1 + sum((size - 1) * stride for size, stride in zip(layout.size(), layout.stride(), strict=True))
        nbytes = items * dtype.itemsize if layout.numel() else 0
        return _strided(self._machine.memory.bytes(nbytes, self._machine.streams.current), dtype, layout, offset=0)

    def _become(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        moved = self._moved(value)
        arguments = (moved.untyped_storage(), 0, moved.size(), moved.stride())
        _aten.set_.source_Storage_storage_offset.redispatch(_CPU, tensor, *arguments)

    def _resize(self, tensor: torch.Tensor, size: Sequence[int], **_: Any) -> torch.Tensor:
        with self._machine.streams.lock:
            kept = self._alias(tensor).clone()
            self._become(tensor, kept.resize_(size))
            return tensor

    def _copy(self, src: torch.Tensor, dst: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        is_up, is_down = (x.device.type != self._device.type for x in (src, dst))
        if src.numel():
            source, target = src if is_up else self._alias(src), dst if is_down else self._alias(dst)
            host = source if is_up else target if is_down else None
            with self._machine.streams.lock:
                self._machine.copy(target, source, host, non_blocking)
        return dst

    def _record_stream(self, tensor: torch.Tensor, stream: torch.Stream) -> None:
        if tensor.numel():
            block = self._machine.memory.block(tensor)
            if stream.stream_id != block.stream:
                block.used_by.add(stream.stream_id)


def _strided(tensor: torch.Tensor, dtype: torch.dtype, like: torch.Tensor, offset: int | None = None) -> torch.Tensor:
    """Return a tensor of ``dtype`` on the storage of ``tensor``, with the layout of ``like``."""
    if tensor.dtype != dtype:
        tensor = _aten.view.dtype.redispatch(_CPU, tensor, dtype)
    at = like.storage_offset() if offset is None else offset
    strided: torch.Tensor = _aten.as_strided.default.redispatch(_CPU, tensor, like.size(), like.stride(), at)
    return strided


_operator = lru_cache(maxsize=None)(Operator)


@cache
def _returns_views(op: Any) -> bool:
    """Whether all results share the memory of an argument, unwritten."""
    aliases = [result.alias_info for result in op._schema.returns]
    is_set = op._schema.name in ("aten::set_", "aten::resize_as_")
    return is_set or (bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases))


@cache
def _returns_numbers(op: Any) -> bool:
    """Whether the host waits for a value: ``item``, ``equal``, or a size that depends on values."""
    kinds = {str(result.type) for result in op._schema.returns}
    return not kinds <= {"Tensor", "List[Tensor]"} or torch.Tag.dynamic_output_shape in op.tags


@cache
def _refuses_numbers(op: Any) -> bool:
    """Whether ``op`` takes no Python number in place of a tensor, as which numbers arrive here."""
    allow: Any = torch._C._should_allow_numbers_as_tensors
    return not allow(op._opname)
