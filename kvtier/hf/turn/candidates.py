"""Candidates for a turn: the parts of its prompt that the buffers and the store hold. Opens no block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvtier.hf.inputs.content_ids import ContentId
from kvtier.hf.inputs.prompt import Positions, Prompt
from kvtier.report import Divergence
from kvtier.store import PrefixStore
from kvtier.store.chain import BlockId, TokenIds, common_run
from kvtier.store.lookup import PrefixMatch


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


@dataclass(frozen=True, slots=True, eq=False)
class RowCandidates:
    """The known prefixes of one row of a prompt.

    Attributes:
        source_row: the buffer row that shares the longest prefix with it.
        device_tokens: length of that shared prefix in tokens.
        match: the longest prefix in the store.
        checkpoints: number of tokens → block whose states are valid after these tokens, the most tokens first.
    """

    source_row: int
    device_tokens: int
    match: PrefixMatch
    checkpoints: tuple[tuple[int, BlockId], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The known prefixes of a prompt.

    Attributes:
        resident: the tokens that the buffers hold.
        rows: candidates of each row of the prompt.
        known: tokens of each row whose K and V are known, as if the row were alone.
        limit: the column up to which every row is known.
        columns: the last column up to ``limit`` at which every row may be cut.
    """

    resident: ResidentPrefix | None
    rows: tuple[RowCandidates, ...]
    known: tuple[int, ...]
    limit: int
    columns: int

    def divergence(self, row: int, tokens: TokenIds) -> Divergence | None:
        """Return where ``tokens``, a row of the prompt, differ from its known prefix; None if they do not."""
        found = self.rows[row]
        if self.resident is None or found.device_tokens <= found.match.length:
            return found.match.divergence
        known, common = self.resident.rows[found.source_row], found.device_tokens
        if common == min(len(known), len(tokens)):
            return None
        return Divergence(common, int(known[common]), int(tokens[common]))


def find_candidates(
    prompt: Prompt, root: str, resident: ResidentPrefix | None, store: PrefixStore, *, states: bool
) -> Candidates:
    """Return the known prefixes of ``prompt``.

    Args:
        prompt: the prompt of the turn.
        root: root of the model that will be called.
        resident: the tokens that the buffers hold.
        store: store of the prefixes.
        states: whether the model can continue only from columns with known states.
    """
    # A row followed by padding may be known as a whole: the padding is still fed.
    usable = [len(tokens) - (not prompt.ends_early(row)) for row, tokens in enumerate(prompt.rows)]
    runs = [resident.best(tokens, row) if resident else (0, 0) for row, tokens in enumerate(prompt.rows)]
    matches = [store.match(root, tokens, n) for tokens, n in zip(prompt.rows, usable, strict=True)]
    known = tuple(min(n, max(run, m.length)) for (_, run), m, n in zip(runs, matches, usable, strict=True))
    limits = [
        prompt.columns - 1 if prompt.ends_early(row) and n == usable[row] else prompt.pads[row] + n
        for row, n in enumerate(known)
    ]
    limit = min([prompt.columns - 1, *limits])  # the model must still be fed one token
    columns = prompt.cut(limit)
    checkpoints = _checkpoints(prompt, root, store, columns) if states else [()] * len(prompt.rows)
    rows = tuple(
        RowCandidates(source, run, match, found)
        for (source, run), match, found in zip(runs, matches, checkpoints, strict=True)
    )
    return Candidates(resident, rows, known, limit, columns)


def _checkpoints(
    prompt: Prompt, root: str, store: PrefixStore, columns: int
) -> Sequence[tuple[tuple[int, BlockId], ...]]:
    """Return the checkpoints of each row; no row is padded. A single row needs only its longest checkpoint."""
    found = [
        (each for each in store.checkpoints(root, tokens, columns) if prompt.admits(each[0])) for tokens in prompt.rows
    ]
    if len(found) == 1:
        last = next(found[0], None)
        return [(last,) if last is not None else ()]
    return [tuple(each) for each in found]
