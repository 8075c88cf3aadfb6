"""Which block is evicted first: pure decisions, no I/O."""

from kvtier.store.eviction.adaptive import Adaptive, LeastRecentlyUsed
from kvtier.store.eviction.base import EvictionPolicy, PolicyState, Usage

__all__ = ["Adaptive", "EvictionPolicy", "LeastRecentlyUsed", "PolicyState", "Usage"]
