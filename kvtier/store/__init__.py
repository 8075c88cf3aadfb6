"""Across calls: blocks of K and V that outlive the turn, in RAM and on disk."""

from kvtier.store.store import PrefixStore

__all__ = ["PrefixStore"]
