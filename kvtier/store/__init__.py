"""Storage of prefixes between calls: blocks of K and V in RAM and on disk."""

from kvtier.store.store import PrefixStore

__all__ = ["PrefixStore"]
