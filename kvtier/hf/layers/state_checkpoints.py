"""StateCheckpoints: states of the layers at selected columns of a turn."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kvtier.hf.layers.states import UnreadableError, move_rows, put_states, read_states, rows_of

_log = logging.getLogger("kvtier.hf")


class StateCheckpoints:
    """States of the layers of one cache at some columns of the current turn, and the column of the live states.

    A checkpoint has the states of all rows at one column. ``lose`` must be called for every change of the layers
    between turns.

    Attributes:
        live: the column after which the layers' states are valid between turns; None when it is not known.
    """

    def __init__(self) -> None:
        self.live: int | None = None
        self._taken: dict[int, list[torch.Tensor]] = {}

    @property
    def taken(self) -> bool:
        """Whether states of this turn were kept."""
        return bool(self._taken)

    def copy(self) -> StateCheckpoints:
        """Return a copy for a copy of the cache. Kept states are shared: they are never written to."""
        twin = StateCheckpoints()
        twin.live, twin._taken = self.live, dict(self._taken)
        return twin

    def lose(self) -> None:
        """Drop all checkpoints and the live column: the layers have changed."""
        self.live = None
        self._taken = {}

    def go_on(self, layers: Mapping[int, Any], repeats: int) -> None:
        """Begin a turn from the current states of the layers, with each row ``repeats`` times."""
        self.lose()
        if repeats > 1:
            for layer in layers.values():
                move_rows(layer, lambda states: states.repeat_interleave(repeats, 0))

    def put(
        self, layers: Mapping[int, Any], rows: Sequence[torch.Tensor], device: torch.device, repeats: int = 1
    ) -> None:
        """Begin a turn from kept states, one for each row; each row is put ``repeats`` times.

        Raises:
            UnreadableError: the states do not fit the layers.
        """
        self.lose()
        put_states(layers, rows, device, repeats)

    def take(self, layers: Mapping[int, Any], column: int, rows: int) -> None:
        """Keep the current states of the layers, after ``column`` columns, for each of ``rows`` prompt rows."""
        held = max(map(rows_of, layers.values()), default=0)
        if held and held % rows == 0:
            taken = self._read(layers, range(0, held, held // rows))
            if taken is not None:
                self._taken[column] = taken

    def take_last(self, layers: Mapping[int, Any], row: int) -> torch.Tensor | None:
        """Return the current states of cache row ``row``; None when they cannot be read."""
        taken = self._read(layers, (row,))
        return taken[0] if taken is not None else None

    def _read(self, layers: Mapping[int, Any], rows: Sequence[int]) -> list[torch.Tensor] | None:
        if any(getattr(layer, "record_past", False) for layer in layers.values()):
            return None  # tokens due to be cropped may still be in the states
        try:
            return [read_states(layers, row) for row in rows]
        except UnreadableError as error:
            _log.warning("the states of this turn are not kept: %s", error)
            return None

    def of(self, row: int) -> dict[int, torch.Tensor]:
        """Return the kept states of prompt row ``row``, by column."""
        return {column: taken[row] for column, taken in self._taken.items()}
