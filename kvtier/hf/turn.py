"""One turn of a cache: what it starts from, and what happened to its rows since."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kvtier.hf.identity import Identity
from kvtier.hf.prompt import Prompt
from kvtier.hf.window import PageRun, WindowRun
from kvtier.store.chain import TokenIds, common_run
from kvtier.store.store import PrefixMatch, Restore


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """The tokens whose K and V all windows hold: token ``j`` of row ``r`` stands in column ``pads[r] + j``."""

    rows: tuple[TokenIds, ...]
    pads: tuple[int, ...]

    def best(self, tokens: TokenIds, preferred: int) -> tuple[int, int]:
        """Return the row that shares the longest run with ``tokens``, and the run; ``preferred`` wins a draw."""
        runs = [common_run(row, tokens) for row in self.rows]
        best = max(range(len(runs)), key=lambda r: (runs[r], r == preferred))
        return best, runs[best]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Where the first tokens of one row come from: ``window_tokens`` of a held row, then the store up to the limit."""

    pad: int
    window_row: int
    window_pad: int
    window_tokens: int


class TurnPrefix:
    """The known prefix of a turn, ready to be moved into windows (a ``layers.Prefix``).

    Rows share one column limit: transformers cuts a batch at one column for all rows.
    """

    def __init__(self, columns: int, plans: Sequence[RowPlan], restore: Restore | None, held_rows: int) -> None:
        self.columns = columns
        self.rows = len(plans)
        self.in_place = held_rows == len(plans) and all(
            plan.window_row == row and plan.window_pad == plan.pad for row, plan in enumerate(plans)
        )
        self.restored_bytes = 0
        self.seconds = 0.0
        self._plans = plans
        self._restore = restore
        self._started = 0.0
        self._left: set[int] = set()

    def attach(self, layers: int) -> None:
        """Expect ``layers`` layers to take the prefix."""
        self._left = set(range(layers))

    def runs(self, layer: int, row: int) -> Sequence[WindowRun | PageRun]:
        """Return where each known column of ``row`` comes from."""
        if not row:
            self._started = time.perf_counter()
        plan = self._plans[row]
        stop = min(plan.pad + plan.window_tokens, self.columns)
        runs: list[WindowRun | PageRun] = []
        if stop > plan.pad:
            runs.append(WindowRun(plan.pad, stop, plan.window_row, plan.window_pad))
        if self._restore is None or max(stop, plan.pad) >= self.columns:
            return runs
        begin = max(stop, plan.pad)
        for placed in self._restore.pages(layer, row):
            first, last = max(placed.start + plan.pad, begin), min(placed.stop + plan.pad, self.columns)
            if first < last:
                cut = slice(first - plan.pad - placed.start, last - plan.pad - placed.start)
                run = PageRun(first, last, placed.page.k_htd[:, cut], placed.page.v_htd[:, cut])
                self.restored_bytes += run.k_htd.nbytes + run.v_htd.nbytes
                runs.append(run)
        return runs

    def filled(self, layer: int) -> None:
        """Note that a layer has its bytes; the last one lets go of the store's files."""
        self.seconds += time.perf_counter() - self._started
        self._left.discard(layer)
        if not self._left and self._restore is not None:
            self._restore.finish()

    def wait(self) -> None:
        """Wait for all pages.

        Raises:
            RestoreError: a page could not be read.
        """
        if self._restore is not None:
            self._restore.wait()

    def close(self) -> None:
        """Stop reading ahead."""
        if self._restore is not None:
            self._restore.close()

    def __deepcopy__(self, memo: dict[int, object]) -> TurnPrefix:
        return self  # its pages are immutable


@dataclass(slots=True, eq=False)
class Turn:
    """A turn that has begun and is not committed.

    ``row_of[i]`` is the prompt row that cache row ``i`` continues; ``None`` until rows are known to have moved.
    """

    prompt: Prompt | None
    identity: Identity | None
    prefix: TurnPrefix | None
    reason: str | None = None
    prompt_only: bool = False
    row_of: list[int] | None = None
    match_seconds: float = 0.0
    matches: Sequence[PrefixMatch] = ()
    cached_by_tier: Mapping[str, int] = field(default_factory=dict)

    def rows_moved(self, rows: torch.Tensor, held_rows: int) -> None:
        """Note that cache row ``i`` is the former row ``rows[i]``; generated tokens can no longer be told by row."""
        if self.prompt is None:
            return
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        before = self.row_of or self.expanded(held_rows)
        self.row_of = [before[int(r)] for r in rows.tolist()]
        self.prompt_only = True

    def expanded(self, held_rows: int) -> list[int]:
        """Return the prompt row of each of ``held_rows`` cache rows as ``generate`` expands them."""
        assert self.prompt is not None
        repeats = max(1, held_rows // len(self.prompt.rows))
        return [row // repeats for row in range(held_rows)]
