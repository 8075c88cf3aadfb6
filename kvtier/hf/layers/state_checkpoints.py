"""StateCheckpoints: states of the layers at the columns of a turn where it pays to keep them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kvtier.hf.layers.states import UnreadableError, move_rows, put_states, read_states, rows_of

_log = logging.getLogger("kvtier.hf")


class StateCheckpoints:
    """What the layers with states of one cache had at some columns of the current turn, and where they are now.

    States are of all rows at one column. Every change of the layers between turns must be announced by ``lose``.

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
        """Return the same for a second cache that holds the same; states that were taken are never written to."""
        twin = StateCheckpoints()
        twin.live, twin._taken = self.live, dict(self._taken)
        return twin

    def lose(self) -> None:
        """Know nothing: the layers hold something else now."""
        self.live = None
        self._taken = {}

    def go_on(self, layers: Mapping[int, Any], repeats: int) -> None:
        """Begin a turn that goes on from where the layers are, each row ``repeats`` times."""
        self.lose()
        if repeats > 1:
            for layer in layers.values():
                move_rows(layer, lambda states: states.repeat_interleave(repeats, 0))

    def put(
        self, layers: Mapping[int, Any], rows: Sequence[torch.Tensor], device: torch.device, repeats: int = 1
    ) -> None:
        """Begin a turn that goes on from states that were kept, one for each row; each is put ``repeats`` times.

        Raises:
            UnreadableError: they are not of such layers.
        """
        self.lose()
        put_states(layers, rows, device, repeats)

    def take(self, layers: Mapping[int, Any], column: int, rows: int) -> None:
        """Keep what the layers have now, after ``column`` columns, for each of ``rows`` prompt rows."""
        held = max(map(rows_of, layers.values()), default=0)
        if held and held % rows == 0:
            taken = self._read(layers, range(0, held, held // rows))
            if taken is not None:
                self._taken[column] = taken

    def take_last(self, layers: Mapping[int, Any], row: int) -> torch.Tensor | None:
        """Return what the layers have now of cache row ``row``; None when it cannot be told."""
        taken = self._read(layers, (row,))
        return taken[0] if taken is not None else None

    def _read(self, layers: Mapping[int, Any], rows: Sequence[int]) -> list[torch.Tensor] | None:
        if any(getattr(layer, "record_past", False) for layer in layers.values()):
            return None  # what was to be taken back may still be in them
        try:
            return [read_states(layers, row) for row in rows]
        except UnreadableError as error:
            _log.warning("the states of this turn are not kept: %s", error)
            return None

    def of(self, row: int) -> dict[int, torch.Tensor]:
        """Return what was kept of prompt row ``row``, by column."""
        return {column: taken[row] for column, taken in self._taken.items()}
