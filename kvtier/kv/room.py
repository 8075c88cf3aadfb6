"""Room: how many columns a buffer reserves beyond the ones that it needs now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from kvtier.errors import ConfigurationError
from kvtier.platform.memory import free_device_bytes

_GROWTH = 1.5  # geometric, so that appending n tokens one by one copies O(n)
_HEADROOM_TOKENS = 256
_DEVICE_GROWTH = 32  # appending n tokens one by one copies 32 n columns, where torch.cat copies n for each
_SHARE_OF_FREE = 4  # of a device's free memory, the model's own tensors need some


def with_slack(columns: int) -> int:
    """Return ``columns`` and a thirty-second more, at most 256."""
    return columns + min(_HEADROOM_TOKENS, columns // _DEVICE_GROWTH)


class Growth(Protocol):
    """Decides how many columns a buffer reserves."""

    def capacity(self, columns: int, column_bytes: int, device: torch.device) -> int:
        """Return the columns to reserve for a buffer on ``device`` that needs ``columns`` of ``column_bytes`` now."""


class Room(Growth):
    """The room that the buffers of one cache reserve.

    On a CPU, memory that is not written costs address space only, so buffers grow by half. On an accelerator they take
    the columns of the prompt, and with the first new token all columns that the turn will need at most: before that,
    tensors of the prompt need the memory. Where that number is not known, or would take more than a quarter of the free
    memory, they grow by a thirty-second, at most 256 columns.

    Args:
        layers: returns how many layers share the memory.
        free_bytes: returns the free bytes of a device. Raises ``ConfigurationError`` if the device does not tell.
    """

    def __init__(
        self, layers: Callable[[], int] = lambda: 1, free_bytes: Callable[[torch.device], int] = free_device_bytes
    ) -> None:
        self._layers = layers
        self._free_bytes = free_bytes
        self._steps: tuple[int, ...] = ()
        self._is_short: dict[torch.device, bool] = {}

    def begin_turn(self, prompt_columns: int, new_columns: int) -> None:
        """Note how many columns the prompt of a turn has, and the most that follow it; 0 if either is not known."""
        self._steps = (prompt_columns, prompt_columns + new_columns) if prompt_columns and new_columns else ()
        self._is_short.clear()

    def capacity(self, columns: int, column_bytes: int, device: torch.device) -> int:
        """Return the columns to reserve for a buffer that needs ``columns`` now.

        Args:
            columns: columns that the buffer must hold.
            column_bytes: bytes of one column of all rows.
            device: the device of the buffer.
        """
        if device.type == "cpu":
            return max(int(columns * _GROWTH), columns + _HEADROOM_TOKENS)
        for step in self._steps:
            if columns <= step and not self._memory_is_short(step - columns, column_bytes, device):
                return step
        return with_slack(columns)

    def _memory_is_short(self, columns_ahead: int, column_bytes: int, device: torch.device) -> bool:
        """Whether columns that no token has needed yet would take too much; the first answer holds for the turn."""
        if device not in self._is_short and columns_ahead:
            ahead_bytes = columns_ahead * column_bytes * self._layers()
            try:
                self._is_short[device] = ahead_bytes > self._free_bytes(device) // _SHARE_OF_FREE
            except ConfigurationError:  # the device does not tell: the allocation itself shows whether there is room
                self._is_short[device] = False
        return self._is_short.get(device, False)


@dataclass(frozen=True, slots=True)
class WindowRoom(Growth):
    """The room of a sliding layer, which never needs more than ``most_columns`` for long.

    Attributes:
        room: the room of the cache.
        most_columns: columns beyond which nothing is reserved ahead.
    """

    room: Growth
    most_columns: int

    def capacity(self, columns: int, column_bytes: int, device: torch.device) -> int:
        """Return the columns to reserve: those needed now, or as ``room`` says, but at most ``most_columns``."""
        return max(columns, min(self.most_columns, self.room.capacity(columns, column_bytes, device)))


ON_DEMAND = Room()
"""Room of buffers that belong to no turn."""
