"""Dry runs: what a removal would remove. Nothing is changed."""

from __future__ import annotations

from collections.abc import Iterable

from kvtier.store.manage.inventory import Forgotten, Inventory
from kvtier.store.names import Name
from kvtier.store.tiers.stack import TierStack


def would_forget(inventory: Inventory, names: Iterable[Name]) -> Forgotten:
    """Return what forgetting all of ``names`` would remove: blocks that only they use."""
    return _sum(inventory, inventory.own_together(list(names)))


def would_forget_chain(inventory: Inventory, key_prefix: str) -> Forgotten:
    """Return what ``forget_chain`` would remove.

    Raises:
        UnknownNameError: no key begins with ``key_prefix``, or several do.
    """
    _, keys, _ = inventory.keys_to(key_prefix)
    return _sum(inventory, inventory.own(keys, set()))


def would_prune(
    tiers: TierStack, inventory: Inventory, due: Iterable[Name], unused_before: float | None, to_bytes: int | None
) -> Forgotten:
    """Return what ``prune`` would remove from the files of a store, as far as no other process changes it meanwhile.

    Args:
        tiers: the tiers of the store.
        inventory: its contents.
        due: its expired names.
        unused_before: blocks that were last used before this Unix time go; None for none.
        to_bytes: blocks are evicted down to this size; None for no eviction.
    """
    gone = dict.fromkeys([*inventory.own_together(list(due)), *tiers.expired()])
    if unused_before is not None:
        gone |= dict.fromkeys(tiers.last.unused_since(unused_before))
    total = tiers.last.stats(0).nbytes
    if to_bytes is not None and total > to_bytes:
        freed = _sum(inventory, gone).nbytes
        for place in tiers.would_evict(total - to_bytes):
            if freed >= total - to_bytes:
                break
            if place.key not in gone:
                gone[place.key] = None
                freed += place.nbytes
    return _sum(inventory, gone)


def _sum(inventory: Inventory, keys: Iterable[str]) -> Forgotten:
    sums = inventory.nbytes(keys)
    return Forgotten(sums["blocks"], sums["bytes"])
