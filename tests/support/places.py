"""Devices for the tests on accelerators, and an engine that treats the CPU as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtier.testing.device import DEVICE_TYPE
from kvtier.transfer.accelerator import engine_for
from kvtier.transfer.base import CopyEngine
from kvtier.transfer.cpu import ThreadEngine


class StandIn(ThreadEngine):
    """Treats the CPU's memory as a device's: pages go to host memory first, as with an accelerator."""

    device_is_host = False


@dataclass
class Place:
    """A device, and engines that record all host memory they allocate.

    Attributes:
        device: with its number, as devices of tensors have it.
        host_memory: all that was ever requested.
    """

    device: torch.device
    host_memory: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def on(cls, accelerator: torch.device) -> Place:
        """Return the current device of the kind of ``accelerator``."""
        return cls(torch.device(accelerator.type, torch.accelerator.current_device_index()))

    @property
    def real(self) -> bool:
        """Whether it is hardware: the test device runs the same with fewer tokens."""
        return self.device.type != DEVICE_TYPE

    @property
    def module(self) -> Any:
        """The functions of its kind, such as ``torch.cuda``."""
        return torch.get_device_module(self.device)

    def engine(self, device: torch.device) -> CopyEngine:
        """Return an engine of ``device``, for ``TieredCache(engine=…)``."""
        engine: Any = engine_for(device)
        make = engine.host_empty

        def host_empty(nbytes: int) -> torch.Tensor:
            memory = make(nbytes)
            self.host_memory.append(memory)
            return memory

        engine.host_empty = host_empty
        return engine

    @property
    def host_bytes(self) -> int:
        """Total bytes of host memory ever requested."""
        return sum(memory.nbytes for memory in self.host_memory)

    def other_stream(self) -> AbstractContextManager[Any]:
        """Return a context that makes a non-default stream current."""
        stream: Any = torch.Stream
        context: AbstractContextManager[Any] = stream(self.device)
        return context

    def synchronize(self) -> None:
        """Wait for all work on all streams."""
        torch.accelerator.synchronize(self.device)

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Yield a list that gets the peak growth of device memory in the block, in bytes."""
        grown: list[int] = []
        self.synchronize()
        self.module.reset_peak_memory_stats(self.device)
        before = self.module.memory_allocated(self.device)
        yield grown
        self.synchronize()
        grown.append(self.module.max_memory_allocated(self.device) - before)
