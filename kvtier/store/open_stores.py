"""One open store for each folder, shared by the caches of a process."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass, field

from kvtier.errors import ConfigurationError, StoreError
from kvtier.platform.filesystem import folder_path
from kvtier.progress import Progress
from kvtier.store.store import DEFAULT_DISK_BUDGET, PrefixStore
from kvtier.units import parse_bytes

STORE_VARIABLE = "KVTIER_STORE"
"""The environment variable that names the folder of caches without one, and of the ``kvtier store`` commands."""

_IN_RAM = ""  # the name of the store without a folder; it lives as long as the process


@dataclass(slots=True)
class _Shared:
    store: PrefixStore
    disk_budget_bytes: int
    leases: weakref.WeakSet[StoreHandle] = field(default_factory=weakref.WeakSet)


_stores: dict[str, _Shared] = {}
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a child must not find it taken by a thread of its parent
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class StoreHandle:
    """One user's handle of a shared store. Closing the last handle closes the store, unless it is in RAM.

    Args:
        folder: folder of the store; None for the one that ``KVTIER_STORE`` names, or else the store in RAM.
        disk_budget: bytes of its files, e.g. ``"20GiB"``; None for the budget of the open store, or else the default.
        progress: if this handle opens the store, it is told how far a rebuild of the catalog is.

    Raises:
        ConfigurationError: ``folder`` is empty; ``disk_budget`` is no byte count, comes without a folder, or differs
            from that of the store, which another cache of the process has opened.
        StoreError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        disk_budget: int | str | None = None,
        progress: Progress | None = None,
    ) -> None:
        budget = None if disk_budget is None else parse_bytes(disk_budget, "disk_budget")
        from_variable = folder is None and bool(os.environ.get(STORE_VARIABLE))
        if from_variable:
            folder = os.environ[STORE_VARIABLE]
        if folder is None and budget is not None:
            raise ConfigurationError(
                f"disk_budget={disk_budget!r} needs a folder: pass TieredCache(folder, disk_budget=…), or set "
                f"{STORE_VARIABLE}."
            )
        self._name = str(folder_path(folder, "store").resolve()) if folder is not None else _IN_RAM
        try:
            with _lock:
                self.store = self._take(budget, progress).store
        except StoreError as error:
            if from_variable:
                raise type(error)(f"{error} (the folder is that of the variable {STORE_VARIABLE})") from error
            raise

    def _take(self, budget_bytes: int | None, progress: Progress | None = None) -> _Shared:
        """Become a user of the store, which is opened if it is not open. The lock is held."""
        shared = _stores.get(self._name)
        if shared is None or shared.store.closed:
            opened_with = parse_bytes(DEFAULT_DISK_BUDGET, "disk_budget") if budget_bytes is None else budget_bytes
            store = PrefixStore(self._name or None, disk_budget=opened_with, progress=progress or False)
            shared = _stores[self._name] = _Shared(store, opened_with)
        elif budget_bytes not in (None, shared.disk_budget_bytes):
            raise ConfigurationError(
                f"disk_budget={budget_bytes} bytes, but this process has the store in {self._name} open with "
                f"{shared.disk_budget_bytes} bytes; pass the same to all caches of a folder, or to none but the first."
            )
        shared.leases.add(self)
        return shared

    def twin(self) -> StoreHandle:
        """Return another handle of the same store."""
        twin: StoreHandle = object.__new__(StoreHandle)
        twin._name = self._name
        with _lock:
            twin.store = twin._take(None).store
        return twin

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
