"""Siblings: blocks by their parent, ordered by their ids; neighbours are found by bisection."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from kvtier.store.chain import BlockId, TokenIds, common_run


class Siblings:
    """The blocks after each parent, sorted by the bytes of their ids.

    In that order, the common prefix of two sequences can only shrink with the distance between them. Finding a place
    reads the ids of O(log n) of n siblings. Adding and removing a block also moves the rest of a list of pointers, 8
    bytes each, in one memory copy. Not thread-safe.
    """

    def __init__(self, blocks: Iterable[BlockId] = ()) -> None:
        self._after: dict[str, list[BlockId]] = {}
        self._windows: set[str] = set()  # keys of window blocks
        for block in blocks:
            self._note(block)
            self._after.setdefault(block.parent, []).append(block)
        for siblings in self._after.values():
            siblings.sort(key=_bytes_of)

    def _note(self, block: BlockId) -> None:
        if block.is_window:
            self._windows.add(block.key)

    def add(self, block: BlockId) -> None:
        """Add a new block."""
        self._note(block)
        siblings = self._after.setdefault(block.parent, [])
        siblings.insert(bisect_right(siblings, _bytes_of(block), key=_bytes_of), block)

    def remove(self, block: BlockId) -> None:
        """Remove a block, which must be present."""
        siblings = self._after[block.parent]
        index = bisect_left(siblings, _bytes_of(block), key=_bytes_of)
        while siblings[index].key != block.key:  # blocks of different kinds may have the same ids
            index += 1
        del siblings[index]
        self._windows.discard(block.key)
        if not siblings:
            del self._after[block.parent]

    def count(self, parent: str) -> int:
        """Return how many blocks follow ``parent``."""
        return len(self._after.get(parent, ()))

    def nearest(
        self, parent: str, tokens: TokenIds, is_found: Callable[[str], bool], *, windows: bool = False
    ) -> BlockId | None:
        """Return a block after ``parent`` with the longest common prefix with ``tokens``; None when there is none.

        Only blocks whose key passes ``is_found`` count; of them window blocks alone with ``windows``, and all others
        without. The rest beside ``tokens`` is skipped one by one.
        """
        siblings = self._after.get(parent, [])
        index = bisect_right(siblings, _as_bytes(tokens), key=_bytes_of)
        beside = (range(index - 1, -1, -1), range(index, len(siblings)))

        def counts(block: BlockId) -> bool:
            return (block.key in self._windows) == windows and is_found(block.key)

        sides = (next((siblings[i] for i in side if counts(siblings[i])), None) for side in beside)
        found = [block for block in sides if block is not None]
        return max(found, key=lambda block: common_run(block.tokens, tokens), default=None)

    def tails(self, parent: str, tokens: TokenIds) -> Iterator[BlockId]:
        """Yield the blocks after ``parent`` whose ids are a proper prefix of ``tokens``, the longest first."""
        siblings = self._after.get(parent, [])
        shared = len(tokens) - 1
        while shared >= 0:
            # A remaining tail has at most ``shared`` ids, so its bytes do not sort after those of ``tokens[:shared]``.
            index = bisect_right(siblings, _as_bytes(tokens[:shared]), key=_bytes_of) - 1
            if index < 0:
                return
            length = len(siblings[index].tokens)
            shared = common_run(siblings[index].tokens, tokens)
            if shared == length:
                first = bisect_left(siblings, _as_bytes(tokens[:length]), key=_bytes_of)
                yield from siblings[first : index + 1]  # blocks of all kinds of the same ids
                shared -= 1


def _as_bytes(tokens: TokenIds) -> bytes:
    return np.ascontiguousarray(tokens, dtype="<i8").tobytes()


def _bytes_of(block: BlockId) -> bytes:
    return _as_bytes(block.tokens)
