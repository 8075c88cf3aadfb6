"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from kvtier.platform.memory import host_memory_bytes

_PACKAGES = ("kvtier", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Machine:
    """Hardware and software, and how busy the machine was when it was asked.

    Attributes:
        cpu: name of the processor.
        cores: cores that this process may use.
        threads: threads that PyTorch computes on.
        memory_bytes: RAM of the machine or its container.
        device: where the model computes, by name.
        system: operating system and architecture.
        python: version.
        packages: package → version.
        load_average: runnable processes in the last minute; None where the system does not tell.
        date: in UTC.
    """

    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    device: str
    system: str
    python: str
    packages: dict[str, str]
    load_average: float | None
    date: str


def describe_machine(device: torch.device) -> Machine:
    """Describe this machine now."""
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=host_memory_bytes(),
        device=_device_name(device),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: version(name) for name in _PACKAGES},
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    module = torch.get_device_module(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else str(device)


def _cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
