"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from kvtier.platform.memory import host_memory_bytes

CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Machine:
    """Hardware, software and state of the machine; ``load_average`` tells whether it was quiet when the run began."""

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    torch: str
    transformers: str
    kvtier: str
    commit: str
    threads: int
    load_average: float | None
    date: str


def describe_machine() -> Machine:
    """Describe this machine now."""
    import torch

    return Machine(
        cpu=_cpu_model(),
        cores=_usable_cores(),
        memory_bytes=host_memory_bytes(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=version("transformers"),
        kvtier=version("kvtier"),
        commit=commit(CHECKOUT),
        threads=torch.get_num_threads(),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit(checkout: Path) -> str:
    """Return the commit of ``checkout``, marked ``+changes`` where tracked files differ; ``unknown`` without git."""
    git = ["git", "-C", str(checkout)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
