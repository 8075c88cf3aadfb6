"""Where the tests of streaming run: an accelerator, or a CPU that stands in for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtier.transfer import CopyEngine, ThreadEngine, engine_for


class StandIn(ThreadEngine):
    """Takes the CPU's memory for that of a device: pages then go to host memory first, as beside an accelerator."""

    device_is_host = False


@dataclass
class Place:
    """A device, and engines that note what host memory they are asked for."""

    device: torch.device
    real: bool
    host_memory: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def on(cls, accelerator: torch.device) -> Place:
        """Return the current device of the kind of ``accelerator``, with its number: so devices of tensors read."""
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
        """Bytes of host memory that were ever asked for."""
        return sum(memory.nbytes for memory in self.host_memory)

    def other_stream(self) -> AbstractContextManager[Any]:
        """Return what makes another stream than the default one current."""
        return torch.Stream(self.device) if self.real else nullcontext()

    def synchronize(self) -> None:
        """Wait for everything on all streams."""
        if self.real:
            torch.accelerator.synchronize(self.device)

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Yield a list that afterwards holds by how many bytes of the device a block grew at most; none on a CPU."""
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
