"""Prompts, and the tokens that a cache holds: one row of tokens per sequence, without padding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from kvtier.errors import PromptError
from kvtier.hf.inputs.content_ids import ContentId, marked
from kvtier.hf.not_reusable import NotReusable
from kvtier.store.chain import TokenIds, common_run

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A batch of sequences as the model sees them: ``columns`` wide, row ``r`` begins after ``pads[r]`` columns.

    The columns before and after the tokens of a row are padding.
    """

    rows: tuple[TokenIds, ...]
    pads: tuple[int, ...]
    columns: int
    returned: int | None = None
    """Prompt columns that ``generate`` returns before the new tokens; None if it returns all of them."""
    wholes: tuple[tuple[int, int], ...] = ()
    """``(first, end)``: columns inside which no reused prefix may end."""
    unproven: int = 0
    """Number of last columns of a match that prove the columns before them, but are not proven themselves."""
    answer_follows: bool = True
    """Whether generated ids, with the columns before them, decide their K and V completely."""
    marks: tuple[tuple[ContentId, ...], ...] = ()
    """The marks of each row; the last mark may reach beyond the row's end. Empty when no row has marks."""
    plain: bool = True
    """Whether ids are the only input."""
    positions: tuple[Positions, ...] = ()
    """``[axes, tokens]`` of each row; empty when the order of tokens gives their positions."""
    needed: int = 0
    """Columns that must come from the cache: they contain media that were not passed, and cannot be computed."""
    ids: tuple[TokenIds, ...] = ()
    """The ids of each row as passed; empty unless columns are ``needed``."""

    def continued(self, row: int, ids: TokenIds) -> TokenIds:
        """Return the chain ids of ``row`` followed by generated ``ids``."""
        known = self.rows[row]
        return np.concatenate([known, marked(ids, self.marks[row], len(known)) if self.marks else ids])

    def admits(self, columns: int) -> bool:
        """Whether a reused prefix may end after ``columns`` columns."""
        return not any(first < columns < end for first, end in self.wholes)

    def cut(self, columns: int) -> int:
        """Return how many of the first ``columns`` columns, which match a stored prefix, may be reused."""
        return self.last_admitted(max(0, columns - self.unproven))

    def last_admitted(self, columns: int) -> int:
        """Return the last column, up to ``columns``, after which a reused prefix may end."""
        while inside := [first for first, end in self.wholes if first < columns < end]:
            columns = min(inside)
        return columns

    @property
    def is_padded(self) -> bool:
        """Whether any row has padding."""
        return any(len(tokens) < self.columns for tokens in self.rows)

    def ends_early(self, row: int) -> bool:
        """Whether padding follows the tokens of ``row``: generated tokens are then not adjacent to them."""
        return self.pads[row] + len(self.rows[row]) < self.columns

    def table(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return the ids ``[rows, columns]``, 0 for padding, and which of the columns are no padding."""
        ids = np.zeros((len(self.rows), self.columns), np.int64)
        real = np.zeros(ids.shape, np.bool_)
        for row, (tokens, pad) in enumerate(zip(self.rows, self.pads, strict=True)):
            ids[row, pad : pad + len(tokens)], real[row, pad : pad + len(tokens)] = tokens, True
        return ids, real

    def begins(self, sequences: torch.Tensor) -> bool:
        """Whether ``sequences [rows, columns]`` begin with this prompt, each row of it repeated equally often."""
        rows = sequences.shape[0]
        if rows % len(self.rows) or sequences.shape[1] < self.columns:
            return False
        repeats = rows // len(self.rows)
        ids = sequences[:, : self.columns].detach().to("cpu", torch.int64).numpy()
        own = self.ids or self.rows
        places = [slice(pad, pad + len(tokens)) for tokens, pad in zip(own, self.pads, strict=True)]
        return all(np.array_equal(ids[r, places[r // repeats]], own[r // repeats]) for r in range(rows))


@dataclass(frozen=True, slots=True, eq=False)
class ResidentPrefix:
    """The tokens whose K and V all buffers hold: token ``j`` of row ``r`` is in column ``pads[r] + j``.

    Sliding layers hold only the columns from ``base`` on. ``marks`` and ``positions`` belong to each row's prompt; a
    prompt that continues it may leave out its media.
    """

    rows: tuple[TokenIds, ...]
    pads: tuple[int, ...]
    live: int | None = None
    """The column after which the states of all rows are valid, in models that have states."""
    marks: tuple[tuple[ContentId, ...], ...] = ()
    positions: tuple[Positions, ...] = ()
    base: int = 0

    def best(self, tokens: TokenIds, preferred: int) -> tuple[int, int]:
        """Return the row with the most leading tokens of ``tokens``, and their number; ``preferred`` wins a tie."""
        runs = [common_run(row, tokens) for row in self.rows]
        best = max(range(len(runs)), key=lambda r: (runs[r], r == preferred))
        return best, runs[best]

    def cut(self, columns: int) -> ResidentPrefix:
        """Return the part within the first ``columns`` columns."""
        rows = tuple(row[: max(0, columns - p)] for row, p in zip(self.rows, self.pads, strict=True))
        return replace(self, rows=rows, live=self.live if self.live == columns else None)


def read_prompt(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Prompt | NotReusable:
    """Split ``input_ids [batch, columns]`` into rows without padding, which may be on both sides.

    Raises:
        PromptError: the mask has another shape than the ids.
    """
    if input_ids.ndim != 2:
        return NotReusable(f"input_ids have {input_ids.ndim} dimensions")
    batch, columns = input_ids.shape
    ids = input_ids.detach().to("cpu", torch.int64).numpy()
    if attention_mask is None:
        return Prompt(tuple(ids[r].copy() for r in range(batch)), (0,) * batch, columns)
    if attention_mask.ndim != 2:
        return NotReusable(f"the attention mask has {attention_mask.ndim} dimensions")
    if tuple(attention_mask.shape) != (batch, columns):
        raise PromptError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {(batch, columns)}: pass the whole "
            "conversation as input_ids with a mask of the same shape; the cache finds what it knows by itself"
        )
    shown = attention_mask.detach() != 0
    if not bool((shown == (attention_mask == 1)).all()):
        return NotReusable("the attention mask has values besides 0 and 1")  # models sum the mask to count positions
    mask = shown.to("cpu").numpy()  # NumPy has not every dtype that a mask may have
    counts = mask.sum(axis=1)
    pads = np.where(counts > 0, mask.argmax(axis=1), columns) if columns else counts
    places = [slice(int(pad), int(pad + count)) for pad, count in zip(pads, counts, strict=True)]
    if not all(mask[r, place].all() for r, place in enumerate(places)):
        return NotReusable("the attention mask has holes")
    return Prompt(
        tuple(ids[r, place].copy() for r, place in enumerate(places)), tuple(p.start for p in places), columns
    )
