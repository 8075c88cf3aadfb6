"""CostBooks: what the models of one store have cost, shared by the caches of a process and kept beside their roots."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from kvtier.costs.book import CostBook
from kvtier.store.tiers.stack import TierStack

_SAVE_SECONDS = 60.0  # at least between two writes of a book that has learnt no new kind of sample
_MACHINES = 8  # whose costs are kept beside one root


class CostBooks:
    """One book for each root and machine. Thread-safe.

    Args:
        tiers: the tiers of the store, which keep books for other processes.
        clock: Unix time.

    Attributes:
        lock: held to read or change a book.
    """

    def __init__(self, tiers: TierStack, clock: Callable[[], float]) -> None:
        self._tiers = tiers
        self._clock = clock
        self._books: dict[tuple[str, str], CostBook] = {}
        self._saved_at: dict[tuple[str, str], float] = {}
        self.lock = threading.RLock()

    def book(self, root: str, machine: str) -> CostBook:
        """Return the book of ``root`` on ``machine``, with what other processes have kept."""
        with self.lock:
            found = self._books.get((root, machine))
        if found is not None:
            return found
        found = CostBook(self.lock)
        kept = self._tiers.costs(root)
        for other in kept.values():  # the bytes of a token are the same everywhere
            if isinstance(other, dict):
                found.learn({"token_bytes": other.get("token_bytes")})
        if isinstance(kept.get(machine), dict):
            found.learn(kept[machine])
        with self.lock:
            return self._books.setdefault((root, machine), found)

    def due(self) -> bool:
        """Whether a book has learnt enough to be kept again."""
        return bool(self._to_save(self._clock() - _SAVE_SECONDS))

    def save(self, *, all_news: bool = False) -> None:
        """Keep the books that have learnt enough, or anything, beside the costs of other machines. Not reentrant."""
        now = self._clock()
        for root, machine in self._to_save(math.inf if all_news else now - _SAVE_SECONDS):
            values = self._books[root, machine].to_dict()
            self._saved_at[root, machine] = now
            others = {name: costs for name, costs in self._tiers.costs(root).items() if name != machine}
            newest = dict(list(others.items())[1 - _MACHINES :])
            self._tiers.keep_costs(root, {**newest, machine: values})

    def _to_save(self, saved_before: float) -> list[tuple[str, str]]:
        with self.lock:
            return [
                of
                for of, book in self._books.items()
                if book.news and self._saved_at.get(of, -math.inf) <= saved_before
            ]
