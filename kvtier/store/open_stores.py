"""One open store for each folder, shared by the caches of a process."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass, field

from kvtier.platform.filesystem import folder_path
from kvtier.progress import Progress
from kvtier.store.store import PrefixStore

_IN_RAM = ""  # the name of the store without a folder; it lives as long as the process


@dataclass(slots=True)
class _Shared:
    store: PrefixStore
    leases: weakref.WeakSet[StoreHandle] = field(default_factory=weakref.WeakSet)


_stores: dict[str, _Shared] = {}
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a child must not find it taken by a thread of its parent
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class StoreHandle:
    """One user's handle of a shared store. Closing the last handle closes the store, unless it is in RAM.

    If this handle opens the store, ``progress`` is told how far a rebuild of the catalog is.

    Raises:
        ConfigurationError: ``folder`` is empty.
        StoreError: the folder cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, progress: Progress | None = None) -> None:
        self._name = str(folder_path(folder, "store").resolve()) if folder is not None else _IN_RAM
        with _lock:
            shared = _stores.get(self._name)
            if shared is None or shared.store.closed:
                shared = _stores[self._name] = _Shared(PrefixStore(self._name or None, progress=progress or False))
            shared.leases.add(self)
        self.store = shared.store

    def twin(self) -> StoreHandle:
        """Return another handle of the same store."""
        return StoreHandle(self._name or None)

    def close(self) -> None:
        """Release the store. May be called more than once."""
        with _lock:
            shared = _stores.get(self._name)
            if shared is None or shared.store is not self.store or self not in shared.leases:
                return
            shared.leases.discard(self)
            if shared.leases or self._name == _IN_RAM:
                return
            del _stores[self._name]
        self.store.close()
