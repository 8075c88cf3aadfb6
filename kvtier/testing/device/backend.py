"""The test device as PyTorch sees it: its name, its module, streams, events and pinned memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import library as torch_library
from torch.utils import backend_registration

from kvtier.testing.device import names
from kvtier.testing.device.kernels import Kernels
from kvtier.testing.device.machine import Machine
from kvtier.testing.device.names import DEVICE_TYPE

_FREE_BYTES = 2**33


@cache
def install() -> Machine:
    """Give this process the device ``testdevice``. It stays until the process ends.

    ``torch.accelerator`` names it from then on. PyTorch's registration of devices written in Python knows no streams,
    events and pinned memory, so names of ``torch`` are replaced: ``Stream``, ``accelerator.current_stream``,
    ``accelerator.set_stream``, ``accelerator.synchronize``, and ``empty`` for ``pin_memory=True``.

    Raises:
        RuntimeError: another device of this kind is registered.
    """
    machine = Machine()
    setup: Any = backend_registration._setup_privateuseone_for_python_backend
    setup(DEVICE_TYPE, backend_module=_Module(machine))
    device = torch.device(DEVICE_TYPE, 0)
    library: Any = torch_library.Library
    _libraries.extend(library(namespace, "IMPL") for namespace in ("_", "aten"))
    Kernels(machine, device).register(*_libraries)
    _libraries[-1].impl("is_pinned", lambda tensor, device=None: machine.is_pinned(tensor), "CPU")
    _libraries[-1].impl("_pin_memory", lambda tensor, device=None: _pinned_copy(machine, tensor), "CPU")
    names.replace(machine)
    return machine


_libraries: list[Any] = []  # what they register lives as long as they do


class _Module:
    """The functions of ``torch.testdevice``."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        self._machine.streams.synchronize()

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def memory_allocated(self, device: Any = None) -> int:
        return self._machine.memory.held

    def memory_reserved(self, device: Any = None) -> int:
        return self._machine.memory.reserved

    def max_memory_allocated(self, device: Any = None) -> int:
        return self._machine.memory.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self._machine.memory.reset_peak()

    def host_memory_stats(self) -> dict[str, int]:
        return {"allocated_bytes.current": self._machine.pinned_bytes}

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return max(0, _FREE_BYTES - self._machine.memory.reserved), _FREE_BYTES


def _pinned_copy(machine: Machine, tensor: torch.Tensor) -> torch.Tensor:
    pinned = machine.pinned(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    return pinned.copy_(tensor)
