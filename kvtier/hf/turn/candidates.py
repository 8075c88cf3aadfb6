"""Candidates for a turn: which part of its prompt the buffers and the store know. Opens nothing."""

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
    """The tokens whose K and V all buffers hold: token ``j`` of row ``r`` stands in column ``pads[r] + j``.

    ``marks`` and ``positions`` are those of each row's prompt; a prompt that continues it may leave out its media.
    """

    rows: tuple[TokenIds, ...]
    pads: tuple[int, ...]
    live: int | None = None
    """The column after which the states of all rows are valid, in models that have states."""
    marks: tuple[tuple[ContentId, ...], ...] = ()
    positions: tuple[Positions, ...] = ()

    def best(self, tokens: TokenIds, preferred: int) -> tuple[int, int]:
        """Return the row that shares the longest run with ``tokens``, and the run; ``preferred`` wins a draw."""
        runs = [common_run(row, tokens) for row in self.rows]
        best = max(range(len(runs)), key=lambda r: (runs[r], r == preferred))
        return best, runs[best]

    def cut(self, columns: int) -> ResidentPrefix:
        """Return the part within the first ``columns`` columns."""
        rows = tuple(row[: max(0, columns - p)] for row, p in zip(self.rows, self.pads, strict=True))
        return replace(self, rows=rows, live=self.live if self.live == columns else None)


@dataclass(frozen=True, slots=True, eq=False)
class RowCandidates:
    """What is known of one row of a prompt.

    Attributes:
        source_row: the row of the buffers that shares most with it.
        device_tokens: how many tokens they share.
        match: the longest prefix that the store has.
        checkpoints: number of tokens → block whose states are valid after so many, the most tokens first.
    """

    source_row: int
    device_tokens: int
    match: PrefixMatch
    checkpoints: tuple[tuple[int, BlockId], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """What is known of a prompt.

    Attributes:
        resident: the tokens that the buffers hold.
        rows: by row of the prompt.
        known: tokens of each row whose K and V are known, if it were alone.
        limit: the column up to which every row is known.
        columns: the same, where every row may be cut.
    """

    resident: ResidentPrefix | None
    rows: tuple[RowCandidates, ...]
    known: tuple[int, ...]
    limit: int
    columns: int

    def divergence(self, row: int, tokens: TokenIds) -> Divergence | None:
        """Return where ``tokens``, a row of the prompt, leave what is known of it."""
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
    """Return what is known of ``prompt``.

    Args:
        prompt: its rows.
        root: of the model that will be called.
        resident: what the buffers hold.
        store: where prefixes are kept.
        states: whether the model can only go on from where its states are known.
    """
    # Where padding follows a row, it is fed that, and may be known as a whole.
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
    """Return the checkpoints of each row, none of which is padded. Of a single row, only the last is of use."""
    found = [
        (each for each in store.checkpoints(root, tokens, columns) if prompt.admits(each[0])) for tokens in prompt.rows
    ]
    if len(found) == 1:
        last = next(found[0], None)
        return [(last,) if last is not None else ()]
    return [tuple(each) for each in found]
