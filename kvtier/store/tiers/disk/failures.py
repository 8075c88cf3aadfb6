"""Failures of a store's folder: counted, and warned about once for each subject."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from kvtier.store.tiers.disk.folder import StoreFolder

_log = logging.getLogger("kvtier.store.disk")
T = TypeVar("T")


class Failures:
    """What fails in ``folder``. A turn goes on without it. Thread-safe.

    Attributes:
        counts: counts of events, failures (``errors.…``) among them.
    """

    def __init__(self, folder: StoreFolder) -> None:
        self.counts: Counter[str] = Counter()
        self._folder = folder
        self._warned: set[str] = set()
        self._counting = threading.Lock()

    def begin_anew(self) -> None:
        """Drop, in a forked child, the lock of its parent's threads."""
        self._counting = threading.Lock()

    def warn(self, subject: str, message: str) -> None:
        """Warn once for each ``subject``."""
        if subject not in self._warned:
            self._warned.add(subject)
            _log.warning("%s", message)

    def count(self, what: str, n: int = 1) -> None:
        """Count ``n`` events."""
        with self._counting:
            self.counts[what] += n

    def ask(self, question: Callable[[], T], otherwise: T) -> T:
        """Return the answer of the catalog; when it fails, warn once and return ``otherwise``."""
        try:
            return question()
        except sqlite3.Error as error:
            self.note_catalog(error)
            self.warn("catalog", f"the catalog of {self._folder.path} fails ({error}); its blocks are recomputed")
            return otherwise

    def note_catalog(self, error: sqlite3.Error) -> None:
        """Count a failure of the catalog; if it is damaged, mark it to be rebuilt at the next open."""
        self.count("errors.catalog")
        if isinstance(error, sqlite3.DatabaseError) and any(
            word in str(error) for word in ("malformed", "not a database", "decode")
        ):
            with contextlib.suppress(OSError):
                self._folder.damage_mark.touch(0o600)
