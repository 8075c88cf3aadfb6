"""Budgets and counters of offloading: smallest budget, bytes held, bytes moved."""

from __future__ import annotations

import functools
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

PREFETCH_DEPTH = 2


@functools.lru_cache(maxsize=64)
def cold_order(layers: int) -> tuple[int, ...]:
    """Return the order in which ``layers`` layers turn cold: any first few of them are spread evenly.

    The base-2 van der Corput sequence (J. G. van der Corput, 1935), whose beginnings are all spread evenly: copies for
    cold layers overlap with the hot layers between them.
    """
    bits = max(1, (layers - 1).bit_length())
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    # The last layer turns cold first: copies for the next step then overlap with the work after its attention.
    return tuple(layers - 1 - i for i in reversed_bits if i < layers)


def round_up(columns: int, page_tokens: int) -> int:
    """Return ``columns`` rounded up to whole pages."""
    return -(-columns // page_tokens) * page_tokens


def smallest_budget_bytes(
    cold_token_bytes: Sequence[int], rows: int, columns: int, page_tokens: int, hot_bytes: int = 0
) -> int:
    """Return the bytes for ``columns`` tokens when every layer that may be cold is cold.

    That is one slot per layer in flight, each as large as the largest cold layer, and the tail page of each layer.

    Args:
        cold_token_bytes: bytes of K and V of one token in each layer that may turn cold.
        rows: sequences in the batch.
        columns: tokens of the longest sequence.
        page_tokens: tokens of a page.
        hot_bytes: bytes of the layers that must stay hot.
    """
    slots = min(PREFETCH_DEPTH, len(cold_token_bytes))
    slot = max(cold_token_bytes, default=0) * rows * round_up(columns, page_tokens)
    return hot_bytes + slots * slot + sum(cold_token_bytes) * rows * page_tokens


@dataclass(slots=True)
class TransferStats:
    """Counts since a cache was made.

    Attributes:
        bytes_down: K and V written to lower tiers.
        bytes_up: K and V fetched from lower tiers, unfinished fetches included.
        waits: how often attention needed fetched pages.
        wait_seconds: time for which these waits blocked the host.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    waits: int = 0
    wait_seconds: float = 0.0

    def copy(self) -> TransferStats:
        """Return a copy of the current counts."""
        return replace(self)

    def since(self, before: TransferStats) -> TransferStats:
        """Return the counts since ``before``."""
        return TransferStats(
            self.bytes_down - before.bytes_down,
            self.bytes_up - before.bytes_up,
            self.waits - before.waits,
            self.wait_seconds - before.wait_seconds,
        )


class MemoryBudget:
    """Bytes of a budget that each owner holds. ``used_bytes`` never exceeds the limit if callers ask ``fits`` first.

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
        """Restart ``peak_bytes`` from the bytes used now."""
        self.peak_bytes = self._used
