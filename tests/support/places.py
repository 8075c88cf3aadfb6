"""Devices for the tests of offloading: an accelerator, or a CPU in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtier.transfer import CopyEngine, ThreadEngine, engine_for


class StandIn(ThreadEngine):
    """Treats the CPU's memory as a device's: pages go to host memory first, as with an accelerator."""

    device_is_host = False


@dataclass
class Place:
    """A device, and engines that record all host memory they allocate."""

    device: torch.device
    real: bool
    host_memory: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def on(cls, accelerator: torch.device) -> Place:
        """Return the current device of the kind of ``accelerator``, with its number, as devices of tensors have it."""
        return cls(torch.device(accelerator.type, torch.accelerator.current_device_index()), real=True)

    def engine(self, device: torch.device) -> CopyEngine:
        """Return an engine of ``device``, for ``TieredCache(engine=…)``."""
        engine: Any = engine_for(device) if self.real else StandIn()
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
        return torch.Stream(self.device) if self.real else nullcontext()

    def synchronize(self) -> None:
        """Wait for all work on all streams."""
        if self.real:
            torch.accelerator.synchronize(self.device)

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Yield a list that gets the peak growth of device memory in the block, in bytes; it stays empty on a CPU."""
        grown: list[int] = []
        if not self.real:
            yield grown
            return
        module = torch.get_device_module(self.device)
        self.synchronize()
        module.reset_peak_memory_stats(self.device)
        before = module.memory_allocated(self.device)
        yield grown
        self.synchronize()
        grown.append(module.max_memory_allocated(self.device) - before)
