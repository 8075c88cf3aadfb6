"""TurnProgress: how far the prompt of a running turn is computed, and its known prefix loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvtier.progress import LOAD, PREFILL, Progress, Task

if TYPE_CHECKING:
    from kvtier.hf.turn.turn import Turn


def progress_of_turn(turn: Turn, progress: Progress, layers: int, *, by_layer: bool) -> TurnProgress | None:
    """Return what counts the passes and loads of ``turn``, which begins now; None without a prompt.

    Args:
        turn: the turn; its layers report to the result from now on.
        progress: is told.
        layers: layers of the model.
        by_layer: whether the device computes a layer before the next one is asked for.
    """
    if turn.prompt is None:
        return None
    begin = turn.meeting.begin if turn.meeting is not None else turn.reused_columns
    found = TurnProgress(progress, turn.prompt.columns, begin, len(turn.prompt.rows), layers, by_layer=by_layer)
    if turn.meeting is not None:
        found.loading(turn.meeting.fetch.job.nbytes)
    elif turn.prefix is not None and turn.prefix.job is not None:
        job = turn.prefix.job
        found.loading(job.nbytes, [spec.token_bytes for spec in job.spec.layers])
        turn.prefix.on_landed = found.landed
    return found


class TurnProgress:
    """Counts the forward passes and loaded layers of one turn, as the cache sees them. It changes no pass.

    On a CPU, a pass is counted layer by layer, since a layer is asked for after those before it were computed. On an
    accelerator, a layer is asked for long before that: a pass counts when the next one begins.

    Args:
        progress: is told.
        columns: columns of the prompt.
        begin: columns that need not be computed.
        rows: rows of the prompt.
        layers: layers of the model.
        by_layer: whether the device computes a layer before the next one is asked for.
    """

    def __init__(self, progress: Progress, columns: int, begin: int, rows: int, layers: int, *, by_layer: bool) -> None:
        self._progress = progress
        self._columns, self._rows, self._layers = columns, max(1, rows), max(1, layers)
        self._by_layer = by_layer
        self._computed = 0  # columns, by passes that have ended
        self._at = begin  # the column at which the running pass began
        self._running = 0  # columns of the running pass
        self._pass = 0
        self._prefill = progress.begin(PREFILL, (columns - begin) * self._rows, "tokens")
        self._load: Task | None = None
        self._weights: Sequence[int] = ()
        self._landed: set[int] = set()

    # --- the prompt -------------------------------------------------------------------------------------------------

    def appending(self, layer: int, begin: int, columns: int, number: int) -> bool:
        """Note that ``layer`` gets ``columns`` columns after ``begin``, in the forward pass ``number`` of the turn.

        Return whether the prompt is still being computed.
        """
        if number != self._pass:
            self._pass = number
            if not self._begin_pass(begin, columns):
                return False
        elif self._by_layer:
            done = self._computed + self._running * min(layer, self._layers) / self._layers
            self._prefill.to(int(done * self._rows))
        return True

    def reached(self, column: int) -> None:
        """Note that passes have ended that fed all columns before ``column``."""
        if column > self._at:
            self._computed += column - self._at
            self._at, self._running = column, 0
            self._prefill.to(self._computed * self._rows)

    def _begin_pass(self, begin: int, columns: int) -> bool:
        self._end_pass()
        if begin >= self._columns:
            if self._load is not None:
                self._load.end()
            self.end(whole=False)
            return False
        self._at, self._running = begin, min(columns, self._columns - begin)
        left = self._columns - begin
        self._prefill.to(self._computed * self._rows, (self._computed + left) * self._rows)
        return True

    def _end_pass(self) -> None:
        self._computed += self._running
        self._at, self._running = self._at + self._running, 0
        self._prefill.to(self._computed * self._rows)

    # --- the known prefix -------------------------------------------------------------------------------------------

    def loading(self, nbytes: int, token_bytes: Sequence[int] = ()) -> None:
        """Note that ``nbytes`` bytes begin to load, for layers of which a token has ``token_bytes``."""
        if nbytes > 0:
            self._load, self._weights = self._progress.begin(LOAD, nbytes, "bytes"), token_bytes
            self._landed.clear()

    def landed(self, layer: int) -> None:
        """Note that all pages of ``layer`` have landed."""
        if self._load is None or not 0 <= layer < len(self._weights):
            return
        self._landed.add(layer)
        share = sum(self._weights[each] for each in self._landed) / max(1, sum(self._weights))
        if len(self._landed) == len(self._weights) or share >= 1:
            self._load.end()
        else:
            self._load.to(int(self._load.total * share))

    def arrived(self, share: float) -> None:
        """Note that a ``share`` of the bytes has arrived."""
        if self._load is not None:
            self._load.to(int(self._load.total * share))

    def joined(self) -> None:
        """Note that nothing more is loaded than has arrived: the rest was computed meanwhile."""
        if self._load is not None:
            self._load.to(self._load.done, self._load.done)
            self._load.end()

    def end(self, *, whole: bool) -> None:
        """Note that the turn has ended; ``whole``: no forward pass was interrupted. May be called more than once."""
        if whole:
            self._end_pass()
        self._prefill.end(complete=False)
        if self._load is not None:
            self._load.end(complete=False)
