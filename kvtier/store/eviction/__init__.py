"""Eviction policies: which block is evicted first. Pure decisions, no I/O."""

from kvtier.store.eviction.adaptive import Adaptive
from kvtier.store.eviction.base import EvictionPolicy, PolicyState, SavedSeconds, Standing, Usage
from kvtier.store.eviction.least_recently_used import LeastRecentlyUsed

__all__ = ["Adaptive", "EvictionPolicy", "LeastRecentlyUsed", "PolicyState", "SavedSeconds", "Standing", "Usage"]
