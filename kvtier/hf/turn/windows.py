"""Where a prompt can go on in a model with sliding layers, and which of their columns a turn keeps: pure functions.

A sliding layer needs only the tokens that the next token sees. They are known at some places only: where a turn ended,
where prompts branched, and now and then within a long prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvtier.hf.inputs.prompt import Prompt
from kvtier.hf.turn.cost import Costs
from kvtier.kv.base import first_visible
from kvtier.kv.window import Range, Window


def merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return the union of ``ranges``, in order and without neighbours that touch."""
    union: list[Range] = []
    for begin, end in sorted(each for each in ranges if each[0] < each[1]):
        if union and begin <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((begin, end))
    return tuple(union)


def common(ranges: Sequence[Range], others: Sequence[Range]) -> tuple[Range, ...]:
    """Return the intersection of two unions of ranges."""
    return merged((max(a, c), min(b, d)) for a, b in ranges for c, d in others)


@dataclass(frozen=True, slots=True)
class KnownWindows:
    """What is known of the sliding layers for one row of a prompt.

    Attributes:
        window: the columns that the layers need.
        tokens: tokens of the row.
        held: the first tokens of the row that a held row shares, as far as its sliding layers still have them; the
            first number is where they begin, the second how many tokens are shared.
        stored: the tokens of which the store has window blocks, merged.
    """

    window: Window
    tokens: int
    held: Range
    stored: tuple[Range, ...]

    def from_held(self, tokens: int) -> bool:
        """Whether the held row has all shared tokens that are needed after ``tokens`` tokens."""
        return self.held[0] <= self.window.first_token(tokens)

    def admit(self, tokens: int) -> bool:
        """Whether a prompt can go on after ``tokens`` tokens."""
        first = self.window.first_token(tokens)
        begin = max(first, self.held[1]) if self.from_held(tokens) else first
        end = min(tokens, self.tokens)
        return begin >= end or any(a <= begin and end <= b for a, b in self.stored)

    def last(self, limit: int) -> int:
        """Return the most tokens, up to ``limit``, after which a prompt can go on."""
        ends = (self.held[1], *(end for _, end in self.stored))
        # The more tokens of a range, the later they begin: its last token decides whether any admits.
        places = {limit, *(min(end, limit) for end in ends if end < self.tokens)}
        return max((tokens for tokens in places if self.admit(tokens)), default=0)


def last_column(prompt: Prompt, limit: int, rows: Sequence[KnownWindows]) -> int:
    """Return the last column, up to ``limit``, at which all rows of ``prompt`` can go on; 0 for none."""
    column = limit
    while column:
        later = [(row, pad) for row, pad in zip(rows, prompt.pads, strict=True) if pad < column]
        lower = prompt.last_admitted(min([column, *(pad + row.last(column - pad) for row, pad in later)]))
        if lower == column:
            break
        column = lower
    return column


def first_column(prompt: Prompt, columns: int, window: Window) -> int:
    """Return the first column that sliding layers need to go on after ``columns`` columns; padding is seen, too."""
    tokens = [pad + window.first_token(columns - pad) for pad in prompt.pads if pad < columns]
    return min(first_visible(columns, window.visible), *tokens) if tokens else columns


def wanted_columns(prompt: Prompt, begin: int, branch: int, window: Window, costs: Costs) -> tuple[Range, ...]:
    """Return the columns of sliding layers to keep of a prompt whose first ``begin`` columns are reused.

    A later prompt can go on at the end, a little before it, where this prompt left a known one (``branch``), and at a
    distance from each other within a long prompt; anywhere in a prompt shorter than that distance.
    """
    spacing = max(costs.window_spacing_tokens, costs.window_spacing_windows * window.visible)
    if prompt.columns <= spacing:
        return ((0, prompt.columns),)
    places = {pad + tokens for pad in prompt.pads for tokens in range(0, prompt.columns, spacing)}
    if branch - begin >= costs.checkpoint_worth_tokens:
        places.add(branch)
    kept = window.needed + window.block_tokens  # from the beginning of a block on
    ranges = [(place - kept, place) for place in places if begin < place <= prompt.columns]
    ranges.append((prompt.columns - kept - costs.window_margin_tokens, prompt.columns))
    return merged((max(0, first), end) for first, end in ranges)
