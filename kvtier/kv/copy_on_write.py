"""Copy-on-write bookkeeping for K/V buffers shared by forked caches."""

from __future__ import annotations

import threading
import weakref


class CopyOnWrite:
    """Owners (tenants) of the same buffers: all read the first columns, one may append after them.

    Guarantees: ``may_write`` is true only for columns that no other tenant reads. Thread-safe. It orders no work of
    accelerators: caches that share buffers must be used on one stream.
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
            # Columns that the tail's owner has appended are its own: a joining cache must not overwrite them.
            self._kept = max(self._kept, live, self._written)

    def leave(self, tenant: object) -> None:
        """Remove ``tenant``: it no longer reads these buffers."""
        with self._lock:
            self._tenants.discard(tenant)

    def may_write(self, tenant: object, begin: int, end: int) -> bool:
        """Whether ``tenant`` may write the columns ``[begin, end)``. If so, it also owns the columns after them."""
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
        """Number of columns that tenants may have written."""
        return max(self._kept, self._written)
