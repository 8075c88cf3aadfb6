"""Prefixes that outlive a call: blocks of K and V in RAM and on disk."""

from kvtier.store.store import PrefixStore

__all__ = ["PrefixStore"]
