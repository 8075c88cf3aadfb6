"""Backoff: delays retries after a full drive, a locked catalog or an unreadable block."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable, Iterable

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FIRST_SECONDS = 1.0
_LONGEST_SECONDS = 60.0
_MOST_WITHHELD = 10_000  # number of pauses above which finished pauses are dropped


def is_full(error: BaseException) -> bool:
    """Whether ``error`` says that the drive, or the user's quota of it, is full."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, sqlite3.OperationalError) and "full" in str(error)


def is_locked(error: BaseException) -> bool:
    """Whether ``error`` says that another process holds a lock on a database."""
    return isinstance(error, sqlite3.OperationalError) and "lock" in str(error)  # "database is locked" and others


class Backoff:
    """Pauses attempts after failures. Each failure doubles the pause, from a second to a minute; a success ends it.

    Args:
        clock: Unix time.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until = 0.0
        self._seconds = 0.0
        self.reason: str | None = None
        self.told = False

    def begin(self, reason: str, *, told: bool) -> None:
        """Begin a pause, longer than the last one.

        Args:
            reason: text for reports.
            told: whether free space shows the problem (quotas and inode limits do not), and so will show its end.
        """
        self.told = told
        self._seconds = min(_LONGEST_SECONDS, max(_FIRST_SECONDS, 2 * self._seconds))
        self._until = self._clock() + self._seconds
        self.reason = reason

    def holds(self) -> bool:
        """Whether the pause still lasts. After it, an attempt may show whether the reason is gone."""
        return self.reason is not None and self._until - self._seconds <= self._clock() < self._until

    def end(self) -> bool:
        """End the pause. Returns whether there was one."""
        paused, self.reason, self._seconds = self.reason is not None, None, 0.0
        return paused


class Withheld:
    """Unreadable blocks that lookups skip for a while. They stay stored.

    Args:
        clock: Unix time.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pauses: dict[str, Backoff] = {}

    def add(self, keys: Iterable[str]) -> None:
        """Withhold blocks, each for longer than the last time."""
        if len(self._pauses) > _MOST_WITHHELD:
            self._pauses = {key: backoff for key, backoff in self._pauses.items() if backoff.holds()}
        for key in keys:
            self._pauses.setdefault(key, Backoff(self._clock)).begin("it could not be read", told=False)

    def __contains__(self, key: str) -> bool:
        backoff = self._pauses.get(key)
        return backoff is not None and backoff.holds()
