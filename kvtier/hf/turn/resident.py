"""The tokens whose K and V the buffers of a cache hold between turns."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvtier.hf.inputs.content_ids import ContentId
from kvtier.hf.inputs.prompt import Positions
from kvtier.hf.layers.container import LayerContainer
from kvtier.hf.layers.states import same_marks, state_marks
from kvtier.store.chain import TokenIds, common_run


@dataclass(frozen=True, slots=True, eq=False)
class ResidentPrefix:
    """The tokens whose K and V all buffers hold: token ``j`` of row ``r`` is in column ``pads[r] + j``.

    ``marks`` and ``positions`` belong to each row's prompt; a prompt that continues it may leave out its media.
    """

    rows: tuple[TokenIds, ...]
    pads: tuple[int, ...]
    live: int | None = None
    """The column after which the states of all rows are valid, in models that have states."""
    marks: tuple[tuple[ContentId, ...], ...] = ()
    positions: tuple[Positions, ...] = ()

    def best(self, tokens: TokenIds, preferred: int) -> tuple[int, int]:
        """Return the row with the most leading tokens of ``tokens``, and their number; ``preferred`` wins a tie."""
        runs = [common_run(row, tokens) for row in self.rows]
        best = max(range(len(runs)), key=lambda r: (runs[r], r == preferred))
        return best, runs[best]

    def cut(self, columns: int) -> ResidentPrefix:
        """Return the part within the first ``columns`` columns."""
        rows = tuple(row[: max(0, columns - p)] for row, p in zip(self.rows, self.pads, strict=True))
        return replace(self, rows=rows, live=self.live if self.live == columns else None)


class HeldPrefix:
    """A resident prefix, for as long as the layers are unchanged.

    Every change counts: through the cache, through a layer, or in place in a state tensor. Only a crop of buffers does
    not count, because their length shows it. Replaced state tensors live as long as this object.

    Args:
        prefix: the tokens that ``layers`` hold now.
        layers: layers of the cache.
    """

    def __init__(self, prefix: ResidentPrefix, layers: LayerContainer) -> None:
        self.prefix = prefix
        self._attention = [(layer, layer.changes) for layer in layers.attention]
        self._states = [(layer, state_marks(layer)) for layer in layers.states.values()]

    def is_in(self, layers: LayerContainer) -> bool:
        """Whether ``layers`` are the same, and unchanged."""
        attention, states = layers.attention, layers.states.values()
        return (
            len(attention) == len(self._attention)
            and len(states) == len(self._states)
            and all(a is b and a.changes == n for a, (b, n) in zip(attention, self._attention, strict=True))
            and all(a is b and same_marks(state_marks(a), m) for a, (b, m) in zip(states, self._states, strict=True))
        )

    def now(self, layers: LayerContainer) -> ResidentPrefix | None:
        """Return the tokens that all buffers still hold, cut to their length: a crop between turns shortens it.

        None when any other change of a layer has happened since.
        """
        if not layers.layers or not self.is_in(layers):
            return None
        if not layers.attention:
            return self.prefix
        lengths = {layer.length for layer in layers.filled}
        if len(lengths) != 1 or not all(layer.complete for layer in layers.filled):
            return None
        return self.prefix.cut(lengths.pop())
