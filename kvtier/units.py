"""Byte counts and durations as people write and read them."""

from __future__ import annotations

import re

from kvtier.errors import ConfigurationError

_FACTORS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_FACTORS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d|w)\s*")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
LONGEST_SECONDS = 1e12
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(value: int | str, argument: str, other: str = "") -> int:
    """Return ``value`` as a number of bytes: ``1048576``, ``"2GiB"``, ``"500 MB"``.

    ``other`` is what the caller takes besides byte counts, as its message says it.

    Raises:
        ConfigurationError: ``value`` is not a byte count, or not positive; the message names ``argument``.
    """
    match = _PATTERN.fullmatch(value) if isinstance(value, str) else None
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match and factor:
        count = int(float(match[1]) * factor)
    elif isinstance(value, int) and not isinstance(value, bool):
        count = value
    else:
        accepted = f'an int or e.g. "2GiB", "500MB"{other and f", or {other}"}'
        is_share = isinstance(value, float) or (isinstance(value, str) and value.rstrip().endswith("%"))
        hint = " Shares of a memory are not accepted." if is_share else ""
        raise ConfigurationError(f"{argument}={value!r} is not a byte count; pass {accepted}.{hint}")
    if count <= 0:
        raise ConfigurationError(f"{argument}={value!r} must be more than 0 bytes.")
    return count


def size(nbytes: int) -> str:
    """Return a byte count with three or four digits: ``512 B``, ``5.6 MiB``, ``1023 GiB``."""
    if nbytes < 1024:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1023.5:
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
    return f"{value / 1024:.1f} TiB"


def parse_seconds(value: float | str, argument: str) -> float:
    """Return ``value`` as a number of seconds: ``90``, ``"90min"``, ``"12h"``, ``"30d"``, ``"2w"``.

    Raises:
        ConfigurationError: ``value`` is not a duration, not above 0, or more than 30,000 years; the message names
            ``argument``.
    """
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
        if not 0 < seconds <= LONGEST_SECONDS:
            raise ConfigurationError(
                f"{argument}={value!r:.80} is not a duration; write a number above 0 and s, min, h, d or w, e.g. 30d "
                "or 12h."
            )
        return seconds
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LONGEST_SECONDS:
        raise ConfigurationError(
            f"{argument}={value!r:.80} must be a number of seconds greater than 0 and at most {LONGEST_SECONDS:.0e}, "
            'or a duration, e.g. "30d".'
        )
    return float(value)
