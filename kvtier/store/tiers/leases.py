"""Leases: mark the blocks of a tier that this process is reading."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from kvtier.platform.fork_safety import Rank, take_part
from kvtier.store.tiers.block_states import State


class Leases:
    """Leases of this process on the blocks of one tier.

    Guarantees: a lease that was not ended ends when it is garbage-collected, so no block stays leased by accident.
        Thread-safe.

    Args:
        ended: called with the key of a block after its last lease, in any thread and at any moment; must take no lock.
    """

    def __init__(self, ended: Callable[[str], None] = lambda key: None) -> None:
        self._ended = ended
        self._readers: dict[str, int] = {}
        self._lock = threading.RLock()  # a lease may be collected while this thread holds it
        take_part(self, Rank.LEASES)

    def before_fork(self) -> None:
        """Wait until no thread changes anything."""
        self._lock.acquire()

    def after_fork(self, in_child: bool) -> None:
        """Release the lock."""
        self._lock.release()

    def prepare_load(self, key: str) -> BlockLease:
        """Take a lease on block ``key``. The block must be ready."""
        with self._lock:
            lease = BlockLease(self, key)
            self._readers[key] = self._readers.get(key, 0) + 1
        return lease

    def complete_load(self, key: str) -> None:
        """End one lease on ``key``."""
        with self._lock:
            left = self._readers.get(key, 0) - 1
            if left > 0:
                self._readers[key] = left
            else:
                try:
                    self._readers.pop(key, None)
                finally:  # an interrupt may come between
                    self._ended(key)

    def state(self, key: str) -> State:
        """Return the state of a ready block: ``READY`` or ``LEASED``."""
        return State.LEASED if key in self._readers else State.READY

    def __contains__(self, key: str) -> bool:
        return key in self._readers

    def __len__(self) -> int:
        return len(self._readers)


class BlockLease:
    """One reader's lease on a block; a context manager. May be ended more than once."""

    def __init__(self, leases: Leases, key: str) -> None:
        self.key = key
        self._end = weakref.finalize(self, leases.complete_load, key)
        self._end.atexit = False

    def end(self) -> None:
        """End the lease. The block can be evicted again, unless others read it."""
        self._end()

    def __enter__(self) -> BlockLease:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
