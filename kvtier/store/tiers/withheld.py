"""Blocks that could not be read a moment ago: they are found again only after a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class Withheld:
    """Blocks that are not to be found for a while, since they could not be read. Nothing of them is forgotten.

    Args:
        clock: Unix time.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pauses: dict[str, WriteBackoff] = {}

    def add(self, keys: Iterable[str]) -> None:
        """Withhold blocks, each for longer than the last time."""
        if len(self._pauses) > _MOST_WITHHELD:
            self._pauses = {key: backoff for key, backoff in self._pauses.items() if backoff.holds()}
        for key in keys:
            self._pauses.setdefault(key, WriteBackoff(self._clock)).begin("it could not be read", told=False)

    def __contains__(self, key: str) -> bool:
        backoff = self._pauses.get(key)
        return backoff is not None and backoff.holds()
