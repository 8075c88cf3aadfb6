"""CostBooks: what the models of one store have cost, shared by the caches of a process and kept beside their roots.

The store weighs by it what its blocks are worth: which go first, in which codec they are written, and whether at all.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

from kvtier.costs.book import CostBook
from kvtier.costs.worth import Worth

_SAVE_SECONDS = 60.0  # at least between two writes of a book that has learnt no new kind of sample
_WEIGH_SECONDS = 10.0  # at least between two fits of what the blocks of a root are worth
_MACHINES = 8  # whose costs are kept beside one root


class CostBooks:
    """One book for each root and machine. Thread-safe.

    Args:
        kept: returns what is kept of the costs of a root, for other processes.
        keep: keeps the costs of a root.
        clock: Unix time.

    Attributes:
        lock: held to read or change a book.
    """

    def __init__(
        self,
        kept: Callable[[str], Mapping[str, Any]],
        keep: Callable[[str, Mapping[str, Any]], None],
        clock: Callable[[], float],
    ) -> None:
        self._kept = kept
        self._keep = keep
        self._clock = clock
        self._books: dict[tuple[str, str], CostBook] = {}
        self._saved_at: dict[tuple[str, str], float] = {}
        self._latest: dict[str, CostBook] = {}
        self._worths: dict[str, Worth] = {}
        self._weighed: dict[str, tuple[float, CostBook, int]] = {}
        self.lock = threading.RLock()

    def book(self, root: str, machine: str) -> CostBook:
        """Return the book of ``root`` on ``machine``, with what other processes have kept."""
        with self.lock:
            found = self._books.get((root, machine))
        if found is not None:
            self._latest[root] = found
            return found
        found = CostBook(self.lock)
        kept = self._kept(root)
        for other in kept.values():  # the bytes of a token are the same everywhere
            if isinstance(other, dict):
                found.learn({"token_bytes": other.get("token_bytes")})
        if isinstance(kept.get(machine), dict):
            found.learn(kept[machine])
        with self.lock:
            found = self._latest[root] = self._books.setdefault((root, machine), found)
            return found

    # --- worth ------------------------------------------------------------------------------------------------------

    def known(self, root: str) -> CostBook | None:
        """Return the book of ``root`` that was asked for last: of the machine that computes it; None for none."""
        return self._latest.get(root)

    def weigh(self, root: str) -> None:
        """Fit what the blocks of ``root`` are worth, where enough was measured since; takes a millisecond then."""
        book = self._latest.get(root)
        if book is None:
            return
        at, of, changes = self._weighed.get(root, (-math.inf, book, -1))
        now = self._clock()
        if of is book and (book.changes == changes or (now < at + _WEIGH_SECONDS and root in self._worths)):
            return
        self._weighed[root] = now, book, book.changes
        worth = book.worth()
        if worth is not None:
            self._worths[root] = worth

    def saved_seconds(self, tier: str, root: str, tokens: int, depth_tokens: int, nbytes: int) -> float:
        """Return what a block in ``tier`` saves, as ``Usage.saved_seconds`` says; 0 where nothing is known.

        It takes no lock: tiers ask it while they hold theirs.
        """
        worth = self._worths.get(root)
        return worth.saved_seconds(tier, tokens, depth_tokens, nbytes) if worth is not None else 0.0

    def is_loaded_too_slowly(self, tier: str, root: str, tokens: int) -> bool:
        """Return whether no turn gains by loading the first ``tokens`` of a sequence from ``tier``, as measured."""
        worth = self._worths.get(root)
        return worth is not None and worth.is_loaded_too_slowly(tier, tokens)

    # --- to keep them -----------------------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether a book has learnt enough to be kept again."""
        return bool(self._to_save(self._clock() - _SAVE_SECONDS))

    def save(self, *, all_news: bool = False) -> None:
        """Keep the books that have learnt enough, or anything, beside the costs of other machines. Not reentrant."""
        now = self._clock()
        for root, machine in self._to_save(math.inf if all_news else now - _SAVE_SECONDS):
            values = self._books[root, machine].to_dict()
            self._saved_at[root, machine] = now
            others = {name: costs for name, costs in self._kept(root).items() if name != machine}
            newest = dict(list(others.items())[1 - _MACHINES :])
            self._keep(root, {**newest, machine: values})

    def _to_save(self, saved_before: float) -> list[tuple[str, str]]:
        with self.lock:
            return [*(of for of, book in self._books.items() if book.news and self._is_saved_before(of, saved_before))]

    def _is_saved_before(self, of: tuple[str, str], time: float) -> bool:
        return self._saved_at.get(of, -math.inf) <= time
