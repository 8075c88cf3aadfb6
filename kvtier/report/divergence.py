"""Divergence: the first token at which a prompt differs from its known prefix, and the text around it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ids = npt.NDArray[np.int64] | Sequence[int]

TOKENS_BEFORE = 8
TOKENS_AFTER = 16
_IN_TEXT = 1 << 31  # larger ids are hashes of images, sounds and embeddings in a chain of tokens
_MEDIA = "<image, sound or embedding>"


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token at which a prompt differs from its known prefix.

    The ids are user text. ``repr`` leaves them out, so that a logged report has none of it.

    Attributes:
        index: the place of the token in its row, padding left out.
        expected: the id that is known there.
        seen: the id in the prompt.
        before: up to 8 ids before it, which both have.
        known_after: up to 16 known ids from it on, as far as they are in the same block.
        seen_after: up to 16 ids of the prompt from it on.
    """

    index: int
    expected: int = field(repr=False)
    seen: int = field(repr=False)
    before: tuple[int, ...] = field(default=(), repr=False, compare=False)
    known_after: tuple[int, ...] = field(default=(), repr=False, compare=False)
    seen_after: tuple[int, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def at(cls, index: int, tokens: Ids, known: Ids, known_index: int | None = None) -> Divergence:
        """Return the divergence of the row ``tokens`` at ``index``.

        Args:
            index: the place of the first token that differs.
            tokens: the ids of the row.
            known: known ids, of which those before the place are equal to those of the row.
            known_index: the place in ``known``; ``index`` where ``known`` begins with the row.
        """
        there = index if known_index is None else known_index
        known_after = _ids(known[there : there + TOKENS_AFTER])
        seen_after = _ids(tokens[index : index + TOKENS_AFTER])
        before = _ids(tokens[max(0, index - TOKENS_BEFORE) : index])
        return cls(index, known_after[0], seen_after[0], before, known_after, seen_after)

    def to_dict(self, *, tokens: bool = False) -> dict[str, Any]:
        """Return the place, and with ``tokens`` the ids, as JSON types."""
        if not tokens:
            return {"index": self.index}
        return {
            "index": self.index,
            "expected": self.expected,
            "seen": self.seen,
            "before": list(self.before),
            "known_after": list(self.known_after),
            "seen_after": list(self.seen_after),
        }

    def explain(self, tokenizer: Any) -> str:
        """Return the text before the token, and on two lines how it went on and how it goes on now.

        ``tokenizer`` has a method ``decode(ids)``.
        """
        known, seen = self.known_after or (self.expected,), self.seen_after or (self.seen,)
        head = _text(tokenizer, self.before)
        lines = [f"the prompt differs from the known tokens at token {self.index:,}"]
        if head:
            lines.append(f"  after:   …{head!r}")
        lines.append(f"  known:   {_text(tokenizer, known, self.before)!r}")
        lines.append(f"  prompt:  {_text(tokenizer, seen, self.before)!r}")
        return "\n".join(lines)


def _ids(tokens: Ids) -> tuple[int, ...]:
    return tuple(map(int, tokens))


def _text(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """Return ``ids`` as text; with ``before``, as they read after these ids: some tokenizers drop a first space."""
    if all(map(_is_text, (*before, *ids))):
        head, whole = _decoded(tokenizer, before), _decoded(tokenizer, (*before, *ids))
        if whole.startswith(head):
            return whole[len(head) :]
    runs = itertools.groupby(ids, _is_text)
    return "".join(_decoded(tokenizer, tuple(run)) if is_text else _MEDIA for is_text, run in runs)


def _is_text(token: int) -> bool:
    return 0 <= token < _IN_TEXT


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids))) if ids else ""
