"""Fork safety: locks, threads and files that must be at rest while the process forks.

A lock or a half-done change of another thread would stay so in the child forever. SQLite remembers the locks of its
process, and would take the parent's for the child's: it forbids carrying a connection, even an idle one, across a
fork. So each owner of such a resource comes to rest before a fork, and goes on after it, in both processes.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from enum import IntEnum
from typing import Protocol


class Rank(IntEnum):
    """The order in which locks are taken: the holder of a lock may wait for later locks, never for earlier ones."""

    STORE = 0
    HOST = 1
    LOADS = 2
    DISK = 3
    DATABASE = 4
    LEASES = 5
    DESCRIPTORS = 6
    FILE_LEASES = 7
    OWNER = 8


class Forkable(Protocol):
    """Something that must be at rest when the process forks."""

    def before_fork(self) -> None:
        """Come to rest; block other threads until ``after_fork``, which is not called if this method raises."""

    def after_fork(self, in_child: bool) -> None:
        """Go on."""


_members: weakref.WeakKeyDictionary[Forkable, tuple[Rank, int]] = weakref.WeakKeyDictionary()
"""Member → its rank, and its number in order of joining: members of one rank never wait for each other."""
_numbers = itertools.count()
_resting: list[Forkable] = []
_lock = threading.Lock()


def take_part(member: Forkable, rank: Rank) -> None:
    """Notify ``member``, whose lock has this ``rank``, of every fork while it lives."""
    with _lock:
        _members[member] = (rank, next(_numbers))


def _before() -> None:
    _lock.acquire()
    for member, _ in sorted(_members.items(), key=lambda each: each[1]):
        member.before_fork()
        _resting.append(member)


def _after(in_child: bool) -> None:
    try:
        while _resting:
            _resting.pop().after_fork(in_child)
    finally:
        _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=lambda: _after(in_child=False), after_in_child=lambda: _after(in_child=True)
    )
