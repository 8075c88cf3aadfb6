"""Memory limits of this process: of the machine, its container, and a device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from kvtier.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

_GIB = 2**30


def host_memory_bytes() -> int:
    """Return the bytes of RAM that this process may use: of the machine, or of its container if that has less.

    8 GiB where the system does not tell.
    """
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        physical = 8 * _GIB
    return min([physical, *(limit for limit, _ in container_limits())])


def free_host_memory_bytes() -> int:
    """Return the bytes of RAM that are free, in the machine and in its containers."""
    import psutil  # only "auto" and `kvtier doctor` need it; kvtier should be imported fast

    available = int(psutil.virtual_memory().available)
    return max(0, min([available, *(limit - used for limit, used in container_limits())]))


def container_limits(root: Path = Path("/")) -> list[tuple[int, int]]:
    """Return the memory limit and the memory used, in bytes, of each control group of this process.

    Covers both versions of Linux's control groups, and all groups from this process's up; groups without a limit are
    left out. Page cache that can be freed at once does not count as used.

    Args:
        root: the folder of ``proc`` and ``sys``.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, cache = root / "sys/fs/cgroup/memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        for folder in _upward(base, path):
            limit_bytes, used_bytes = _number(folder / limit), _number(folder / usage)
            if limit_bytes is not None and used_bytes is not None:
                found.append((limit_bytes, max(0, used_bytes - _entry(folder / "memory.stat", cache))))
    return found


def _upward(base: Path, path: str) -> Iterator[Path]:
    """Yield the folders of a control group and of its parents. Inside a container, its own may be ``base``."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for count in range(len(parts), -1, -1):
        yield base.joinpath(*parts[:count])


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # the file is missing, or says "max"
        return None


def _entry(path: Path, name: str) -> int:
    try:
        return int(dict(line.split() for line in path.read_text(encoding="ascii").splitlines())[name])
    except (OSError, ValueError, KeyError):
        return 0


def default_host_budget_bytes() -> int:
    """Return the default budget of a store's RAM: a quarter of host memory, at most 4 GiB."""
    return min(host_memory_bytes() // 4, 4 * _GIB)


def free_device_bytes(device: torch.device) -> int:
    """Return the free bytes of ``device``, less a reserve of a tenth of its memory, at least 512 MiB.

    For a CPU, that is free RAM.

    Raises:
        ConfigurationError: the device does not report its free memory.
    """
    if device.type == "cpu":
        free, total = free_host_memory_bytes(), host_memory_bytes()
    else:
        import torch  # only device budgets need it; a store is opened without

        try:
            module = torch.get_device_module(device)
        except RuntimeError:
            module = None
        if not hasattr(module, "mem_get_info"):
            raise ConfigurationError(
                f'{device.type} devices do not tell how much memory is free: pass device_budget as bytes, not "auto".'
            )
        free, total = module.mem_get_info(device)
        free += module.memory_reserved(device) - module.memory_allocated(device)  # reserved by PyTorch, but unused
    return max(0, int(free) - max(int(total) // 10, 512 * 2**20))
