"""Texts: a vocabulary beside each root, so that stored token ids can be shown as text without a tokenizer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Container

from kvtier.store.format.vocabulary import MAX_FILE_BYTES, Vocabulary
from kvtier.store.tiers.disk.folder import StoreFolder, read_bytes

_log = logging.getLogger("kvtier.store")


class Texts:
    """The vocabularies of a store, ``roots/<root>.vocabulary``. Thread-safe.

    They only show text. What fails costs a line in the log and no text: nothing here raises an error.

    Args:
        folder: the folder of the store; None for one in RAM, which keeps none.
        submit: runs a task behind the caller.
    """

    def __init__(self, folder: StoreFolder | None, submit: Callable[[Callable[[], None]], object]) -> None:
        self._folder = folder
        self._submit = submit
        self._tried: set[str] = set()
        self._lock = threading.Lock()

    def vocabulary(self, root: str) -> Vocabulary | None:
        """Return the vocabulary of ``root``; None when there is none, or it cannot be read."""
        if self._folder is None:
            return None
        path = self._folder.vocabulary(root)
        try:
            return Vocabulary.decode(read_bytes(path, MAX_FILE_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, MemoryError) as error:
            _log.info("%s cannot be read, so its prefixes have no text: %s", path, error)
            return None

    def lacks(self, root: str) -> bool:
        """Whether ``keep`` would keep a vocabulary of ``root``: there is no whole one, and none was tried before."""
        if self._folder is None or root in self._tried:
            return False
        known = self.vocabulary(root)
        if known is not None and known.is_whole:
            self._tried.add(root)
            return False
        return True

    def keep(self, root: str, make: Callable[[], Vocabulary]) -> None:
        """Write the whole vocabulary of ``root``, which ``make`` returns, behind the caller; once a process."""
        if self._folder is not None and root not in self._tried:
            self._tried.add(root)
            self._submit(lambda: self._write(root, make))

    def _write(self, root: str, make: Callable[[], Vocabulary]) -> None:
        assert self._folder is not None
        path = self._folder.vocabulary(root)
        try:
            data = make().encode()
            if len(data) > MAX_FILE_BYTES:
                raise ValueError(f"it takes more than {MAX_FILE_BYTES} bytes")
            with self._lock:
                self._folder.write(path, [memoryview(data)])
        except Exception as error:  # of the tokenizer, which may be anybody's
            _log.warning("prefixes of root %s have no text: %s: %s", root[:12], type(error).__name__, error)

    def add(self, root: str, part: Vocabulary) -> None:
        """Keep ``part``, which came with an imported prefix, unless a whole vocabulary of ``root`` is known."""
        known = self.vocabulary(root)
        if self._folder is None or (known is not None and known.is_whole):
            return
        self._write(root, lambda: part.only_part() if known is None else known.with_all_of(part))

    def forget_all_but(self, roots: Container[str]) -> None:
        """Delete the vocabularies of all roots but ``roots``, which still have blocks."""
        if self._folder is None:
            return
        for root, path in self._folder.vocabularies():
            if root not in roots:
                try:
                    self._folder.filesystem.delete(path)
                except OSError as error:
                    _log.warning("%s cannot be deleted: %s", path, error)
                self._tried.discard(root)
