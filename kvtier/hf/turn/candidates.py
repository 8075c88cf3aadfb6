"""Candidates for a turn: the parts of its prompt that the buffers and the store hold. Opens no block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from kvtier.hf.inputs.prompt import Prompt, ResidentPrefix
from kvtier.hf.layers.container import LayerContainer
from kvtier.hf.layers.states import same_marks, state_marks
from kvtier.hf.turn.windows import KnownWindows, last_column, merged
from kvtier.kv.window import Window
from kvtier.report import Divergence
from kvtier.store import PrefixStore
from kvtier.store.chain import BlockId, TokenIds
from kvtier.store.reading.lookup import PrefixMatch, Span


class HeldPrefix:
    """A resident prefix, for as long as the layers are unchanged.

    Every change counts: through the cache, through a layer, or in place in a state tensor. Only a crop of buffers does
    not count, because their length shows it. Replaced state tensors live as long as this object.
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
        return replace(self.prefix.cut(lengths.pop()), base=layers.base)


@dataclass(frozen=True, slots=True, eq=False)
class RowCandidates:
    """The known prefixes of one row of a prompt.

    Attributes:
        source_row: the buffer row that shares the longest prefix with it.
        device_tokens: length of that shared prefix in tokens.
        match: the longest prefix in the store.
        checkpoints: number of tokens → block whose states are valid after these tokens, the most tokens first.
        windows: the window blocks of the store, in order.
        known_windows: what is known of sliding layers; None for models without them.
    """

    source_row: int
    device_tokens: int
    match: PrefixMatch
    checkpoints: tuple[tuple[int, BlockId], ...] = ()
    windows: tuple[Span, ...] = ()
    known_windows: KnownWindows | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The known prefixes of a prompt.

    Attributes:
        resident: the tokens that the buffers hold.
        rows: candidates of each row of the prompt.
        known: tokens of each row whose K and V are known, as if the row were alone.
        limit: the column up to which every row is known.
        known_columns: the last column up to ``limit`` at which every row may be cut.
        columns: the last column up to that at which sliding layers can go on.
        unasked: whether tiers below the store's own were not asked, because that was not expected to pay.
    """

    resident: ResidentPrefix | None
    rows: tuple[RowCandidates, ...]
    known: tuple[int, ...]
    limit: int
    known_columns: int
    columns: int
    unasked: bool = False

    @property
    def window(self) -> Window | None:
        """The columns that sliding layers need; None when no layer slides."""
        known = self.rows[0].known_windows
        return None if known is None else known.window

    def divergence(self, row: int, tokens: TokenIds) -> Divergence | None:
        """Return where ``tokens``, a row of the prompt, differ from its known prefix; None if they do not."""
        found = self.rows[row]
        if self.resident is None or found.device_tokens <= found.match.length:
            return found.match.divergence
        known, common = self.resident.rows[found.source_row], found.device_tokens
        if common == min(len(known), len(tokens)):
            return None
        return Divergence.at(common, tokens, known)


def find_candidates(
    prompt: Prompt,
    root: str,
    resident: ResidentPrefix | None,
    store: PrefixStore,
    *,
    states: bool,
    window: Window | None,
    asks_below: Callable[[int], bool] | None = None,
) -> Candidates:
    """Return the known prefixes of ``prompt``.

    With ``states``, the model continues only from known states; with a ``window``, only where sliding layers can.
    ``asks_below``: whether tiers below the store's own are asked where these have so many tokens; None asks them.
    """
    # A row followed by padding may be known as a whole: the padding is still fed.
    usable = [len(tokens) - (not prompt.ends_early(row)) for row, tokens in enumerate(prompt.rows)]
    runs = [resident.best(tokens, row) if resident else (0, 0) for row, tokens in enumerate(prompt.rows)]
    asked: list[bool] = []

    def below(held: int, asks: Callable[[int], bool], stored: int) -> bool:
        asked.append(asks(max(stored, held)))
        return asked[-1]

    matches = [
        store.match(root, tokens, n, below=partial(below, run, asks_below) if asks_below is not None else None)
        for tokens, n, (_, run) in zip(prompt.rows, usable, runs, strict=True)
    ]
    known = tuple(min(n, max(run, m.length)) for (_, run), m, n in zip(runs, matches, usable, strict=True))
    limits = [
        prompt.columns - 1 if prompt.ends_early(row) and n == usable[row] else prompt.pads[row] + n
        for row, n in enumerate(known)
    ]
    limit = min([prompt.columns - 1, *limits])  # the model must still be fed one token
    columns = known_columns = prompt.cut(limit)
    windows: list[tuple[Span, ...]] = [()] * len(prompt.rows)
    known_windows: list[KnownWindows | None] = [None] * len(prompt.rows)
    if window is not None:
        windows = [store.windows(root, tokens, m) for tokens, m in zip(prompt.rows, matches, strict=True)]
        found_windows = [
            KnownWindows(
                window,
                len(tokens),
                (max(0, resident.base - resident.pads[source]) if resident else 0, run),
                merged((span.start, span.stop) for span in spans),
            )
            for tokens, (source, run), spans in zip(prompt.rows, runs, windows, strict=True)
        ]
        columns = last_column(prompt, columns, found_windows)
        known_windows = list(found_windows)
    checkpoints = _checkpoints(prompt, root, store, columns, known_windows) if states else [()] * len(prompt.rows)
    rows = tuple(
        RowCandidates(source, run, match, found, spans, row_windows)
        for (source, run), match, found, spans, row_windows in zip(
            runs, matches, checkpoints, windows, known_windows, strict=True
        )
    )
    return Candidates(resident, rows, known, limit, known_columns, columns, not all(asked))


def _checkpoints(
    prompt: Prompt, root: str, store: PrefixStore, columns: int, windows: Sequence[KnownWindows | None]
) -> Sequence[tuple[tuple[int, BlockId], ...]]:
    """Return the checkpoints of each row; no row is padded. A single row needs only its longest checkpoint."""
    found = [
        (
            each
            for each in store.checkpoints(root, tokens, columns)
            if prompt.admits(each[0]) and (known is None or known.admit(each[0]))
        )
        for tokens, known in zip(prompt.rows, windows, strict=True)
    ]
    if len(found) == 1:
        last = next(found[0], None)
        return [(last,) if last is not None else ()]
    return [tuple(each) for each in found]
