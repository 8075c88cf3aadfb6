"""Engines: the copy engine of each device that a cache uses."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvtier.transfer.base import CopyEngine

MakeEngine = Callable[[torch.device], CopyEngine]
"""``device`` → an engine that copies from and to it."""


class Engines:
    """The engines of one cache, each made when its device is first used. ``close`` closes them.

    Args:
        make: returns the engine of a device.
    """

    def __init__(self, make: MakeEngine) -> None:
        self._make = make
        self._engines: dict[torch.device, CopyEngine] = {}

    def on(self, device: torch.device) -> CopyEngine:
        """Return the engine of ``device``."""
        if device not in self._engines:
            self._engines[device] = self._make(device)
        return self._engines[device]

    def close(self) -> None:
        """Release threads and streams. May be called more than once."""
        while self._engines:
            self._engines.popitem()[1].close()
