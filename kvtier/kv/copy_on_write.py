"""Copy-on-write bookkeeping for K/V buffers shared by forked caches."""

from __future__ import annotations

import threading
import weakref


class CopyOnWrite:
    """Owners of the same buffers: all read the first columns, one may append behind them.

    Guarantees: ``may_write`` says yes only where no other tenant reads. May be asked from several threads. It orders
    no work of accelerators: what shares buffers must be used on one stream.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tenants: weakref.WeakSet[object] = weakref.WeakSet()
        self._kept = 0
        self._tail: weakref.ref[object] | None = None
        self._written = 0

    def join(self, tenant: object, other: object, live: int) -> None:
        """Let ``tenant`` and ``other`` both read the first ``live`` columns."""
        with self._lock:
            self._tenants.add(tenant)
            self._tenants.add(other)
            # What the one with the tail has appended is its own: a cache that joins must not take the tail over it.
            self._kept = max(self._kept, live, self._written)

    def leave(self, tenant: object) -> None:
        """``tenant`` reads nothing here any more."""
        with self._lock:
            self._tenants.discard(tenant)

    def may_write(self, tenant: object, begin: int, end: int) -> bool:
        """Whether ``tenant`` may write the columns ``[begin, end)``. If so, what is behind them is its own too."""
        with self._lock:
            if tenant not in self._tenants:
                return False
            if len(self._tenants) == 1:
                return True
            tail = self._tail() if self._tail is not None else None
            if begin < self._kept or (tail is not None and tail is not tenant and tail in self._tenants):
                return False
            if tail is not tenant:
                self._tail = weakref.ref(tenant)
            self._written = max(self._written, end)
            return True

    @property
    def columns(self) -> int:
        """The columns that any tenant may have written."""
        return max(self._kept, self._written)
