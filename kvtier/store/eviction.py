"""Who goes first: the least recently used block that no other block follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def leaf_first_lru(
    oldest_first: Iterable[str], has_children: Callable[[str], bool], protected: Callable[[str], bool]
) -> str | None:
    """Return the next block to evict, or None when all are protected or followed by another.

    A block whose child is kept must be kept too: without it the child can never be reached.

    Args:
        oldest_first: keys, the least recently used first.
        has_children: whether another block of the tier follows this one.
        protected: whether the block must stay (it is still being written).
    """
    return next((key for key in oldest_first if not has_children(key) and not protected(key)), None)
