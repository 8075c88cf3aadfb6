"""Byte counts as people write them, and the memory that this machine has."""

from __future__ import annotations

import os
import re

import torch

from kvtier.errors import ConfigurationError

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(value: int | str, argument: str) -> int:
    """Return ``value`` as a number of bytes: ``1048576``, ``"2GiB"``, ``"500 MB"``.

    Raises:
        ConfigurationError: ``value`` is no byte count, or not positive; the message names ``argument``.
    """
    if isinstance(value, str):
        match = _PATTERN.fullmatch(value)
        factor = _FACTORS.get(match[2].lower()) if match else None
        if match is None or factor is None:
            raise ConfigurationError(f'{argument}={value!r} is not a byte count; pass an int or e.g. "2GiB", "500MB".')
        count = int(float(match[1]) * factor)
    elif isinstance(value, int) and not isinstance(value, bool):
        count = value
    else:
        raise ConfigurationError(f'{argument}={value!r} is not a byte count; pass an int or e.g. "2GiB", "500MB".')
    if count <= 0:
        raise ConfigurationError(f"{argument}={value!r} must be more than 0 bytes.")
    return count


def physical_memory_bytes() -> int:
    """Return the bytes of RAM of this machine, or 8 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 8 * 2**30


def default_host_budget_bytes() -> int:
    """Return the RAM a store may use when nobody said: a quarter of the machine's, at most 4 GiB."""
    return min(physical_memory_bytes() // 4, 4 * 2**30)


def free_device_bytes(device: torch.device) -> int:
    """Return the bytes that may still be taken on ``device``, less a reserve of a tenth of it, at least 512 MiB.

    Where kernels read host memory, that is RAM that other programs do not use.

    Raises:
        ConfigurationError: the device does not tell.
    """
    if device.type == "cpu":
        import psutil  # only "auto" needs it; kvtier should be imported fast

        free, total = psutil.virtual_memory().available, physical_memory_bytes()
    else:
        try:
            module = torch.get_device_module(device)
        except RuntimeError:
            module = None
        if not hasattr(module, "mem_get_info"):
            raise ConfigurationError(
                f'{device.type} devices do not tell how much memory is free: pass device_budget as bytes, not "auto".'
            )
        free, total = module.mem_get_info(device)
        free += module.memory_reserved(device) - module.memory_allocated(device)  # PyTorch's own, not handed out
    return max(0, int(free) - max(int(total) // 10, 512 * 2**20))
