"""Window: the columns that a layer with sliding attention keeps."""

from __future__ import annotations

from dataclasses import dataclass

from kvtier.kv.base import first_visible

_SPARE_SHARE = 10  # of the kept columns: a tenth more, so that dropping columns is rare
_LEAST_SPARE = 8


Range = tuple[int, int]
"""``[begin, end)`` of tokens or columns."""


@dataclass(frozen=True, slots=True)
class Window:
    """The tokens before a position that a layer with sliding attention needs there.

    Attributes:
        visible: tokens that a token sees, itself included.
        block_tokens: tokens of a block of the store: a commit completes the block that a turn begins in.
    """

    visible: int
    block_tokens: int = 1

    @property
    def needed(self) -> int:
        """Most columns that any token needs, itself included, wherever the blocks of its row begin."""
        return max(self.visible, self.block_tokens)

    def first_token(self, tokens: int) -> int:
        """Return the first token that a sequence needs to go on after ``tokens`` tokens."""
        return min(first_visible(tokens, self.visible), tokens // self.block_tokens * self.block_tokens)

    def first_kept(self, columns: int) -> int:
        """Return the first column that any row needs to go on after ``columns`` columns, wherever its blocks begin."""
        return max(0, columns - self.needed + 1)

    @property
    def most_columns(self) -> int:
        """Columns worth reserving: the needed ones and a spare tenth, so that not each token moves the others."""
        kept = self.needed - 1
        return kept + max(_LEAST_SPARE, kept // _SPARE_SHARE)
