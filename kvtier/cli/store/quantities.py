"""Sizes, spans and moments, as people read and write them."""

from __future__ import annotations

import re
import time

from kvtier.errors import ConfigurationError
from kvtier.units import parse_bytes

_SPAN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d|w)\s*")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


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


def span(seconds: float) -> str:
    """Return a duration in its largest whole unit, rounded down: ``45 s``, ``12 min``, ``3 h``, ``20 d``."""
    for unit, factor in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= factor:
            return f"{int(seconds // factor)} {unit}"
    return f"{max(0, int(seconds))} s"


def moment(unix_seconds: float) -> str:
    """Return a time in the local time zone: ``2026-01-31 09:05:00``."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))


def parse_span(text: str, option: str) -> float:
    """Return the seconds that ``text`` says: ``30d``, ``12h``, ``1.5 h``.

    Raises:
        ConfigurationError: it is no duration, or none above 0; the message names ``option``.
    """
    match = _SPAN.fullmatch(text)
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not seconds:
        raise ConfigurationError(
            f"{option}={text!r:.80} is not a duration; write a number above 0 and s, min, h, d or w, e.g. 30d or 12h."
        )
    return seconds


def parse_size(text: str, option: str) -> int:
    """Return the bytes that ``text`` says, e.g. ``10GiB``; 0 is allowed.

    Raises:
        ConfigurationError: it is no byte count; the message names ``option``.
    """
    return 0 if text.strip() == "0" else parse_bytes(text, option)
