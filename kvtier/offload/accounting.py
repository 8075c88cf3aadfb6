"""What streaming did and cost: counted, not estimated."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, replace


@dataclass(slots=True)
class TransferStats:
    """Counts since a cache was made.

    Attributes:
        bytes_down: K and V written to lower tiers.
        bytes_up: K and V that were fetched, or began to be, from lower tiers.
        waits: how often attention had to have pages that were fetched.
        wait_seconds: time that the host was held up by that.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    waits: int = 0
    wait_seconds: float = 0.0

    def copy(self) -> TransferStats:
        """Return the counts of now."""
        return replace(self)

    def since(self, before: TransferStats) -> TransferStats:
        """Return what came after ``before``."""
        return TransferStats(
            self.bytes_down - before.bytes_down,
            self.bytes_up - before.bytes_up,
            self.waits - before.waits,
            self.wait_seconds - before.wait_seconds,
        )


class MemoryBudget:
    """Who holds how many bytes of a budget. ``used`` never exceeds the limit if ``fits`` is asked first.

    Thread-safe.

    Args:
        limit_bytes: the budget; None for no limit.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self.peak_bytes = 0
        self._held: dict[Hashable, int] = {}
        self._used = 0
        self._lock = threading.RLock()

    @property
    def used_bytes(self) -> int:
        """Bytes held now."""
        return self._used

    def fits(self, nbytes: int) -> bool:
        """Whether ``nbytes`` more stay inside the limit."""
        return self.limit_bytes is None or self._used + nbytes <= self.limit_bytes

    def set(self, owner: Hashable, nbytes: int) -> None:
        """Note that ``owner`` holds ``nbytes`` now."""
        with self._lock:
            self._used += nbytes - self._held.pop(owner, 0)
            if nbytes:
                self._held[owner] = nbytes
            self.peak_bytes = max(self.peak_bytes, self._used)

    def held(self, owner: Hashable) -> int:
        """Return the bytes of ``owner``."""
        return self._held.get(owner, 0)

    def begin_peak(self) -> None:
        """Let ``peak_bytes`` be that of the time from now on."""
        self.peak_bytes = self._used
