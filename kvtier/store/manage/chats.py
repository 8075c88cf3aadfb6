"""Saved chats: a small record beside the blocks for each named conversation, so that it can be resumed by its name.

The store knows nothing of messages: the content of a record is any JSON object. Blocks may be evicted; a record stays
until its name is forgotten, removed or expires. Records do not count in byte budgets.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtier.errors import ChangedError, ConfigurationError, StoreError, StoreVersionError
from kvtier.store.names import checked_name
from kvtier.store.tiers.disk.catalog.database import Database
from kvtier.store.tiers.disk.folder import StoreFolder, read_record

_FORMAT = 1
_MAX_FILE_BYTES = 256 * 2**20  # ids and text of some ten million tokens


@dataclass(frozen=True, slots=True)
class SavedChat:
    """A saved chat: its name, its content (a JSON object), and the revision that each writing changes."""

    name: str
    content: Mapping[str, Any]
    revision: str


class SavedChats:
    """The saved chats of one store, by name. Thread-safe; processes that share a folder see each other's chats.

    Guarantees: a file is written whole or not at all, and only the user can read it (0600). Two writers never replace
    each other's chat unseen. In a store without folder, chats live as long as the store.

    Every method raises ``ClosedError`` when the store was closed, and ``StoreError`` when the disk fails.
    """

    def __init__(self, database: Database, folder: StoreFolder | None, check_open: Callable[[], None]) -> None:
        self._database = database
        self._folder = folder
        self._check_open = check_open
        self._in_ram: dict[str, SavedChat] = {}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads and processes from writing chats meanwhile."""
        self._check_open()
        try:
            with self._database.transaction():  # the lock of the catalog serves for its neighbours
                yield
        except (OSError, sqlite3.Error) as error:
            where = self._folder.path if self._folder is not None else "memory"
            raise StoreError(f"cannot save a chat in {where}: {error}") from error

    def read(self, name: str) -> SavedChat | None:
        """Return the chat ``name``; None when there is none.

        Raises:
            ConfigurationError: ``name`` cannot be a name.
            StoreError: it cannot be read, or is damaged.
            StoreVersionError: a newer kvtier wrote it.
        """
        self._check_open()
        return self._find(checked_name(name))

    def _find(self, name: str) -> SavedChat | None:
        if self._folder is None:
            return self._in_ram.get(name)
        path = self._folder.chat(name)
        try:
            found = read_chat(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise StoreError(f"the chat {name!r:.80} cannot be read from {path}: {error}") from error
        if found.name != name:
            raise StoreError(f"{path} holds the chat of another name than its place says")
        return found

    def write(self, name: str, content: Mapping[str, Any], *, after: str | None) -> str:
        """Save a chat in place of the revision ``after`` (None: of no chat); return its new revision.

        Args:
            name: its name.
            content: what JSON can express.
            after: the revision that is replaced.

        Raises:
            ChangedError: the saved chat is of another revision: another writer has saved or removed it.
            ConfigurationError: ``name`` cannot be a name, or ``content`` is not JSON.
        """
        checked_name(name)
        saved = SavedChat(name, content, uuid.uuid4().hex)
        text = _text(saved)
        with self._alone():
            found = self._find(name)
            if (found.revision if found is not None else None) != after:
                raise ChangedError(f"the chat {name!r:.80} was changed elsewhere since it was read")
            self._put(saved, text)
        return saved.revision

    def _put(self, saved: SavedChat, text: str) -> None:
        if self._folder is None:
            self._in_ram[saved.name] = SavedChat(saved.name, json.loads(text)["chat"], saved.revision)
        else:
            self._folder.write(self._folder.chat(saved.name), [memoryview(text.encode())])

    def names(self) -> tuple[str, ...]:
        """Return the names of all saved chats, in order; damaged files are left out."""
        self._check_open()
        if self._folder is None:
            return tuple(sorted(self._in_ram))
        found = []
        for path in self._folder.chats():
            try:
                found.append(read_chat(path).name)
            except (OSError, ValueError, RecursionError, StoreVersionError):
                continue  # verify() reports it
        return tuple(sorted(found))

    def remove(self, name: str) -> bool:
        """Delete the chat ``name``; return whether it existed."""
        with self._alone():
            if self._folder is None:
                return self._in_ram.pop(name, None) is not None
            return self._folder.filesystem.delete(self._folder.chat(name))

    def clear(self) -> None:
        """Delete all chats, damaged ones too."""
        with self._alone():
            self._in_ram.clear()
            if self._folder is not None:
                for path in self._folder.chats():
                    self._folder.filesystem.delete(path)

    def rename(self, old: str, new: str) -> bool:
        """Rename the chat ``old``, if there is one, to ``new``; return whether it existed.

        Raises:
            ConfigurationError: a chat ``new`` exists already.
        """
        checked_name(new)
        with self._alone():
            found = self._find(old)
            if found is None:
                return False
            if self._find(new) is not None:
                raise ConfigurationError(f"{new!r:.80} is the name of another chat already; forget that first.")
            renamed = SavedChat(new, found.content, found.revision)
            self._put(renamed, _text(renamed))
            if self._folder is None:
                del self._in_ram[old]
            else:
                self._folder.filesystem.delete(self._folder.chat(old))
        return True


def _text(saved: SavedChat) -> str:
    record = {"format": _FORMAT, "name": saved.name, "revision": saved.revision, "chat": dict(saved.content)}
    try:
        return json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8").decode()
    except (TypeError, ValueError, RecursionError) as error:  # an unpaired surrogate is a ValueError too
        raise ConfigurationError(f"the chat {saved.name!r:.80} cannot be saved as JSON: {error}") from error


def read_chat(path: Path) -> SavedChat:
    """Read the file of a chat.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        RecursionError: it is nested too deeply.
        StoreVersionError: a newer kvtier wrote it.
        ValueError: it is no valid file of a chat.
    """
    record = read_record(path, _MAX_FILE_BYTES)
    try:
        version, saved = record["format"], SavedChat(record["name"], record["chat"], record["revision"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no file of a chat ({error!r})") from error
    if type(version) is int and version > _FORMAT:
        raise StoreVersionError(f"{path} was written by a newer kvtier (format {version}); update kvtier")
    if version != _FORMAT or not isinstance(saved.content, dict) or not isinstance(saved.revision, str):
        raise ValueError("it is no file of a chat")
    checked_name(saved.name)
    return saved
